# Descriptor tables, task-state segments and page tables of L1 and L2, and the EPT of L2.
# All map L1's RAM one to one: linear = L2 physical = L1 physical.


        .section .tables, "aw"
        .balign 16
        .globl  l1_gdt, l1_gdt_end
l1_gdt:
        .quad   0
        .quad   0x00af9b000000ffff      # SEL_CODE64
        .quad   0x00cf93000000ffff      # SEL_DATA
        .quad   0x00cf9b000000ffff      # SEL_CODE32
        .quad   0x00cffb000000ffff      # SEL_USER_CODE32
        .quad   0x00cff3000000ffff      # SEL_USER_DATA
        .quad   0x00affb000000ffff      # SEL_USER_CODE64
        .quad   0                       # no selector; the others keep their numbers
        .macro  SYSTEM_DESCRIPTOR label:req, type:req, limit:req
        .word   \limit, \label
        .byte   0, \type, 0, 0
        .quad   0
        .endm
        SYSTEM_DESCRIPTOR tss0, 0x8b, 0x67
        SYSTEM_DESCRIPTOR tss1, 0x8b, 0x67
        SYSTEM_DESCRIPTOR l2_tss, 0x8b, 0x67
        SYSTEM_DESCRIPTOR l1_gdt, 0x82, 0x7
l1_gdt_end:

        .macro  TSS name:req, cpu:req
        .balign 16
        .globl  \name
\name:
        .long   0
        .quad   cpu\cpu\()_block, 0, 0  # RSP0..2
        .quad   0
        .quad   cpu\cpu\()_block        # IST1: traps
        .quad   cpu\cpu\()_block - STACK_SIZE   # IST2: interrupts
        .quad   cpu\cpu\()_block - 2*STACK_SIZE # IST3: NMI
        .quad   0, 0, 0, 0, 0
        .word   0, 0x68                 # I/O permission bitmap beyond the limit: none
        .endm
TSS     tss0, 0
TSS     tss1, 1

        .balign 16
        .globl  l2_tss
l2_tss:
        .long   0
        .quad   l2_stack_top, 0, 0
        .quad   0
        .quad   0, 0, 0, 0, 0, 0, 0
        .quad   0
        .word   0, 0x68

        .section .pages, "aw"
        .balign 4096

# FLAGS: of a leaf entry; DIRFLAGS: of an entry that points to a table; LARGE: page-size bit.
# The first RAM_SIZE bytes by 4 KiB pages, the rest of the first and the fourth GiB (the local
# APIC) by 2 MiB pages; the second and third GiB stay unmapped, for operands that fault.
        .macro  FOUR_LEVEL name:req, dirflags:req, flags:req
        .globl  \name, \name\()_pdpt, \name\()_pd, \name\()_pt
\name:
        .quad   \name\()_pdpt + \dirflags
        .fill   511, 8, 0
\name\()_pdpt:
        .quad   \name\()_pd + \dirflags, 0, 0, \name\()_pd3 + \dirflags
        .fill   508, 8, 0
\name\()_pd:
        .set    n, 0
        .rept   RAM_SIZE >> 21
        .quad   \name\()_pt + (n << 12) + \dirflags
        .set    n, n+1
        .endr
        .rept   512 - (RAM_SIZE >> 21)
        .quad   (n << 21) + \flags + 0x80
        .set    n, n+1
        .endr
\name\()_pd3:
        .set    n, 3*512
        .rept   512
        .quad   (n << 21) + \flags + 0x80
        .set    n, n+1
        .endr
\name\()_pt:
        .set    n, 0
        .rept   RAM_SIZE >> 12
        .quad   (n << 12) + \flags
        .set    n, n+1
        .endr
        .endm

FOUR_LEVEL l1_pml4, 0x07, 0x67          # present, writable, user; leaves accessed and dirty
FOUR_LEVEL l2_pml4, 0x07, 0x67
FOUR_LEVEL ept_pml4, 0x07, 0x37         # read, write, execute; leaves write-back

# 32-bit paging for L2: 4 MiB pages, one to one.
        .globl  l2_pd32
l2_pd32:
        .set    n, 0
        .rept   1024
        .long   (n << 22) + 0xe7
        .set    n, n+1
        .endr

# PAE paging for L2: the first four 64-bit entries of a page, over L2's own directories.
        .globl  l2_pae_pdpt
l2_pae_pdpt:
        .quad   l2_pml4_pd + 1, 0, 0, l2_pml4_pd3 + 1
        .fill   508, 8, 0
