"""EPT violations: every mix of permissions against every access, and what the exit says."""

from __future__ import annotations

import itertools

import pytest

from kvmnest.l1 import L1
from kvmnest.suite.support.ept import (
    ENABLE_AD,
    FILL,
    LARGE,
    RWX,
    VALUE,
    WRITE_BACK,
    Access,
    R,
    W,
    Window,
    X,
    identity_entry,
    invalidate,
    poke,
    qualification,
    with_linear_rights,
)
from kvmnest.suite.support.guest import NOT_VALID, Guest
from kvmnest.vmx import Efer, EntryCtl, EptVpidCap, ExitReason, Field, Proc2Ctl
from kvmnest.vmx.outcome import Exit, Fault, Outcome, Succeed

pytestmark = [
    pytest.mark.series(19),
    pytest.mark.sdm("EPT Violations"),
    pytest.mark.needs(Proc2Ctl.ENABLE_EPT),
]

#: Permissions that are no misconfiguration; execute-only needs a capability.
MIXES = (0, R, X, R | W, R | X, RWX)
NAMES = {0: "none", R: "r", X: "x", R | W: "rw", R | X: "rx", RWX: "rwx"}
#: A guest paging-structure entry's accessed and dirty flags.
GUEST_ACCESSED, GUEST_DIRTY = 1 << 5, 1 << 6
OFFSET = 0x128


def _mixes(l1: L1) -> list[int]:
    only = l1.caps.supports(EptVpidCap.EXECUTE_ONLY)
    return [mix for mix in MIXES if mix != X or only]


def _expected(window: Window, kind: Access, allowed: int, offset: int = OFFSET) -> Outcome:
    if allowed & kind.bit:
        return Succeed()
    return window.violation(kind, allowed, offset)


def test_permissions(l1: L1) -> None:
    """Each level's permissions decide alike; the exit has access, permissions and addresses."""
    window = Window(Guest(l1, ept=True))
    for level, rights in itertools.product(window.levels, _mixes(l1)):
        window.allow(level, rights)
        window.invalidate()
        for kind in Access:
            seen = window.access(kind, OFFSET)
            text = f"level {level}, {NAMES[rights]}, {kind}"
            assert seen == _expected(window, kind, rights), text
        window.allow(level, RWX)
    assert l1.read(window.page, 4096) == bytes([FILL]) * 4096


@pytest.mark.parametrize(("upper", "lower"), [(2, 1), (3, 2)], ids=["PDE-PTE", "PDPTE-PDE"])
def test_permissions_are_anded(l1: L1, upper: int, lower: int) -> None:
    """The permissions of two levels are combined by AND, in effect and in what is reported."""
    window = Window(Guest(l1, ept=True))
    for first, second in itertools.product(_mixes(l1), repeat=2):
        if not first:
            continue
        window.allow(upper, first)
        window.allow(lower, second)
        window.invalidate()
        for kind in Access:
            seen = window.access(kind, OFFSET)
            text = f"{kind} {NAMES[first]} and {NAMES[second]}"
            assert seen == _expected(window, kind, first & second), text


@pytest.mark.sdm("Operations that Invalidate Cached Mappings")
def test_more_permissions_need_no_invept(l1: L1) -> None:
    """An EPT violation drops the mapping: after L1 allows the access it succeeds at once."""
    window = Window(Guest(l1, ept=True))
    assert window.access(Access.READ) == Succeed()
    changes = [
        (access, before, after)
        for access in Access
        for before, after in ((0, RWX), (RWX & ~access.bit, RWX), (0, access.bit | R))
    ]
    for access, before, after in changes:
        if before & W and not before & R:
            before = X if l1.caps.supports(EptVpidCap.EXECUTE_ONLY) else 0
        window.allow(1, before)
        window.invalidate()
        assert window.access(access, OFFSET) == window.violation(access, before, OFFSET)
        window.allow(1, after)
        assert window.guest.go_on() == Succeed(), f"{access}: {before} -> {after}"


