# The command loop: an interpreter of the command page, without any policy of its own.
#
# Nothing lives in a register across a command: an instruction under test, or L2, may leave any
# value in any of them. All the loop needs stands in the per-vCPU block at the top of the stack.


        .text
        .code64

# Python starts each vCPU here with RSP at its block and CPU_COUNT commands in its slots.
        .globl  l1_start
l1_start:
        mov     CPU_SLOTS(%rsp), %rax
        mov     %rax, CPU_SLOT(%rsp)
        cmpq    $0, CPU_COUNT(%rsp)
        jne     command
done:
        out     %al, $PORT_DONE
        jmp     l1_start

# The command before is finished; RSP is back at the block.
        .globl  command_next
command_next:
        addq    $SLOT_SIZE, CPU_SLOT(%rsp)
        decq    CPU_COUNT(%rsp)
        jz      done

command:
        mov     CPU_SLOT(%rsp), %rbx
        movl    $STATUS_RUNNING, SLOT_STATUS(%rbx)
        mov     SLOT_OP(%rbx), %eax
        cmp     $OP_EXECUTE, %eax
        je      op_execute
        cmp     $OP_VMREAD_LIST, %eax
        je      op_vmread_list
        cmp     $OP_VMWRITE_LIST, %eax
        je      op_vmwrite_list
        movl    $STATUS_BAD_OP, SLOT_STATUS(%rbx)
        jmp     command_next
list_done:
        movl    $STATUS_LIST_DONE, SLOT_STATUS(%rbx)
        jmp     command_next

# Load the wanted state, then IRETQ: one way into every privilege level, code-segment size and
# RFLAGS. The way back is a trap (trap.s) or a VM exit.
op_execute:
        pushq   SLOT_SS(%rbx)
        pushq   SLOT_RSP(%rbx)
        pushq   SLOT_RFLAGS(%rbx)
        pushq   SLOT_CS(%rbx)
        pushq   SLOT_RIP(%rbx)
        mov     SLOT_CR2(%rbx), %rax
        mov     %rax, %cr2
        mov     SLOT_DS(%rbx), %eax
        mov     %eax, %ds
        mov     %eax, %es
        mov     SLOT_GPR+8(%rbx), %rcx
        mov     SLOT_GPR+16(%rbx), %rdx
        mov     SLOT_GPR+40(%rbx), %rbp
        mov     SLOT_GPR+48(%rbx), %rsi
        mov     SLOT_GPR+56(%rbx), %rdi
        mov     SLOT_GPR+64(%rbx), %r8
        mov     SLOT_GPR+72(%rbx), %r9
        mov     SLOT_GPR+80(%rbx), %r10
        mov     SLOT_GPR+88(%rbx), %r11
        mov     SLOT_GPR+96(%rbx), %r12
        mov     SLOT_GPR+104(%rbx), %r13
        mov     SLOT_GPR+112(%rbx), %r14
        mov     SLOT_GPR+120(%rbx), %r15
        mov     SLOT_GPR+0(%rbx), %rax
        mov     SLOT_GPR+24(%rbx), %rbx
        iretq

# Lists are loops of one instruction, so that writing a whole VMCS takes one KVM_RUN.
        .macro  LIST name:req, body:req
\name:
        mov     SLOT_LIST(%rbx), %rsi
        mov     SLOT_LIST_COUNT(%rbx), %rcx
        test    %rcx, %rcx
        jz      list_done
1:      mov     (%rsi), %rax
        \body
        add     $LIST_ENTRY_SIZE, %rsi
        dec     %rcx
        jnz     1b
        jmp     list_done
        .endm

LIST op_vmread_list,  "vmread %rax, %rdx; pushfq; popq 16(%rsi); mov %rdx, 8(%rsi)"
LIST op_vmwrite_list, "mov 8(%rsi), %rdx; vmwrite %rdx, %rax; pushfq; popq 16(%rsi)"
