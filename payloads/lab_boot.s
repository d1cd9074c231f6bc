# The lab's BIOS: a 64 KiB ROM whose only job is to start a preloaded 64-bit Linux kernel.
#
# Bochs reads one file (its "optional RAM image") into the host memory that backs the guest. It
# hands that memory out in 128 KiB blocks, each on the guest's first touch, so the file appears in
# the guest in the order of touching. The image is one contiguous picture of guest memory from
# LAB_INFO on; reading one dword per block in ascending order puts every block in its place.
# A Bochs that maps its memory at once, and QEMU, whose loader puts the file there, show the same
# picture without that.
#
# The info block (kvmnest/lab/image.py writes it) holds, by page:
#   +0x0000 boot_params   +0x1000 command line   +0x2000 ACPI tables
#   +0x3000 page tables (PML4, PDPT, four page directories of 2 MiB pages: 0-4 GiB is identity)
#   +0x9000 magic, number of blocks, kernel entry, address of the tail mark

        .set LAB_INFO, 0xfe0000
        .set LAB_BLOCK, 0x20000
        .set ROM, 0xffff0000
        .set MAGIC, 0x4e4d564b          # "KVMN"
        .set MSR_MTRR_DEF_TYPE, 0x2ff
        .set MSR_EFER, 0xc0000080

        .text
        .code16
        .globl _start
_start:
        cli
        movb    $0xff, %al              # the kernel sets up both PICs itself; nothing may fire now
        outb    %al, $0x21
        outb    %al, $0xa1
        lgdtl   %cs:gdt_pointer - _start
        movl    %cr0, %eax
        orb     $1, %al
        movl    %eax, %cr0
        ljmpl   $0x08, $ROM + protected - _start

        .code32
protected:
        movw    $0x10, %ax
        movw    %ax, %ds
        movw    %ax, %es
        movw    %ax, %ss
        movw    %ax, %fs
        movw    %ax, %gs
        movl    $LAB_INFO, %edi
        cmpl    $MAGIC, 0x9000(%edi)
        jne     refuse
        movl    0x9004(%edi), %ecx
1:      movl    (%edi), %eax
        addl    $LAB_BLOCK, %edi
        decl    %ecx
        jnz     1b
        # The last dwords of the image repeat the magic: a Bochs that orders blocks in another way
        # must be named here, not by a kernel that dies of random memory.
        movl    LAB_INFO + 0x900c, %edi
        cmpl    $MAGIC, (%edi)
        jne     refuse

        movl    $MSR_MTRR_DEF_TYPE, %ecx        # memory is write-back, as a PC's BIOS leaves it
        movl    $0x806, %eax
        xorl    %edx, %edx
        wrmsr
        movl    $LAB_INFO + 0x3000, %eax
        movl    %eax, %cr3
        movl    %cr4, %eax
        orl     $0x20, %eax                     # PAE
        movl    %eax, %cr4
        movl    $MSR_EFER, %ecx
        rdmsr
        orl     $0x100, %eax                    # LME
        wrmsr
        movl    %cr0, %eax
        orl     $0x80000000, %eax               # PG
        movl    %eax, %cr0
        ljmpl   $0x18, $ROM + long_mode - _start

# Tell the host on the debug port, then ask Bochs to stop, and QEMU (by the keyboard controller) to
# reset, which ends it.
refuse:
        movl    $ROM + message - _start, %esi
        movl    $message_end - message, %ecx
        movw    $0xe9, %dx
        rep outsb
        movl    $ROM + shutdown - _start, %esi
        movl    $8, %ecx
        movw    $0x8900, %dx
        rep outsb
        movb    $0xfe, %al
        outb    %al, $0x64
        cli
        hlt

        .code64
long_mode:
        movl    $LAB_INFO, %esi                 # the kernel's 64-bit entry: boot_params in RSI
        movl    LAB_INFO + 0x9008, %eax
        jmp     *%rax

message:
        .ascii  "KVMNEST-BOOT: this emulator lays out preloaded memory in an unknown order\n"
message_end:
shutdown:
        .ascii  "Shutdown"

        .balign 8
        # Marked as accessed: a CPU that sets the bit itself writes to a ROM, and KVM would emulate.
gdt:    .quad   0
        .quad   0x00cf9b000000ffff              # 0x08: 32-bit code
        .quad   0x00cf93000000ffff              # 0x10: data
        .quad   0x00af9b000000ffff              # 0x18: 64-bit code
gdt_pointer:
        .word   . - gdt - 1
        .long   ROM + gdt - _start

        # The reset vector: F000:FFF0, 16 bytes below 4 GiB.
        .org    0xfff0, 0xff
        .code16
        jmp     _start
        .org    0x10000, 0xff
