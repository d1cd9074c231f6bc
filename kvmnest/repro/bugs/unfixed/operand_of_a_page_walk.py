"""KVM takes the page-table entry for the operand when a page walk exits by write protection."""

import pytest

from kvmnest.kvm import Memory
from kvmnest.l1 import L1
from kvmnest.repro import Bug
from kvmnest.vmx import EptVpidCap
from kvmnest.vmx.outcome import Succeed

BUG = Bug(
    vulnerable="MOV loads the page-table entry",
    correct="MOV loads what is in the page",
    fix=(
        {
            "file": "arch/x86/kvm/mmu/mmu.c",
            "function": "kvm_mmu_page_fault",
            "expression": "emulate: return x86_emulate_instruction(",
            "replacement": """
            emulate:
                if (error_code & PFERR_GUEST_PAGE_MASK)
                    emulation_type |= BIT(30); /* the address is not the operand's */
                return x86_emulate_instruction(""",
        },
        {
            "file": "arch/x86/kvm/x86.c",
            "function": "x86_emulate_instruction",
            "expression": "if (vcpu->arch.mmu->root_role.direct) {",
            "replacement": """
            if (vcpu->arch.mmu->root_role.direct && !(emulation_type & BIT(30))) {""",
        },
    ),
)

LOAD = b"\x48\x8b\x07"  # MOV RAX, [RDI]
INDEX = 0x25  # of the entry in its table; the operand is as far from the start of its page
OFFSET = 8 * INDEX
PAGE = 0x80000000 + 4096 * INDEX
ROM, VALUE = 1 << 32, 0x1122334455667788


@pytest.mark.sdm("Accessed and Dirty Flags for EPT")
@pytest.mark.needs(EptVpidCap.ACCESSED_DIRTY)
def test_load_through_a_read_only_page_table(l1: L1) -> None:
    """With these flags the processor walks a page table by writes, which a read-only slot traps."""
    rom = Memory(4096)
    l1.vm.add_memory(1, ROM, rom, read_only=True)
    data, directory = l1.alloc(), l1.alloc()
    l1.write_int(l1.sym("l1_pml4_pdpt") + 16, directory | 7)
    l1.write_int(directory, ROM | 7)
    rom.write(OFFSET, (data | 0x67).to_bytes(8, "little"))  # accessed and dirty already
    l1.write_int(data + OFFSET, VALUE)
    seen = l1.call(LOAD, regs={"rdi": PAGE + OFFSET})
    assert seen == Succeed()
    assert seen.regs["rax"] == VALUE