def test_less_permissions_with_invept(l1: L1) -> None:
    """After INVEPT a permission that L1 took away is gone, even where L2 just used it."""
    window = Window(Guest(l1, ept=True))
    for access, fewer in 2 * [(Access.READ, 0), (Access.WRITE, R | X), (Access.FETCH, R | W)]:
        assert window.access(access, OFFSET) == Succeed()
        window.allow(1, fewer)
        window.invalidate()
        assert window.access(access, OFFSET) == window.violation(access, fewer, OFFSET)
        window.allow(1, RWX)
        window.invalidate()


def test_remapping_with_invept(l1: L1) -> None:
    """After INVEPT L2 sees the page that the changed entry names, in a hundred changes."""
    window = Window(Guest(l1, ept=True))
    pages = l1.alloc(4)
    for number in range(4):
        l1.write_int(pages + 4096 * number, number + 1)
    for turn in range(100):
        number = turn * 7 % 4
        window.set(1, pages + 4096 * number | WRITE_BACK | RWX)
        window.invalidate()
        seen = window.access(Access.READ)
        assert seen == Succeed()
        assert seen.regs["rax"] == number + 1


@pytest.mark.needs(EptVpidCap.EXECUTE_ONLY)
@pytest.mark.sdm("EPT Translation Mechanism")
def test_execute_only(l1: L1) -> None:
    """A page with execute permission only can be called, neither read nor written."""
    window = Window(Guest(l1, ept=True))
    window.allow(1, X)
    window.invalidate()
    for offset in (0, 0x7F8, 0xFFF):
        assert window.access(Access.FETCH, offset) == Succeed()
    for kind in (Access.READ, Access.WRITE):
        for offset in (0, 0xFF8):
            assert window.access(kind, offset) == window.violation(kind, X, offset)


@pytest.mark.parametrize("kind", [Access.READ, Access.WRITE], ids=lambda kind: kind.name)
def test_access_across_a_page_end(l1: L1, kind: Access) -> None:
    """The second page of an access is reported with its own addresses; nothing is written."""
    window = Window(Guest(l1, ept=True), pages=2)
    second, offset = window.entry(1) + 8, 0xFFC
    poke(l1, second, 0)
    window.invalidate()
    guest = window.guest
    seen = guest.run(kind.value[1], {"rdi": window.linear + offset, "rax": 0})
    assert seen == Exit(
        ExitReason.EPT_VIOLATION,
        qualification=qualification(kind.bit, 0),
        rip=guest.at(),
        linear=window.linear + 0x1000,
        physical=window.gpa + 0x1000,
    )
    assert l1.read(window.page, 8192) == bytes([FILL]) * 8192
    poke(l1, second, window.page + 4096 | WRITE_BACK | RWX)
    seen = guest.go_on()
    assert seen == Succeed()
    if kind is Access.READ:
        assert seen.regs["rax"] == VALUE
    else:
        assert l1.read(window.page + offset, 8) == bytes(8)


def test_read_modify_write(l1: L1) -> None:
    """An instruction that reads and writes a read-only page: a write, nothing is changed."""
    window = Window(Guest(l1, ept=True))
    window.allow(1, R)
    window.invalidate()
    add = b"\x48\x01\x07"  # ADD [RDI], RAX
    seen = window.guest.run(add, {"rdi": window.linear, "rax": 1})
    # Whether the access counts as a read too is the processor's choice.
    assert seen == Exit(
        ExitReason.EPT_VIOLATION,
        qualification=qualification(W, R, undefined=R),
        rip=window.guest.at(),
        linear=window.linear,
        physical=window.gpa,
    )
    assert l1.read_int(window.page) == VALUE
    window.allow(1, R | W)
    assert window.guest.go_on() == Succeed()
    assert l1.read_int(window.page) == VALUE + 1


