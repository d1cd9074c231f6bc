"""EPT misconfigurations: settings of EPT entries that are not allowed, per level."""

from __future__ import annotations

import pytest

from kvmnest.kvm import Kvm
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
from kvmnest.vmx import EptVpidCap, ExitReason, Msr, Proc2Ctl
from kvmnest.vmx.outcome import Exit, Succeed

pytestmark = [
    pytest.mark.series(19),
    pytest.mark.sdm("EPT Misconfigurations"),
    pytest.mark.needs(Proc2Ctl.ENABLE_EPT),
]

OFFSET = 0x128
SIZES = {2: EptVpidCap.PAGE_2MB, 3: EptVpidCap.PAGE_1GB}


def _window(l1: L1) -> Window:
    return Window(Guest(l1, ept=True))


def _sizes(l1: L1) -> list[int]:
    """Levels whose entries can map large pages."""
    return [level for level, flag in SIZES.items() if l1.caps.supports(flag)]


def expect_misconfigured(window: Window, level: int, entries: dict[str, int]) -> None:
    """Assert that each entry is a misconfiguration for every access, and the old one still good."""
    good = window.get(level)
    for text, entry in entries.items():
        window.set(level, entry)
        window.invalidate()
        for kind in Access:
            seen = window.access(kind, OFFSET)
            what = f"level {level}, {text}, {kind}"
            assert seen == window.misconfiguration(kind, OFFSET), what
    window.set(level, good)
    window.invalidate()
    for kind in Access:
        assert window.access(kind, OFFSET) == Succeed(), f"level {level}, good entry, {kind}"


def _restricted(kvm: Kvm, flags: EptVpidCap) -> L1:
    """An L1 without some bits of IA32_VMX_EPT_VPID_CAP, which the host took away at the start."""
    l1 = L1(kvm)
    value = l1.vcpu.get_msrs([Msr.IA32_VMX_EPT_VPID_CAP])[Msr.IA32_VMX_EPT_VPID_CAP]
    l1.set_feature_msrs({Msr.IA32_VMX_EPT_VPID_CAP: value & ~flags.value})
    return l1


def test_write_without_read(l1: L1) -> None:
    """Bits 2:0 equal to 010 or 110 at any level."""
    window = _window(l1)
    for level in window.levels:
        base = window.get(level) & ~RWX
        expect_misconfigured(window, level, {"w": base | W, "wx": base | W | X})


def test_execute_only_without_capability(kvm: Kvm) -> None:
    """Bits 2:0 equal to 100 where IA32_VMX_EPT_VPID_CAP does not report execute-only."""
    with _restricted(kvm, EptVpidCap.EXECUTE_ONLY) as l1:
        window = _window(l1)
        for level in window.levels:
            expect_misconfigured(window, level, {"x": window.get(level) & ~RWX | X})


@pytest.mark.sdm("EPT Translation Mechanism")
def test_reserved_address_bits(l1: L1) -> None:
    """Address bits from the physical-address width up to 51 are reserved at every level."""
    physical, _ = address_bits(l1)
    window = _window(l1)
    for level in window.levels:
        entry = window.get(level)
        bad = {f"bit {bit}": entry | 1 << bit for bit in range(physical, 52)}
        expect_misconfigured(window, level, bad)


@pytest.mark.sdm("EPT Translation Mechanism")
def test_reserved_low_bits(l1: L1) -> None:
    """Bits 6:3 of an entry that names a table are reserved; so is bit 7 of a PML4 entry."""
    window = _window(l1)
    for level in window.levels[1:]:
        entry = window.get(level)
        bits = [3, 4, 5, 6] + [7] * (level == 4)
        bad = {f"bit {bit}": entry | 1 << bit for bit in bits}
        expect_misconfigured(window, level, bad)


def test_memory_type(l1: L1) -> None:
    """Memory types 2, 3 and 7 of a leaf are reserved, for large pages as well."""
    window = _window(l1)
    bad = {f"type {kind}": kind << 3 | RWX for kind in (2, 3, 7)}
    expect_misconfigured(window, 1, {text: window.page | entry for text, entry in bad.items()})
    for level in _sizes(l1):
        expect_misconfigured(window, level, {text: LARGE | entry for text, entry in bad.items()})


