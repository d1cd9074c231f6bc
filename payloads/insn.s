# The instructions under test: symbol insn_NAME for 64-bit code, insn32_NAME for compatibility
# mode, each with a twin that executes it under blocking by MOV SS (_movss) or by STI (_sti).
# Operands: memory at (%rdi) or, through SS, at (%rbp); VMCS field or type in RAX, value in RDX.


        .section .insn, "ax"

        .macro  DONE64
        movabs  DONE_ADDRESS, %al
        .endm
        .macro  DONE32
        ljmp    $0, $0
        .endm
        .globl  done64, done64_end, done32, done32_end
        .code64
done64: DONE64
done64_end:
        .code32
done32: DONE32
done32_end:

        .balign 8
ss_selector:
        .word   SEL_DATA

# The MOV to SS and the STI stand right before the instruction: blocking lasts for one
# instruction (SDM, "Masking Exceptions and Interrupts When Switching Stacks").
        .macro  VARIANTS prefix:req, name:req, done:req, text:vararg
        .globl  \prefix\name, \prefix\name\()_movss, \prefix\name\()_sti
\prefix\name:
        \text
        \done
\prefix\name\()_movss:
        mov     ss_selector, %ss
        \text
        \done
\prefix\name\()_sti:
        sti
        \text
        \done
        .endm

        .macro  INSN name:req, text:vararg
        .code64
        VARIANTS insn_, \name, DONE64, \text
        .endm

        .macro  INSN32 name:req, text:vararg
        .code32
        VARIANTS insn32_, \name, DONE32, \text
        .endm

# --- VMX instructions ---
INSN    vmxon,          vmxon (%rdi)
INSN    vmxon_ss,       vmxon (%rbp)
INSN    vmxoff,         vmxoff
INSN    vmclear,        vmclear (%rdi)
INSN    vmclear_ss,     vmclear (%rbp)
INSN    vmptrld,        vmptrld (%rdi)
INSN    vmptrld_ss,     vmptrld (%rbp)
INSN    vmptrst,        vmptrst (%rdi)
INSN    vmptrst_ss,     vmptrst (%rbp)
INSN    vmread,         vmread %rax, %rdx
INSN    vmread_mem,     vmread %rax, (%rdi)
INSN    vmread_ss,      vmread %rax, (%rbp)
INSN    vmwrite,        vmwrite %rdx, %rax
INSN    vmwrite_mem,    vmwrite (%rdi), %rax
INSN    vmwrite_ss,     vmwrite (%rbp), %rax
INSN    vmlaunch,       vmlaunch
INSN    vmresume,       vmresume
INSN    vmcall,         vmcall
INSN    vmfunc,         vmfunc
INSN    invept,         invept (%rdi), %rax
INSN    invept_ss,      invept (%rbp), %rax
INSN    invvpid,        invvpid (%rdi), %rax
INSN    invvpid_ss,     invvpid (%rbp), %rax

INSN32  vmxon,          vmxon (%edi)
INSN32  vmxoff,         vmxoff
INSN32  vmclear,        vmclear (%edi)
INSN32  vmptrld,        vmptrld (%edi)
INSN32  vmptrst,        vmptrst (%edi)
INSN32  vmread,         vmread %eax, %edx
INSN32  vmread_mem,     vmread %eax, (%edi)
INSN32  vmwrite,        vmwrite %edx, %eax
INSN32  vmwrite_mem,    vmwrite (%edi), %eax
INSN32  vmlaunch,       vmlaunch
INSN32  vmresume,       vmresume
INSN32  vmcall,         vmcall
INSN32  invept,         invept (%edi), %eax
INSN32  invvpid,        invvpid (%edi), %eax

# --- the rest of what a hypervisor uses ---
INSN    nop,            nop
INSN    rdmsr,          rdmsr
INSN    wrmsr,          wrmsr
INSN    cpuid,          cpuid
INSN    xgetbv,         xgetbv
INSN    xsetbv,         xsetbv
INSN    rdtsc,          rdtsc
INSN    hlt,            hlt
INSN    invlpg,         invlpg (%rdi)
INSN    in8,            in %dx, %al
INSN    in16,           in %dx, %ax
INSN    in32,           in %dx, %eax
INSN    out8,           out %al, %dx
INSN    out16,          out %ax, %dx
INSN    out32,          out %eax, %dx
        .irp    cr, 0, 2, 3, 4, 8
INSN    read_cr\cr,     mov %cr\cr, %rax
INSN    write_cr\cr,    mov %rax, %cr\cr
        .endr
        .irp    dr, 0, 1, 2, 3, 6, 7
INSN    read_dr\dr,     mov %db\dr, %rax
INSN    write_dr\dr,    mov %rax, %db\dr
        .endr
INSN    lmsw,           lmsw %ax
INSN    clts,           clts
INSN    lgdt,           lgdt (%rdi)
INSN    lidt,           lidt (%rdi)
INSN    lldt,           lldt %ax
INSN    ltr,            ltr %ax
