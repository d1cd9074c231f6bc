"""EPT misconfigurations: settings of EPT entries that are not allowed, per level."""

from __future__ import annotations

import pytest

from kvmnest.l1 import L1
from kvmnest.suite.support.entries import address_bits
from kvmnest.suite.support.ept import (
    ACCESSED,
    DIRTY,
    LARGE,
    RWX,
    WRITE_BACK,
    Access,
    R,
    W,
    Window,
    X,
)
from kvmnest.suite.support.guest import Guest
from kvmnest.vmx import EptVpidCap, ExitReason, Proc2Ctl
from kvmnest.vmx.outcome import Exit, Succeed

pytestmark = [
    pytest.mark.series(19),
    pytest.mark.sdm("EPT Misconfigurations"),
    pytest.mark.needs(Proc2Ctl.ENABLE_EPT),
]

OFFSET = 0x128
LEVELS = pytest.mark.parametrize("level", [1, 2, 3, 4], ids=["PTE", "PDE", "PDPTE", "PML4E"])
SIZES = {2: EptVpidCap.PAGE_2MB, 3: EptVpidCap.PAGE_1GB}
LARGE_LEVELS = pytest.mark.parametrize(
    "level",
    [
        pytest.param(level, id=name, marks=pytest.mark.needs(SIZES[level]))
        for level, name in ((2, "2MiB"), (3, "1GiB"))
    ],
)


def _window(l1: L1, level: int) -> tuple[Window, int]:
    """A window, and the level asked for or the highest one that is the window's alone."""
    window = Window(Guest(l1, ept=True))
    return window, min(level, window.levels[-1])


def expect_misconfigured(window: Window, level: int, entries: dict[str, int]) -> None:
    """Assert that each entry is a misconfiguration for every access, and the old one still good."""
    good = window.get(level)
    for text, entry in entries.items():
        window.set(level, entry)
        window.invalidate()
        for kind in Access:
            seen = window.access(kind, OFFSET)
            assert seen == window.misconfiguration(kind, OFFSET), f"{text}, {kind}"
    window.set(level, good)
    window.invalidate()
    for kind in Access:
        assert window.access(kind, OFFSET) == Succeed()


@LEVELS
def test_write_without_read(l1: L1, level: int) -> None:
    """Bits 2:0 equal to 010 or 110 at any level."""
    window, level = _window(l1, level)
    base = window.get(level) & ~RWX
    expect_misconfigured(window, level, {"write-only": base | W, "write and execute": base | W | X})


@LEVELS
def test_execute_only_without_capability(l1: L1, level: int) -> None:
    """Bits 2:0 equal to 100 where IA32_VMX_EPT_VPID_CAP does not report execute-only."""
    cap = l1.vcpu.get_msrs([0x48C])[0x48C]
    # Taking the capability away is the host's choice, before VMX operation.
    assert l1.vcpu.set_msrs({0x48C: cap & ~EptVpidCap.EXECUTE_ONLY}) == 1
    window, level = _window(l1, level)
    expect_misconfigured(window, level, {"execute-only": window.get(level) & ~RWX | X})


@LEVELS
@pytest.mark.sdm("EPT Translation Mechanism")
def test_reserved_address_bits(l1: L1, level: int) -> None:
    """Address bits from the physical-address width up to 51 are reserved at every level."""
    physical, _ = address_bits(l1)
    window, level = _window(l1, level)
    entry = window.get(level)
    expect_misconfigured(
        window, level, {f"bit {bit}": entry | 1 << bit for bit in range(physical, 52)}
    )


@pytest.mark.parametrize("level", [2, 3, 4], ids=["PDE", "PDPTE", "PML4E"])
@pytest.mark.sdm("EPT Translation Mechanism")
def test_reserved_low_bits(l1: L1, level: int) -> None:
    """Bits 6:3 of an entry that names a table are reserved; so is bit 7 of a PML4 entry."""
    window, level = _window(l1, level)
    entry = window.get(level)
    bits = [3, 4, 5, 6] + [7] * (level == 4)
    expect_misconfigured(window, level, {f"bit {bit}": entry | 1 << bit for bit in bits})


@pytest.mark.parametrize("kind", [2, 3, 7], ids=lambda kind: f"type{kind}")
def test_memory_type(l1: L1, kind: int) -> None:
    """Memory types 2, 3 and 7 of a leaf are reserved."""
    window, level = _window(l1, 1)
    expect_misconfigured(window, level, {f"type {kind}": window.page | kind << 3 | RWX})


def test_memory_types_that_are_valid(l1: L1) -> None:
    """Uncacheable, write-combining, write-through, write-protected and write-back all work."""
    window, level = _window(l1, 1)
    for kind in (0, 1, 4, 5, 6):
        for ignore_pat in (0, 1 << 6):
            window.set(level, window.page | kind << 3 | ignore_pat | RWX)
            window.invalidate()
            for access in Access:
                assert window.access(access, OFFSET) == Succeed(), f"type {kind} {access}"


