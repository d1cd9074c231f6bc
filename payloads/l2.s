# Small L2 guests, and L2's exception handlers: each reports by VMCALL.


        .section .l2, "ax"
        .code64
        .macro  L2 name:req
        .globl  \name
\name:
        .endm

L2 l2_vmcall
        vmcall
        jmp     l2_vmcall

# RAX counts the entries, every other register comes back changed in a known way.
L2 l2_registers
        not     %rbx
        not     %rcx
        not     %rdx
        not     %rsi
        not     %rdi
        not     %rbp
        not     %r8
        not     %r9
        not     %r10
        not     %r11
        not     %r12
        not     %r13
        not     %r14
        not     %r15
        inc     %rax
        vmcall
        jmp     l2_registers

        .code32
L2 l2_vmcall32
        vmcall
        jmp     l2_vmcall32

        .code16
L2 l2_vmcall16
        vmcall
        jmp     l2_vmcall16

# --- handlers. On the stack from the top: vector, error code (0 where there is none), frame. ---
        .macro  HANDLERS name:req, bytes:req, pushop:req, real=0
        .globl  \name\()_handlers
        .balign \bytes
\name\()_handlers:
        .set    n, 0
        .rept   256
        .balign \bytes
        .if     n >= 32 || \real
        \pushop $0
        .elseif ((ERROR_CODE_VECTORS >> n) & 1) == 0
        \pushop $0
        .endif
        \pushop $n
        jmp     \name\()_report
        .set    n, n+1
        .endr
        .endm

        .section .stubs, "ax"
        .code64
HANDLERS l2_64, 16, pushq
L2 l2_64_report
        vmcall
        jmp     l2_64_report
        .code32
HANDLERS l2_32, 16, pushl
L2 l2_32_report
        vmcall
        jmp     l2_32_report
        .code16
HANDLERS l2_16, 16, pushw, 1
L2 l2_16_report
        vmcall
        jmp     l2_16_report

        .section .tables, "aw"
        .balign 16
        .globl  l2_idt
l2_idt:
        .set    n, 0
        .rept   256
        .word   l2_64_handlers + 16*n, SEL_CODE64, 0x8e00, 0
        .quad   0
        .set    n, n+1
        .endr
        .globl  l2_idt32
l2_idt32:
        .set    n, 0
        .rept   256
        .word   l2_32_handlers + 16*n, SEL_CODE32, 0x8e00, 0
        .set    n, n+1
        .endr
# Real-mode interrupt vectors: offset, segment 0.
        .globl  l2_ivt
l2_ivt:
        .set    n, 0
        .rept   256
        .word   l2_16_handlers + 16*n, 0
        .set    n, n+1
        .endr
