"""What L1 puts into its APIC, into EPT entries and into lists of MSRs."""

from __future__ import annotations

from kvmnest.vmx import Field

#: IA32_APIC_BASE: x2APIC mode, on the first CPU; the APIC enabled by software.
X2APIC = ((0x1B, 0xFEE00D00), (0x80F, 0x1FF))
#: MOV [RDI], RAX.
STORE = b"\x48\x89\x07"
#: Of EPT entries: access rights, memory type, ignored and reserved bits.
EPT_ENTRIES = (
    *(0x30 | rights for rights in range(8)),
    *(rights | kind << 3 for rights in (3, 7) for kind in (0, 1, 2, 3, 4, 5, 7)),
    *(0x37 | 1 << bit for bit in (6, 7, 8, 9, 10, 11, 51, 52, 62)),
)
MSR_LISTS = (
    ("entry_load_msrs", Field.VM_ENTRY_MSR_LOAD_COUNT),
    ("exit_store_msrs", Field.VM_EXIT_MSR_STORE_COUNT),
    ("exit_load_msrs", Field.VM_EXIT_MSR_LOAD_COUNT),
)
#: Entries of them: the MSR, the reserved part, the value. Some are wrong.
LISTED = (
    *((0x174, 0, value) for value in (0, 0x10, 0xFFFFFFFF)),
    *((0x175, 0, 0x1234), (0x176, 0, 0x7FFF00001234)),
    *((0xC0000081, 0, 0x0013000800000000), (0xC0000082, 0, 0xFFFF800000001234)),
    *((0xC0000084, 0, 0x700), (0xC0000102, 0, 0x1234), (0x277, 0, 0x0007040600070406)),
    *((0x277, 0, 2), (0x174, 1, 0), (0xC0000100, 0, 0), (0xC0000101, 0, 0)),
    *((0x40000000, 0, 0), (0xC0000082, 0, 1 << 63), (0x800, 0, 0), (0x9B, 0, 0)),
)
