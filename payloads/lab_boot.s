# The lab's BIOS: a 64 KiB ROM whose only job is to start a preloaded 64-bit Linux kernel.
#
# The kernel is part of a picture of guest memory from LAB_INFO on. QEMU's loader has put it there
# before the ROM starts. Bochs has nothing for that which works in all its versions, so the host
# writes into Bochs' own memory: the ROM marks a place, says so on the debug port, and waits until
# the host has found the mark and set the flag behind it. Bochs backs guest memory by blocks of the
# host's, each handed out at the guest's first touch; touching them in ascending order before
# anything else makes them one piece, in which the distance from the mark is the guest address.
#
# The info block (kvmnest/lab/image.py writes it) holds, by page:
#   +0x0000 boot_params   +0x1000 command line   +0x2000 ACPI tables
#   +0x3000 page tables (PML4, PDPT, four page directories of 2 MiB pages: 0-4 GiB is identity)
#   +0x9000 magic, number of blocks, kernel entry, address of the tail mark

        .set LAB_INFO, 0xfe0000
        .set LAB_WAIT, 0x800000         # aligned to Bochs' largest block; WAIT in image.py
        .set LAB_GO, LAB_WAIT + 16
        .set LAB_BLOCK, 0x20000         # Bochs' smallest block
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
        movb    $0xb5, %al              # CMOS: memory above 16 MiB in units of 64 KiB
        outb    %al, $0x70
        inb     $0x71, %al
        movb    %al, %ah
        movb    $0xb4, %al
        outb    %al, $0x70
        inb     $0x71, %al
        movzwl  %ax, %ebx
        shll    $16, %ebx
        addl    $0x1000000, %ebx
        movl    $LAB_WAIT, %edi
1:      movl    (%edi), %eax
        addl    $LAB_BLOCK, %edi
        cmpl    %ebx, %edi
        jb      1b
        cmpl    $MAGIC, LAB_INFO + 0x9000
        je      placed
        movl    $ROM + mark - _start, %esi
        movl    $LAB_WAIT, %edi
        movl    $4, %ecx
        rep movsl
        movl    $ROM + waiting - _start, %esi
        movl    $waiting_end - waiting, %ecx
        movw    $0xe9, %dx
        rep outsb
2:      pause
        cmpl    $0, LAB_GO
        je      2b
placed:
        cmpl    $MAGIC, LAB_INFO + 0x9000
        jne     refuse
        # The last dword of the image repeats the magic: a Bochs that orders blocks in another way
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
        .ascii  "KVMNEST-BOOT: this emulator lays out its memory in an unknown order\n"
message_end:
waiting:
        .ascii  "KVMNEST-BOOT: waiting\n"
waiting_end:
        # 16 bytes, nowhere else at the start of a page.
mark:   .ascii  "kvmnest: memory?"
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
