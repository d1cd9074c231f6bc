# The ways back into the command loop: traps (the end of a snippet is one) and VM exits.


# Registers to the slot at RAX; RAX itself is on top of the stack.
        .macro  SAVE_GPRS
        mov     %rcx, OUT_GPR+8(%rax)
        mov     %rdx, OUT_GPR+16(%rax)
        mov     %rbx, OUT_GPR+24(%rax)
        mov     %rbp, OUT_GPR+40(%rax)
        mov     %rsi, OUT_GPR+48(%rax)
        mov     %rdi, OUT_GPR+56(%rax)
        mov     %r8,  OUT_GPR+64(%rax)
        mov     %r9,  OUT_GPR+72(%rax)
        mov     %r10, OUT_GPR+80(%rax)
        mov     %r11, OUT_GPR+88(%rax)
        mov     %r12, OUT_GPR+96(%rax)
        mov     %r13, OUT_GPR+104(%rax)
        mov     %r14, OUT_GPR+112(%rax)
        mov     %r15, OUT_GPR+120(%rax)
        popq    OUT_GPR(%rax)
        mov     %cr2, %rcx
        mov     %rcx, OUT_CR2(%rax)
        .endm

        .text
        .code64

# Stack from here up: vector, error code, RIP, CS, RFLAGS, RSP, SS, then the per-vCPU block.
        .set    FRAME, 56
trap_common:
        push    %rax
        mov     FRAME+8+CPU_SLOT(%rsp), %rax
        SAVE_GPRS
        popq    OUT_VECTOR(%rax)
        popq    OUT_ERROR(%rax)
        popq    OUT_RIP(%rax)
        popq    OUT_CS(%rax)
        popq    OUT_RFLAGS(%rax)
        popq    OUT_RSP(%rax)
        popq    OUT_SS(%rax)
        movl    $STATUS_TRAP, SLOT_STATUS(%rax)
        cld
        jmp     command_next

# HOST_RIP of the baseline VMCS; HOST_RSP is the per-vCPU block. What the processor loaded from
# the host-state area is recorded before anything changes it.
        .globl  vmexit_entry
vmexit_entry:
        pushfq
        push    %rax
        mov     16+CPU_SLOT(%rsp), %rax
        SAVE_GPRS
        popq    OUT_RFLAGS(%rax)
        mov     %rsp, OUT_RSP(%rax)
        mov     %cs, %ecx
        mov     %rcx, OUT_CS(%rax)
        mov     %ss, %ecx
        mov     %rcx, OUT_SS(%rax)
        mov     %ds, OUT_SELECTORS(%rax)
        mov     %es, OUT_SELECTORS+2(%rax)
        mov     %fs, OUT_SELECTORS+4(%rax)
        mov     %gs, OUT_SELECTORS+6(%rax)
        str     OUT_SELECTORS+8(%rax)
        sldt    OUT_SELECTORS+10(%rax)
        sgdt    OUT_GDTR(%rax)
        sidt    OUT_IDTR(%rax)
        movl    $STATUS_VMEXIT, SLOT_STATUS(%rax)
        jmp     command_next

# Interrupts and NMIs are counted, and what they interrupted goes on.
# Stack: vector, error code (0), then the IRETQ frame, then the rest of the stacks above it.
        .set    IRQ_BLOCK, FRAME+STACK_SIZE
        .set    NMI_BLOCK, FRAME+2*STACK_SIZE
interrupt_common:
        push    %rax
        push    %rcx
        mov     32(%rsp), %rax
        mov     %rax, 16+IRQ_BLOCK+CPU_IRQ_RIP(%rsp)
        mov     16+IRQ_BLOCK+CPU_IRQ_COUNT(%rsp), %rcx
        incq    16+IRQ_BLOCK+CPU_IRQ_COUNT(%rsp)
        and     $15, %ecx
        mov     16(%rsp), %eax
        mov     %al, 16+IRQ_BLOCK+CPU_IRQ_VECTORS(%rsp,%rcx)
        mov     16+IRQ_BLOCK+CPU_EOI(%rsp), %rax
        cmp     $EOI_XAPIC, %eax
        jne     1f
        mov     $0xfee000b0, %ecx
        movl    $0, (%rcx)
        jmp     2f
1:      cmp     $EOI_X2APIC, %eax
        jne     2f
        push    %rdx
        mov     $0x80b, %ecx
        xor     %eax, %eax
        xor     %edx, %edx
        wrmsr
        pop     %rdx
2:      pop     %rcx
        pop     %rax
        add     $16, %rsp
        iretq

nmi_common:
        incq    NMI_BLOCK+CPU_NMI_COUNT(%rsp)
        add     $16, %rsp
        iretq

# --- one stub of 16 bytes for each vector ---
        .section .stubs, "ax"
        .balign 16
trap_stubs:
        .set    n, 0
        .rept   256
        .balign 16
        .if     n >= 32
        pushq   $0
        .elseif ((ERROR_CODE_VECTORS >> n) & 1) == 0
        pushq   $0
        .endif
        pushq   $n
        .if     n == 2
        jmp     nmi_common
        .elseif n < 32
        jmp     trap_common
        .else
        jmp     interrupt_common
        .endif
        .set    n, n+1
        .endr

# Stubs lie below 64 KiB (link.ld), so the upper parts of an offset are zero and the lower one
# can be a 16-bit relocation.
        .macro  GATE64 stubs:req, ist:req, dpl:req
        .word   \stubs + 16*n, SEL_CODE64
        .byte   \ist, 0x8e | (\dpl << 5)
        .word   0
        .quad   0
        .endm

        .section .tables, "aw"
        .balign 16
        .globl  l1_idt
l1_idt:
        .set    n, 0
        .rept   256
        .if     n == 2
        GATE64  trap_stubs, 3, 0
        .elseif n == 3 || n == 4
        GATE64  trap_stubs, 1, 3
        .elseif n < 32
        GATE64  trap_stubs, 1, 0
        .else
        GATE64  trap_stubs, 2, 0
        .endif
        .set    n, n+1
        .endr
        .globl  l1_idt_end
l1_idt_end:
