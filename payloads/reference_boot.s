# The reference target's BIOS: a 64 KiB ROM that brings the bare CPU from reset to a state that
# Python states, and jumps there. It starts anew at each reset.
#
# What to do stands in the ROM's second half, which Python can write and the guest cannot
# (kvmnest/reference/rom.py). An OUT to PORT_DONE hands the CPU back to Python; it comes back by a
# reset, or goes on behind the OUT.

        .include "abi.inc"

        .set ROM, 0xf0000
        .set TASK, ROM + 0x8000         # TASK in rom.py, and the offsets below
        .set TASK_NONE, 0
        .set TASK_ASK, 1                # execute a list of CPUIDs and RDMSRs
        .set TASK_START, 2              # load the state below and jump
        .set TASK_COUNT, 0x04           # of the list
        .set TASK_CR0, 0x08
        .set TASK_CR3, 0x10
        .set TASK_CR4, 0x18
        .set TASK_EFER, 0x20
        .set TASK_GDTR, 0x28
        .set TASK_IDTR, 0x38
        .set TASK_BUSY_GDTR, 0x48       # a copy of the GDT in which the TSS is available, for LTR
        .set TASK_SELECTORS, 0x58       # u32 each: CS SS DS ES FS GS TR LDTR
        .set TASK_RIP, 0x80
        .set TASK_RSP, 0x88
        .set TASK_RFLAGS, 0x90
        .set TASK_GPR, 0x98
        .set TASK_LIST, TASK + 0x1000   # asked: u32 op, EAX, ECX, 0; started: u64 MSR, value
        .set ASK_CPUID, 1
        .set ANSWERS, 0x200000          # u32 EAX, EBX, ECX, EDX, whether it executed, 0, 0, 0
        .set MSR_EFER, 0xc0000080

        .text
        .code16
        .globl _start
_start:
        cli
        lgdtl   %cs:gdt_pointer - _start
        lidtl   %cs:idt_pointer - _start
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
        movl    $ANSWERS, %esp
        cmpl    $TASK_START, TASK
        je      start
        cmpl    $TASK_ASK, TASK
        je      ask
idle:   outb    %al, $PORT_DONE
        jmp     idle

ask:
        movl    $TASK_LIST, %esi
        movl    $ANSWERS, %edi
1:      xorl    %ebx, %ebx
        xorl    %edx, %edx
        movl    4(%esi), %eax
        movl    8(%esi), %ecx
        movl    $1, %ebp
        cmpl    $ASK_CPUID, (%esi)
        jne     2f
        cpuid
        jmp     3f
2:      rdmsr
3:      movl    %eax, (%edi)
        movl    %ebx, 4(%edi)
        movl    %ecx, 8(%edi)
        movl    %edx, 12(%edi)
        movl    %ebp, 16(%edi)
        addl    $16, %esi
        addl    $32, %edi
        movl    %esi, %eax
        subl    $TASK_LIST, %eax
        shrl    $4, %eax
        cmpl    TASK + TASK_COUNT, %eax
        jb      1b
        jmp     idle

# #GP of RDMSR, which is two bytes: go on behind it.
fault:
        addl    $4, %esp
        addl    $2, (%esp)
        xorl    %ebp, %ebp
        iretl

start:
        movl    %cr4, %eax
        orl     $0x20, %eax             # PAE
        movl    %eax, %cr4
        movl    TASK + TASK_CR3, %eax
        movl    %eax, %cr3
        movl    $MSR_EFER, %ecx
        movl    TASK + TASK_EFER, %eax
        andl    $~0x400, %eax           # LMA is not written
        xorl    %edx, %edx
        wrmsr
        movl    TASK + TASK_CR0, %eax
        movl    %eax, %cr0
        ljmpl   $0x18, $ROM + long_mode - _start

        .code64
long_mode:
        mov     $TASK, %ebx
        mov     TASK_CR3(%rbx), %rax
        mov     %rax, %cr3
        mov     TASK_CR4(%rbx), %rax
        mov     %rax, %cr4
        mov     $TASK_LIST, %esi
        mov     TASK_COUNT(%rbx), %edi
1:      test    %edi, %edi
        jz      2f
        mov     (%rsi), %ecx
        mov     8(%rsi), %eax
        mov     12(%rsi), %edx
        wrmsr
        add     $16, %rsi
        dec     %edi
        jmp     1b
2:      lgdt    TASK_BUSY_GDTR(%rbx)
        ltr     TASK_SELECTORS+24(%rbx)
        lldt    TASK_SELECTORS+28(%rbx)
        lgdt    TASK_GDTR(%rbx)
        lidt    TASK_IDTR(%rbx)
        mov     TASK_SELECTORS+8(%rbx), %eax
        mov     %eax, %ds
        mov     TASK_SELECTORS+12(%rbx), %eax
        mov     %eax, %es
        mov     TASK_SELECTORS+16(%rbx), %eax
        mov     %eax, %fs
        mov     TASK_SELECTORS+20(%rbx), %eax
        mov     %eax, %gs
        mov     TASK_RSP(%rbx), %rsp
        mov     TASK_SELECTORS+4(%rbx), %eax
        push    %rax
        push    TASK_RSP(%rbx)
        push    TASK_RFLAGS(%rbx)
        mov     TASK_SELECTORS(%rbx), %eax
        push    %rax
        push    TASK_RIP(%rbx)
        mov     TASK_GPR+8(%rbx), %rcx
        mov     TASK_GPR+16(%rbx), %rdx
        mov     TASK_GPR+40(%rbx), %rbp
        mov     TASK_GPR+48(%rbx), %rsi
        mov     TASK_GPR+56(%rbx), %rdi
        mov     TASK_GPR+64(%rbx), %r8
        mov     TASK_GPR+72(%rbx), %r9
        mov     TASK_GPR+80(%rbx), %r10
        mov     TASK_GPR+88(%rbx), %r11
        mov     TASK_GPR+96(%rbx), %r12
        mov     TASK_GPR+104(%rbx), %r13
        mov     TASK_GPR+112(%rbx), %r14
        mov     TASK_GPR+120(%rbx), %r15
        mov     TASK_GPR+0(%rbx), %rax
        mov     TASK_GPR+24(%rbx), %rbx
        iretq

        .balign 8
# Marked as accessed, and the TSS of the copy is never written: this is a ROM.
gdt:    .quad   0
        .quad   0x00cf9b000000ffff              # 0x08: 32-bit code
        .quad   0x00cf93000000ffff              # 0x10: data
        .quad   0x00af9b000000ffff              # 0x18: 64-bit code
gdt_pointer:
        .word   . - gdt - 1
        .long   ROM + gdt - _start
        .balign 8
idt:    .fill   13, 8, 0
        .word   fault - _start, 0x08, 0x8e00, ROM >> 16
idt_pointer:
        .word   . - idt - 1
        .long   ROM + idt - _start

        # The reset vector: F000:FFF0, 16 bytes below 4 GiB.
        .org    0x8000, 0
        .org    0xfff0, 0
        .code16
        jmp     _start
        .org    0x10000, 0xff