def test_instruction_across_a_page_end(l1: L1) -> None:
    """A fetch of an instruction's second half: RIP is its start, the addresses those beyond."""
    window = Window(Guest(l1, ept=True), pages=2)
    l1.write(window.page + 0xFFE, b"\x48\xb8")  # MOV RAX, imm64
    l1.write(window.page + 0x1000, (0x1122334455667788).to_bytes(8, "little"))
    second = window.entry(1) + 8
    poke(l1, second, window.page + 4096 | WRITE_BACK | R | W)
    window.invalidate()
    seen = window.guest.run(b"\xff\xd7", {"rdi": window.linear + 0xFFE})
    assert seen == Exit(
        ExitReason.EPT_VIOLATION,
        qualification=qualification(X, R | W),
        rip=window.linear + 0xFFE,
        linear=window.linear + 0x1000,
        physical=window.gpa + 0x1000,
    )
    poke(l1, second, window.page + 4096 | WRITE_BACK | RWX)
    seen = window.guest.go_on()
    assert seen == Succeed()
    assert seen.regs["rax"] == 0x1122334455667788


@pytest.mark.needs(EptVpidCap.ADVANCED_EXIT_INFO, EntryCtl.LOAD_EFER)
@pytest.mark.sdm("Exit Qualification for EPT Violations")
def test_rights_of_the_linear_address(l1: L1) -> None:
    """Bits 11:9 say what L2's own paging structures allow at the linear address."""
    guest = Guest(l1, EntryCtl.LOAD_EFER, ept=True)
    guest.vmcs[Field.GUEST_IA32_EFER] = guest.vmcs[Field.GUEST_IA32_EFER] | Efer.NXE
    window = Window(guest)
    table = window.guest_page_table()
    window.allow(1, 0)
    for user, writable, no_execute in itertools.product((False, True), repeat=3):
        flags = 0x61 | writable << 1 | user << 2 | no_execute << 63
        poke(l1, table, window.gpa | flags)
        window.invalidate()
        seen = window.access(Access.READ, OFFSET)
        assert (seen.reason, seen.physical) == (ExitReason.EPT_VIOLATION, window.gpa + OFFSET)
        assert seen.qualification == with_linear_rights(
            l1, qualification(R, 0), user=user, writable=writable, no_execute=no_execute
        ), f"user {user}, writable {writable}, no_execute {no_execute}"


# --- accesses to guest paging structures ---


def test_guest_page_walk_read(l1: L1) -> None:
    """A guest paging-structure entry that EPT does not let read: bit 8 clear, its own address."""
    window = Window(Guest(l1, ept=True))
    table = window.guest_page_table()
    entry = identity_entry(l1, table)
    for rights in (0, X) if l1.caps.supports(EptVpidCap.EXECUTE_ONLY) else (0,):
        poke(l1, entry, table | WRITE_BACK | rights)
        window.invalidate()
        for kind in Access:
            seen = window.access(kind, 0x5128)
            assert seen == Exit(
                ExitReason.EPT_VIOLATION,
                qualification=qualification(R, rights, translated=False),
                rip=window.linear + 0x5128 if kind is Access.FETCH else window.guest.at(),
                intr_info=NOT_VALID,
                idt_info=NOT_VALID,
                linear=window.linear + 0x5128,
                physical=table + 8 * 5,
            ), f"{kind} {NAMES[rights]}"


