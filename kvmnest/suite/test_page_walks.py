"""Page walks through pages that KVM protects against writing: what the instruction then accesses.

With accessed and dirty flags for EPT the processor walks guest paging structures by writes, so a
walk through a protected page exits to KVM. KVM protects the EPT paging structures that L1 made for
L2, also where L1 uses the page for something else by now, and the pages of a read-only memory
slot. Whatever KVM then does, the instruction has to access the page that the entry names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest

from kvmnest.kvm import Memory
from kvmnest.l1 import L1
from kvmnest.suite.support.ept import Access, Window
from kvmnest.suite.support.guest import Guest
from kvmnest.vmx import Proc2Ctl
from kvmnest.vmx.outcome import Outcome, Succeed

pytestmark = [pytest.mark.series(19), pytest.mark.sdm("Accessed and Dirty Flags for EPT")]

#: The entry lies as far from the start of its table as the operand from the start of its page.
INDEX = 0x25
OFFSET = 8 * INDEX
PAGE = 0x80000000 + 4096 * INDEX
#: Bits of a guest entry: present, writable, user; accessed and dirty.
PRESENT, USED = 7, 0x60
RAX = 5


class Form(NamedTuple):
    """An instruction with the operand at RDI: what becomes of RAX (5 before) and the operand."""

    code: bytes
    rax: Callable[[int], int]
    operand: Callable[[int], int]


FORMS = {
    "MOV-load": Form(b"\x48\x8b\x07", lambda old: old, lambda old: old),
    "MOV-store": Form(b"\x48\x89\x07", lambda old: RAX, lambda old: RAX),
    "ADD-load": Form(b"\x48\x03\x07", lambda old: old + RAX, lambda old: old),
    "ADD-store": Form(b"\x48\x01\x07", lambda old: RAX, lambda old: old + RAX),
    "XCHG": Form(b"\x48\x87\x07", lambda old: old, lambda old: RAX),
    "BTS": Form(b"\x48\x0f\xab\x07", lambda old: RAX, lambda old: old | 1 << RAX),
}
#: At the offset that the entry has in its table, or at another one.
OPERANDS = [(form, OFFSET) for form in FORMS if form != "XCHG"] + [
    ("MOV-load", 0x40),
    ("MOV-store", 0x40),
]
each_operand = pytest.mark.parametrize(
    ("form", "offset"),
    OPERANDS,
    ids=[f"{form}-{'same' if at == OFFSET else 'other'}-offset" for form, at in OPERANDS],
)


class Mapping:
    """PAGE of L1, or of L2 without EPT, translated by an entry of the page ``table``."""

    def __init__(self, l1: L1, table: int, pdpt: str) -> None:
        self.l1, self.data, self.table = l1, l1.alloc(), table
        directory = l1.alloc()
        l1.write_int(directory, table | PRESENT)
        l1.write_int(l1.sym(pdpt) + 16, directory | PRESENT)

    def check(self, name: str, offset: int, run: Callable[..., Outcome]) -> None:
        """Execute the instruction twice: RAX and the operand are right each time."""
        form = FORMS[name]
        for old in (0x1122334455667788, 0x99AABBCCDDEEFF00):
            self.l1.write_int(self.data + offset, old)
            seen = run(form.code, regs={"rdi": PAGE + offset, "rax": RAX})
            assert seen == Succeed()
            assert seen.regs["rax"] == form.rax(old)
            assert self.l1.read_int(self.data + offset) == form.operand(old)


def check_alternate(l1: L1, form: str, offset: int, touched: bool) -> None:
    """Use a page as L2's EPT page directory and as L1's page table, in turn."""
    window = Window(Guest(l1, ept=True))
    mapping = Mapping(l1, window.entry(2) & ~0xFFF, "l1_pml4_pdpt")
    l1.write_int(mapping.table + OFFSET, mapping.data | PRESENT)
    if touched:
        assert l1.call(FORMS["MOV-load"].code, regs={"rdi": mapping.table}) == Succeed()
    for _ in range(3):
        assert window.access(Access.READ) == Succeed()
        mapping.check(form, offset, l1.call)


@each_operand
@pytest.mark.parametrize("touched", [False, True], ids=["fresh", "touched"])
@pytest.mark.needs(Proc2Ctl.ENABLE_EPT)
def test_page_table_that_is_also_an_ept_table(
    l1: L1, form: str, offset: int, touched: bool
) -> None:
    """L1 uses one page as its page table and as an EPT page directory of L2, in turn.

    ``touched``: L1 has read the page before, so that KVM maps it for L1 when it protects it.
    """
    check_alternate(l1, form, offset, touched)


@pytest.mark.needs(Proc2Ctl.ENABLE_EPT)
def test_locked_instruction_through_such_a_table(l1: L1) -> None:
    """The same for XCHG, which KVM emulates by a compare-and-exchange: it comes to an end."""
    check_alternate(l1, "XCHG", OFFSET, touched=True)


@each_operand
@pytest.mark.parametrize("level", ["L1", "L2"])
def test_read_only_page_table(l1: L1, form: str, offset: int, level: str) -> None:
    """The page table lies in a read-only memory slot, its flags set: nothing writes to it."""
    rom = Memory(4096)
    address = 1 << 32
    l1.vm.add_memory(1, address, rom, read_only=True)
    mapping = Mapping(l1, address, "l1_pml4_pdpt" if level == "L1" else "l2_pml4_pdpt")
    entry = (mapping.data | PRESENT | USED).to_bytes(8, "little")
    rom.write(OFFSET, entry)
    if level == "L1":
        l1.enter_vmx()
        mapping.check(form, offset, l1.call)
    else:
        guest = Guest(l1, ept=False)
        mapping.check(form, offset, lambda code, regs: guest.run(code, regs))
    assert rom.read(OFFSET, 8) == entry