def test_memory_types_that_are_valid(l1: L1) -> None:
    """Uncacheable, write-combining, write-through, write-protected and write-back all work."""
    window = _window(l1)
    for kind in (0, 1, 4, 5, 6):
        for ignore_pat in (0, 1 << 6):
            window.set(1, window.page | kind << 3 | ignore_pat | RWX)
            window.invalidate()
            for access in Access:
                assert window.access(access, OFFSET) == Succeed(), f"type {kind} {access}"


@pytest.mark.sdm("EPT Translation Mechanism")
def test_large_page_reserved_bits(l1: L1) -> None:
    """Address bits inside a large page are reserved, from bit 12 up."""
    window = _window(l1)
    for level in _sizes(l1):
        entry = LARGE | WRITE_BACK | RWX
        bad = {f"bit {bit}": entry | 1 << bit for bit in range(12, 21 if level == 2 else 30)}
        expect_misconfigured(window, level, bad)


@pytest.mark.parametrize("level", [2, 3], ids=["2MiB", "1GiB"])
def test_large_page_without_capability(kvm: Kvm, level: int) -> None:
    """Bit 7 is reserved where IA32_VMX_EPT_VPID_CAP does not report pages of that size."""
    larger = EptVpidCap.PAGE_1GB if level == 3 else EptVpidCap.PAGE_2MB | EptVpidCap.PAGE_1GB
    with _restricted(kvm, larger) as l1:
        # The payload's tables use large pages above RAM, where nothing is accessed.
        expect_misconfigured(_window(l1), level, {"large page": LARGE | WRITE_BACK | RWX})


@pytest.mark.sdm("EPT Translation Mechanism")
def test_ignored_bits(l1: L1) -> None:
    """Ignored bits may have any value: 11:8 and 63:52 without what uses them, and 7 of a PTE.

    All is off that gives them a meaning: accessed and dirty flags, mode-based execute control,
    guest-paging verification, paging-write, shadow stacks, sub-page permissions, #VE.
    """
    window = _window(l1)
    for level in window.levels:
        entry = window.get(level)
        for bit in (*[7] * (level == 1), *range(8, 12), *range(52, 64)):
            window.set(level, entry | 1 << bit)
            window.invalidate()
            for kind in Access:
                what = f"level {level}, bit {bit}, {kind}"
                assert window.access(kind, OFFSET) == Succeed(), what
        window.set(level, entry)


def test_not_present_is_no_misconfiguration(l1: L1) -> None:
    """With bits 2:0 clear nothing else is looked at: an EPT violation."""
    physical, _ = address_bits(l1)
    window = _window(l1)
    garbage = {"ones": (1 << 64) - 1 & ~RWX, "type": 7 << 3, "address": 1 << physical}
    garbage["flags"] = LARGE | ACCESSED | DIRTY | 0x78
    for level in window.levels:
        good = window.get(level)
        for text, entry in garbage.items():
            window.set(level, entry)
            window.invalidate()
            for kind in Access:
                seen = window.access(kind, OFFSET)
                what = f"level {level}, {text}, {kind}"
                assert seen == window.violation(kind, 0, OFFSET), what
        window.set(level, good)


def test_misconfiguration_beats_violation(l1: L1) -> None:
    """An entry that is misconfigured and forbids the access is a misconfiguration."""
    window = _window(l1)
    entry = window.page | 2 << 3
    expect_misconfigured(window, 1, {"read-only": entry | R, "not executable": entry | R | W})


def test_violation_above_a_misconfiguration(l1: L1) -> None:
    """A walk that ends at an absent entry does not reach the misconfigured one below."""
    window = _window(l1)
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
    window = _window(l1)
    for kind in Access:
        window.set(1, window.page | 7 << 3 | RWX)
        window.invalidate()
        assert window.access(kind, OFFSET) == window.misconfiguration(kind, OFFSET)
        window.set(1, window.page | WRITE_BACK | RWX)
        assert window.guest.go_on() == Succeed()


@pytest.mark.sdm("Basic VM-Exit Information")
def test_exit_qualification_is_cleared(l1: L1) -> None:
    """An EPT misconfiguration defines no exit qualification: it is 0, after a violation too."""
    window = _window(l1)
    window.allow(1, 0)
    window.invalidate()
    assert window.access(Access.WRITE) == window.violation(Access.WRITE, 0)
    window.set(1, window.page | W)
    window.invalidate()
    seen = window.access(Access.WRITE)
    assert seen == Exit(ExitReason.EPT_MISCONFIG, qualification=0, physical=window.gpa)