@pytest.mark.parametrize("rights", [R, R | X], ids=lambda rights: NAMES[rights])
@pytest.mark.parametrize(
    ("kind", "missing"),
    [
        pytest.param(Access.READ, GUEST_ACCESSED, id="read-accessed"),
        pytest.param(Access.FETCH, GUEST_ACCESSED, id="fetch-accessed"),
        pytest.param(Access.WRITE, GUEST_ACCESSED, id="write-accessed"),
        pytest.param(Access.WRITE, GUEST_DIRTY, id="write-dirty"),
        pytest.param(Access.WRITE, GUEST_ACCESSED | GUEST_DIRTY, id="write-both"),
    ],
)
def test_guest_page_walk_sets_flags(l1: L1, rights: int, kind: Access, missing: int) -> None:
    """Setting a guest entry's flag is a write: it violates if the table's page is read-only."""
    window = Window(Guest(l1, ept=True))
    table = window.guest_page_table()
    poke(l1, identity_entry(l1, table), table | WRITE_BACK | rights)
    window.invalidate()
    # With the flags set already the processor does not write; nor does it set one in vain.
    for usual in Access:
        assert window.access(usual, OFFSET) == Succeed()
    poke(l1, table, l1.read_int(table) & ~GUEST_DIRTY)
    window.invalidate()
    for reading in (Access.READ, Access.FETCH):
        assert window.access(reading, OFFSET) == Succeed()
    poke(l1, table, (l1.read_int(table) | GUEST_ACCESSED | GUEST_DIRTY) & ~missing)
    window.invalidate()
    seen = window.access(kind, OFFSET)
    assert seen == Exit(
        ExitReason.EPT_VIOLATION,
        qualification=qualification(W, rights, translated=False, undefined=R),
        rip=window.linear + OFFSET if kind is Access.FETCH else window.guest.at(),
        intr_info=NOT_VALID,
        idt_info=NOT_VALID,
        linear=window.linear + OFFSET,
        physical=table,
    )
    assert l1.read_int(table) & missing == 0
    poke(l1, identity_entry(l1, table), table | WRITE_BACK | R | W)
    assert window.guest.go_on() == Succeed()
    assert l1.read_int(table) & missing == missing


@pytest.mark.needs(EptVpidCap.ACCESSED_DIRTY)
@pytest.mark.sdm("Accessed and Dirty Flags for EPT")
def test_guest_page_walk_with_accessed_dirty(l1: L1) -> None:
    """With accessed and dirty flags for EPT each access to a guest entry is a write and read."""
    window = Window(Guest(l1, ept=True))
    window.guest.vmcs.set_bits(Field.EPT_POINTER, ENABLE_AD)
    table = window.guest_page_table()
    for rights in (0, R, R | X):
        poke(l1, identity_entry(l1, table), table | WRITE_BACK | rights)
        window.invalidate()
        assert window.access(Access.READ, OFFSET) == Exit(
            ExitReason.EPT_VIOLATION,
            qualification=qualification(R | W, rights, translated=False),
            rip=window.guest.at(),
            linear=window.linear + OFFSET,
            physical=table,
        ), NAMES[rights]
    poke(l1, identity_entry(l1, table), table | WRITE_BACK | R | W)
    window.invalidate()
    assert window.access(Access.READ, OFFSET) == Succeed()


def test_guest_page_fault_comes_first(l1: L1) -> None:
    """What the guest's own tables forbid gives a page fault; EPT is not asked for the page."""
    window = Window(Guest(l1, ept=True))
    table = window.guest_page_table()
    window.allow(1, 0)
    poke(l1, table, 0)
    window.invalidate()
    at = window.linear + OFFSET
    assert window.access(Access.READ, OFFSET) == Fault(14, error_code=0, cr2=at, rip=0)
    assert window.access(Access.WRITE, OFFSET) == Fault(14, error_code=2, cr2=at, rip=0)


# --- large pages ---


@pytest.mark.parametrize(
    "level",
    [
        pytest.param(2, id="2MiB", marks=pytest.mark.needs(EptVpidCap.PAGE_2MB)),
        pytest.param(3, id="1GiB", marks=pytest.mark.needs(EptVpidCap.PAGE_1GB)),
    ],
)
@pytest.mark.sdm("EPT Translation Mechanism")
def test_large_page(l1: L1, level: int) -> None:
    """A large page translates each address in it and has the permissions of a small one."""
    window = Window(Guest(l1, ept=True))
    base = 0x200000 if level == 2 else 0
    for rights in _mixes(l1):
        window.set(level, base | LARGE | WRITE_BACK | rights)
        window.invalidate()
        for target in (window.page, window.page + 0xFF8):
            # A page of the second 2 MiB for the one size, of all RAM for the other.
            where = base + target % 0x200000
            l1.write(where, bytes([FILL]) * 8)
            for kind in Access:
                offset = where - base
                seen = window.access(kind, offset)
                text = f"{kind} {NAMES[rights]}"
                assert seen == _expected(window, kind, rights, offset), text
    invalidate(window.guest)
