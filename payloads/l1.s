# L1: a minimal bare-metal hypervisor that does what Python tells it, one command at a time.
# One translation unit, so that the constants of abi.inc exist once.

        .include "abi.inc"
        .include "command.s"
        .include "trap.s"
        .include "insn.s"
        .include "tables.s"
        .include "memory.s"
        .include "l2.s"
