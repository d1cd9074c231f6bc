# L1's working memory, zero when the VM is made. Pages are named by what they are used for.


        .section .work, "aw", @nobits
        .macro  PAGES name:req, count=1
        .balign 4096
        .globl  \name
\name:  .skip   4096 * (\count)
        .endm

# Command slots and lists of each vCPU; a block sits on top of its three stacks.
PAGES   cpu0_slots, (SLOT_COUNT * SLOT_SIZE + 4095) / 4096
PAGES   cpu1_slots, (SLOT_COUNT * SLOT_SIZE + 4095) / 4096
PAGES   cpu0_list, 2
PAGES   cpu1_list, 2
PAGES   cpu0_stacks, 3
        .globl  cpu0_block
cpu0_block:
        .skip   4096
PAGES   cpu1_stacks, 3
        .globl  cpu1_block
cpu1_block:
        .skip   4096

# Stack of snippets that use one (CPL 0 and 3).
PAGES   snippet_stack
        .globl  snippet_stack_top
snippet_stack_top:
# Code that Python writes for L1 to run.
PAGES   snippet_code

PAGES   vmxon_region
PAGES   vmxon_region_cpu1
PAGES   vmcs_a
PAGES   vmcs_b
PAGES   vmcs_c
PAGES   vmcs_d
PAGES   shadow_vmcs
PAGES   msr_bitmap
PAGES   io_bitmap_a
PAGES   io_bitmap_b
PAGES   vmread_bitmap
PAGES   vmwrite_bitmap
PAGES   virtual_apic
PAGES   apic_access
PAGES   pml_log
PAGES   eptp_list
PAGES   posted_descriptor
PAGES   entry_load_msrs
PAGES   exit_store_msrs
PAGES   exit_load_msrs

# L2: code that Python writes, a data page, a stack.
PAGES   l2_code, 2
PAGES   l2_data
PAGES   l2_stack
        .globl  l2_stack_top
l2_stack_top:

        .globl  work_end
work_end:
