"""Accessed and dirty flags for EPT, and the page-modification log that follows the latter."""

from __future__ import annotations

import pytest

from kvmnest.l1 import L1
from kvmnest.suite.support.ept import (
    ACCESSED,
    DIRTY,
    ENABLE_AD,
    LARGE,
    RWX,
    WRITE_BACK,
    Access,
    R,
    Window,
    X,
    identity_entry,
    poke,
    preset_flags,
)
from kvmnest.suite.support.guest import Guest, Masked
from kvmnest.vmx import EptVpidCap, ExitReason, Field, Proc2Ctl
from kvmnest.vmx.outcome import Exit, Succeed

pytestmark = [
    pytest.mark.series(19),
    pytest.mark.sdm("Accessed and Dirty Flags for EPT"),
    pytest.mark.needs(Proc2Ctl.ENABLE_EPT, EptVpidCap.ACCESSED_DIRTY),
]

OFFSET = 0x128
FLAGS = ACCESSED | DIRTY
PML_SDM = "Page-Modification Logging"
PML_ENTRIES = 512


def _window(l1: L1, *flags: Proc2Ctl, enabled: bool = True, pages: int = 1) -> Window:
    """A window with no flag set in its entries, all flags set in the other tables."""
    preset_flags(l1)
    guest = Guest(l1, *flags, ept=True)
    if enabled:
        guest.vmcs.set_bits(Field.EPT_POINTER, ENABLE_AD)
    return Window(guest, pages=pages)


def _flags(window: Window) -> dict[int, int]:
    return {level: window.get(level) & FLAGS for level in window.levels}


def _expected(window: Window, leaf: int, level: int = 1) -> dict[int, int]:
    """The accessed flag in every entry of the walk, the dirty flag in the leaf alone."""
    return {n: leaf if n == level else ACCESSED for n in window.levels if n >= level}


@pytest.mark.parametrize("kind", list(Access), ids=lambda kind: kind.name)
def test_flags_are_set(l1: L1, kind: Access) -> None:
    """The accessed flag is set in each entry used, the dirty flag by a write and in the leaf."""
    window = _window(l1)
    assert _flags(window) == dict.fromkeys(window.levels, 0)
    assert window.access(kind, OFFSET) == Succeed()
    leaf = FLAGS if kind is Access.WRITE else ACCESSED
    assert _flags(window) == _expected(window, leaf)
    # Once set they stay, and nothing else in the entries changed.
    assert window.access(kind, OFFSET) == Succeed()
    assert _flags(window) == _expected(window, leaf)
    assert window.get(1) & ~FLAGS == window.page | WRITE_BACK | RWX


def test_disabled(l1: L1) -> None:
    """With bit 6 of the EPTP clear no flag is set."""
    window = _window(l1, enabled=False)
    for kind in Access:
        assert window.access(kind, OFFSET) == Succeed()
        assert _flags(window) == dict.fromkeys(window.levels, 0), kind


def test_read_then_write(l1: L1) -> None:
    """A page that was read gets its dirty flag by the first write."""
    window = _window(l1)
    assert window.access(Access.READ) == Succeed()
    assert window.get(1) & FLAGS == ACCESSED
    assert window.access(Access.WRITE) == Succeed()
    assert window.get(1) & FLAGS == FLAGS


def test_flags_cleared_by_l1_are_set_again(l1: L1) -> None:
    """After L1 clears a flag and executes INVEPT, the next access sets it again."""
    window = _window(l1)
    for _ in range(5):
        assert window.access(Access.WRITE) == Succeed()
        assert window.get(1) & FLAGS == FLAGS
        window.set(1, window.get(1) & ~DIRTY)
        window.invalidate()
        assert window.access(Access.READ) == Succeed()
        assert window.get(1) & FLAGS == ACCESSED
        assert window.access(Access.WRITE) == Succeed()
        assert window.get(1) & FLAGS == FLAGS
        for level in window.levels:
            window.set(level, window.get(level) & ~FLAGS)
        window.invalidate()
        assert window.access(Access.FETCH) == Succeed()
        assert _flags(window) == _expected(window, ACCESSED)


def test_violation_sets_no_dirty_flag(l1: L1) -> None:
    """A write that EPT forbids does not make the page dirty; allowed then, it does."""
    window = _window(l1)
    window.allow(1, R | X)
    window.invalidate()
    assert window.access(Access.WRITE, OFFSET) == window.violation(Access.WRITE, R | X, OFFSET)
    assert not window.get(1) & DIRTY
    window.allow(1, RWX)
    assert window.guest.go_on() == Succeed()
    assert window.get(1) & FLAGS == FLAGS


@pytest.mark.parametrize(
    "level",
    [
        pytest.param(2, id="2MiB", marks=pytest.mark.needs(EptVpidCap.PAGE_2MB)),
        pytest.param(3, id="1GiB", marks=pytest.mark.needs(EptVpidCap.PAGE_1GB)),
    ],
)
def test_large_page(l1: L1, level: int) -> None:
    """The leaf with the dirty flag is the entry that maps the large page."""
    window = _window(l1)
    base = 0x200000 if level == 2 else 0
    offset = window.page % 0x200000
    l1.write(base + offset, b"\xc3" * 8)
    window.set(level, base | LARGE | WRITE_BACK | RWX)
    window.invalidate()
    for kind, leaf in ((Access.READ, ACCESSED), (Access.WRITE, FLAGS)):
        assert window.access(kind, offset) == Succeed()
        walked = {n: flags for n, flags in _flags(window).items() if n >= level}
        assert walked == _expected(window, leaf, level)
    assert window.get(1) & FLAGS == 0


def test_guest_paging_structures(l1: L1) -> None:
    """An access to a guest paging-structure entry counts as a write to its page."""
    window = _window(l1)
    table = window.guest_page_table()
    entry = identity_entry(l1, table)
    for kind in (Access.READ, Access.FETCH):
        poke(l1, entry, table | WRITE_BACK | RWX)
        window.invalidate()
        assert window.access(kind, OFFSET) == Succeed()
        assert l1.read_int(entry) & FLAGS == FLAGS
        assert window.get(1) & FLAGS == ACCESSED


# --- page-modification logging ---


def _logging(l1: L1, *, index: int = PML_ENTRIES - 1, pages: int = 1) -> Window:
    window = _window(l1, Proc2Ctl.ENABLE_PML, pages=pages)
    window.guest.vmcs[Field.PML_ADDRESS] = l1.sym("pml_log")
    window.guest.vmcs[Field.GUEST_PML_INDEX] = index
    l1.write(l1.sym("pml_log"), b"\xa5" * 4096)
    return window


def _log(l1: L1) -> dict[int, int]:
    entries = [l1.read_int(l1.sym("pml_log") + 8 * n) for n in range(PML_ENTRIES)]
    return {n: entry for n, entry in enumerate(entries) if entry != 0xA5A5A5A5A5A5A5A5}


@pytest.mark.needs(Proc2Ctl.ENABLE_PML)
@pytest.mark.sdm(PML_SDM)
def test_log_of_writes(l1: L1) -> None:
    """Each write that sets a dirty flag logs its page, from the given index downwards."""
    window = _logging(l1, pages=6)
    order = (3, 0, 5, 1)
    for page in (*order, 3, 0):
        assert window.access(Access.WRITE, 4096 * page + 0x7F8) == Succeed()
    logged = [window.gpa + 4096 * page for page in order]
    assert _log(l1) == {PML_ENTRIES - 1 - n: gpa for n, gpa in enumerate(logged)}
    assert l1.vmread(Field.GUEST_PML_INDEX) == Succeed(PML_ENTRIES - 1 - len(order))


@pytest.mark.needs(Proc2Ctl.ENABLE_PML)
@pytest.mark.sdm(PML_SDM)
def test_no_log_without_a_write(l1: L1) -> None:
    """Accesses that set no dirty flag are not logged."""
    window = _logging(l1)
    for kind in (Access.FETCH, Access.READ):
        assert window.access(kind) == Succeed()
        assert window.get(1) & FLAGS == ACCESSED
    assert _log(l1) == {}
    assert l1.vmread(Field.GUEST_PML_INDEX) == Succeed(PML_ENTRIES - 1)