@LARGE_LEVELS
def test_large_page_memory_type(l1: L1, level: int) -> None:
    """The memory type of a large page has the same reserved values."""
    window, level = _window(l1, level)
    entries = {f"type {kind}": LARGE | kind << 3 | RWX for kind in (2, 3, 7)}
    expect_misconfigured(window, level, entries)


@LARGE_LEVELS
@pytest.mark.sdm("EPT Translation Mechanism")
def test_large_page_reserved_bits(l1: L1, level: int) -> None:
    """Address bits inside a large page are reserved, from bit 12 up."""
    window, level = _window(l1, level)
    last = 21 if level == 2 else 30
    entry = LARGE | WRITE_BACK | RWX
    expect_misconfigured(window, level, {f"bit {bit}": entry | 1 << bit for bit in range(12, last)})


@LARGE_LEVELS
def test_large_page_without_capability(l1: L1, level: int) -> None:
    """Bit 7 is reserved where IA32_VMX_EPT_VPID_CAP does not report pages of that size."""
    cap = l1.vcpu.get_msrs([0x48C])[0x48C]
    without = EptVpidCap.PAGE_1GB if level == 3 else EptVpidCap.PAGE_2MB | EptVpidCap.PAGE_1GB
    assert l1.vcpu.set_msrs({0x48C: cap & ~without}) == 1
    # The one-to-one tables of the payload use large pages above RAM: nothing accesses them.
    window, level = _window(l1, level)
    expect_misconfigured(window, level, {"large page": LARGE | WRITE_BACK | RWX})


@LEVELS
@pytest.mark.sdm("EPT Translation Mechanism")
def test_ignored_bits(l1: L1, level: int) -> None:
    """Ignored bits may have any value: 11:8 without A/D flags, 62:52, and 7:6 of a PTE."""
    window, level = _window(l1, level)
    entry = window.get(level)
    bits = [8, 9, 11, *range(52, 57), 59, 62]
    if level == 1:
        bits += [7]
    for bit in bits:
        window.set(level, entry | 1 << bit)
        window.invalidate()
        for kind in Access:
            assert window.access(kind, OFFSET) == Succeed(), f"bit {bit}, {kind}"


@LEVELS
def test_not_present_is_no_misconfiguration(l1: L1, level: int) -> None:
    """With bits 2:0 clear nothing else is looked at: an EPT violation."""
    physical, _ = address_bits(l1)
    window, level = _window(l1, level)
    garbage = {"all ones": (1 << 64) - 1 & ~RWX, "type": 7 << 3, "address": 1 << physical}
    garbage["flags"] = LARGE | ACCESSED | DIRTY | 0x78
    for text, entry in garbage.items():
        window.set(level, entry)
        window.invalidate()
        for kind in Access:
            seen = window.access(kind, OFFSET)
            assert seen == window.violation(kind, 0, OFFSET), f"{text}, {kind}"


def test_misconfiguration_beats_violation(l1: L1) -> None:
    """An entry that is misconfigured and forbids the access is a misconfiguration."""
    window, level = _window(l1, 1)
    entry = window.page | 2 << 3
    expect_misconfigured(window, level, {"read-only": entry | R, "not executable": entry | R | W})


def test_violation_above_a_misconfiguration(l1: L1) -> None:
    """A walk that ends at an absent entry does not reach the misconfigured one below."""
    window, _ = _window(l1, 1)
    window.set(1, window.page | W)
    window.allow(2, 0)
    window.invalidate()
    for kind in Access:
        assert window.access(kind, OFFSET) == window.violation(kind, 0, OFFSET)
    window.allow(2, R)
    window.invalidate()
    for kind in Access:
        assert window.access(kind, OFFSET) == window.misconfiguration(kind, OFFSET)


def test_repaired_without_invept(l1: L1) -> None:
    """Nothing of a misconfigured entry is cached: once repaired it works without INVEPT."""
    window, _ = _window(l1, 1)
    for kind in Access:
        window.set(1, window.page | 7 << 3 | RWX)
        window.invalidate()
        assert window.access(kind, OFFSET) == window.misconfiguration(kind, OFFSET)
        window.set(1, window.page | WRITE_BACK | RWX)
        assert window.guest.go_on() == Succeed()


@pytest.mark.sdm("Basic VM-Exit Information")
def test_exit_qualification_is_cleared(l1: L1) -> None:
    """An EPT misconfiguration defines no exit qualification: it is 0, after a violation too."""
    window, _ = _window(l1, 1)
    window.allow(1, 0)
    window.invalidate()
    assert window.access(Access.WRITE) == window.violation(Access.WRITE, 0)
    window.set(1, window.page | W)
    window.invalidate()
    seen = window.access(Access.WRITE)
    assert seen == Exit(ExitReason.EPT_MISCONFIG, qualification=0, physical=window.gpa)
