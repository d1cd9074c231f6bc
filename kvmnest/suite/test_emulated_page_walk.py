"""KVM's emulator walks L2's page tables through L1's EPT, and sets flags in them, as a CPU does."""

from __future__ import annotations

import pytest

from kvmnest.l1 import L1
from kvmnest.suite.support.emulation import forced
from kvmnest.suite.support.ept import (
    VALUE,
    WRITE_BACK,
    Access,
    R,
    W,
    Window,
    X,
    identity_entry,
    poke,
    qualification,
)
from kvmnest.suite.support.guest import NOT_VALID, Guest, Masked
from kvmnest.vmx import ExitReason, Proc2Ctl
from kvmnest.vmx.outcome import Exit, Outcome, Succeed

__all__ = ["forced"]

pytestmark = [
    pytest.mark.series(19),
    pytest.mark.sdm("Exit Qualification for EPT Violations"),
    pytest.mark.needs(Proc2Ctl.ENABLE_EPT),
]

ACCESSED, DIRTY = 1 << 5, 1 << 6
OFFSET = 0x128
READ_ONLY = pytest.mark.parametrize("rights", [R, R | X], ids=["r", "rx"])


class _Walk:
    """L2's accesses of a window whose guest page table has ``rights`` in EPT."""

    def __init__(self, l1: L1, prefix: bytes, rights: int, missing: int = 0) -> None:
        self.window = Window(Guest(l1, ept=True))
        self.l1, self.prefix = l1, prefix
        self.table = self.window.guest_page_table()
        poke(l1, self.table, l1.read_int(self.table) & ~missing)
        self.allow(rights)

    def allow(self, rights: int) -> None:
        poke(self.l1, identity_entry(self.l1, self.table), self.table | WRITE_BACK | rights)
        self.window.invalidate()

    def access(self, kind: Access) -> Outcome:
        regs = {"rdi": self.window.linear + OFFSET, "rax": VALUE}
        return self.window.guest.run(self.prefix + kind.value[1], regs)

    def violation(self, known: Masked) -> Exit:
        return Exit(
            ExitReason.EPT_VIOLATION,
            qualification=known,
            rip=self.window.guest.at(len(self.prefix)),
            intr_info=NOT_VALID,
            idt_info=NOT_VALID,
            physical=self.table,
        )


@READ_ONLY
@pytest.mark.parametrize(
    ("kind", "missing"),
    [
        pytest.param(Access.READ, 0, id="read"),
        pytest.param(Access.READ, DIRTY, id="read-of-clean"),
        pytest.param(Access.WRITE, 0, id="write"),
    ],
)
def test_no_flag_to_set(l1: L1, forced: bytes, rights: int, kind: Access, missing: int) -> None:
    """While no flag has to be set, the page of a guest's table need not be writable in EPT."""
    walk = _Walk(l1, forced, rights, missing)
    assert walk.access(kind) == Succeed()
    assert l1.read_int(walk.table) & (ACCESSED | DIRTY) == (ACCESSED | DIRTY) & ~missing


@READ_ONLY
@pytest.mark.parametrize(
    ("kind", "missing"),
    [
        pytest.param(Access.READ, ACCESSED, id="read-accessed"),
        pytest.param(Access.WRITE, ACCESSED, id="write-accessed"),
        pytest.param(Access.WRITE, DIRTY, id="write-dirty"),
        pytest.param(Access.WRITE, ACCESSED | DIRTY, id="write-both"),
    ],
)
def test_flag_to_set(l1: L1, forced: bytes, rights: int, kind: Access, missing: int) -> None:
    """A flag that has to be set is a write of the table's page, which EPT must allow."""
    walk = _Walk(l1, forced, rights, missing)
    known = qualification(W, rights, translated=False, undefined=R)
    assert walk.access(kind) == walk.violation(known)
    assert l1.read_int(walk.table) & missing == 0
    walk.allow(R | W)
    assert walk.access(kind) == Succeed()
    assert l1.read_int(walk.table) & missing == missing


def test_absent_table(l1: L1, forced: bytes) -> None:
    """A table's page that EPT does not map violates as a read, with nothing translated yet."""
    walk = _Walk(l1, forced, 0)
    known = qualification(R, 0, translated=False, undefined=W)
    for kind in (Access.READ, Access.WRITE):
        assert walk.access(kind) == walk.violation(known)


@pytest.mark.sdm("Guest-Linear Address")
@pytest.mark.parametrize("kind", [Access.READ, Access.WRITE], ids=lambda kind: kind.name.lower())
@pytest.mark.parametrize("where", ["table", "page"])
def test_linear_address(l1: L1, forced: bytes, where: str, kind: Access) -> None:
    """The exit names the linear address whose translation violates, as bit 7 says."""
    walk = _Walk(l1, forced, 0 if where == "table" else R | W)
    if where == "page":
        walk.window.allow(1, 0)
        walk.window.invalidate()
    seen = walk.access(kind)
    assert seen == Exit(ExitReason.EPT_VIOLATION, linear=walk.window.linear + OFFSET)