@pytest.mark.needs(Proc2Ctl.ENABLE_PML)
@pytest.mark.sdm(PML_SDM)
def test_no_log_while_disabled(l1: L1) -> None:
    """Without the control nothing is logged, and the index is left alone."""
    window = _logging(l1)
    window.guest.off(Proc2Ctl.ENABLE_PML)
    assert window.access(Access.WRITE) == Succeed()
    assert window.get(1) & FLAGS == FLAGS
    assert _log(l1) == {}
    assert l1.vmread(Field.GUEST_PML_INDEX) == Succeed(PML_ENTRIES - 1)


@pytest.mark.needs(Proc2Ctl.ENABLE_PML)
@pytest.mark.sdm(PML_SDM)
def test_log_of_guest_paging_structures(l1: L1) -> None:
    """A guest page table whose EPT dirty flag the page walk sets is logged before the page."""
    window = _logging(l1)
    table = window.guest_page_table()
    poke(l1, identity_entry(l1, table), table | WRITE_BACK | RWX)
    window.invalidate()
    assert window.access(Access.WRITE, OFFSET) == Succeed()
    assert _log(l1) == {511: table, 510: window.gpa}
    assert l1.vmread(Field.GUEST_PML_INDEX) == Succeed(509)


@pytest.mark.needs(Proc2Ctl.ENABLE_PML)
@pytest.mark.sdm(PML_SDM)
@pytest.mark.parametrize("index", [512, 0xFFFF], ids=hex)
def test_full(l1: L1, index: int) -> None:
    """An index above 511: the write exits before the dirty flag, the log or memory change."""
    window = _logging(l1, index=index)
    guest = window.guest
    seen = guest.run(Access.WRITE.value[1], {"rdi": window.linear, "rax": 0})
    # Only bit 12 (NMI unblocking due to IRET) is defined.
    assert seen == guest.exit(ExitReason.PML_FULL, qualification=Masked(0, 1 << 12))
    assert _log(l1) == {}
    assert not window.get(1) & DIRTY
    assert l1.read(window.page, 8) == b"\xc3" * 8
    assert l1.vmread(Field.GUEST_PML_INDEX) == Succeed(index)
    guest.vmcs[Field.GUEST_PML_INDEX] = 7
    assert guest.go_on() == Succeed()
    assert _log(l1) == {7: window.gpa}
    assert l1.vmread(Field.GUEST_PML_INDEX) == Succeed(6)
    assert l1.read(window.page, 8) == bytes(8)


@pytest.mark.needs(Proc2Ctl.ENABLE_PML)
@pytest.mark.sdm(PML_SDM)
def test_log_runs_full(l1: L1) -> None:
    """After entry 0 the index wraps to 0xffff; what needs no new flag still works."""
    window = _logging(l1, index=1, pages=4)
    for page in (0, 1):
        assert window.access(Access.WRITE, 4096 * page) == Succeed()
    assert l1.vmread(Field.GUEST_PML_INDEX) == Succeed(0xFFFF)
    assert _log(l1) == {1: window.gpa, 0: window.gpa + 4096}
    assert window.access(Access.WRITE, 8) == Succeed()
    assert window.access(Access.READ, 4096 + 8) == Succeed()
    seen = window.access(Access.WRITE, 4096 * 3)
    assert seen == Exit(ExitReason.PML_FULL, rip=window.guest.at())
    assert _log(l1) == {1: window.gpa, 0: window.gpa + 4096}


@pytest.mark.needs(Proc2Ctl.ENABLE_PML)
@pytest.mark.sdm(PML_SDM)
@pytest.mark.parametrize("kind", [Access.READ, Access.FETCH], ids=lambda kind: kind.name)
def test_full_log_at_an_accessed_flag(l1: L1, kind: Access) -> None:
    """An accessed flag that has to be set needs room in the log as well, and is not set."""
    window = _logging(l1, index=0xFFFF)
    seen = window.access(kind, OFFSET)
    rip = window.linear + OFFSET if kind is Access.FETCH else window.guest.at()
    assert seen == Exit(ExitReason.PML_FULL, rip=rip)
    assert not window.get(1) & ACCESSED
    assert _log(l1) == {}
