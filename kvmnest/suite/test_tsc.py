"""The time-stamp counter in L2: offset, multiplier, and that it never goes back."""

from __future__ import annotations

import pytest

from kvmnest.kvm import Cap
from kvmnest.l1 import L1, code
from kvmnest.suite.support.bitmaps import set_msr_bitmap
from kvmnest.suite.support.guest import Guest
from kvmnest.vmx import Msr, Proc2Ctl, ProcCtl
from kvmnest.vmx.outcome import HostExit, Outcome, Succeed

pytestmark = [
    pytest.mark.series(16),
    pytest.mark.sdm("Changes to Instruction Behavior in VMX Non-Root Operation"),
]

MASK = (1 << 64) - 1
#: RDTSC twice: first into RSI (high) and RDI (low), then RDX:RAX.
TWICE = code.RDTSC + b"\x89\xc7\x89\xd6" + code.RDTSC
OFFSETS = (0, 1, 1 << 40, -(1 << 40) & MASK, 1 << 63, 0x123456789ABCDEF0)


def _between(l1: L1, guest: Guest, **fields: int) -> tuple[int, int, int, int]:
    """L1's counter before, two readings of L2, L1's counter after."""
    before = l1.rdtsc()
    seen = guest.run(TWICE, **fields)
    after = l1.rdtsc()
    assert seen == Succeed()
    first: int = (seen.regs["rsi"] & 0xFFFFFFFF) << 32 | seen.regs["rdi"] & 0xFFFFFFFF
    return int(before.value), first, _edx_eax(seen), int(after.value)


def _edx_eax(seen: Outcome) -> int:
    low = int(seen.regs["rax"]) & 0xFFFFFFFF
    return (int(seen.regs["rdx"]) & 0xFFFFFFFF) << 32 | low


def test_without_an_offset(l1: L1) -> None:
    """Without TSC offsetting L2 reads L1's counter, whatever the offset field holds."""
    guest = Guest(l1)
    for offset in OFFSETS:
        before, first, second, after = _between(l1, guest, TSC_OFFSET=offset)
        assert before < first < second < after, hex(offset)


@pytest.mark.needs(ProcCtl.USE_TSC_OFFSETTING)
def test_offset(l1: L1) -> None:
    """With it the offset is added, modulo 2^64."""
    guest = Guest(l1, ProcCtl.USE_TSC_OFFSETTING)
    for offset in OFFSETS:
        before, first, second, after = _between(l1, guest, TSC_OFFSET=offset)
        first, second = first - offset & MASK, second - offset & MASK
        assert before < first < second < after, hex(offset)


@pytest.mark.needs(ProcCtl.USE_TSC_OFFSETTING, Proc2Ctl.ENABLE_RDTSCP)
def test_offset_of_rdtscp_and_rdmsr(l1: L1) -> None:
    """RDTSCP and RDMSR of IA32_TIME_STAMP_COUNTER read the same counter."""
    guest = Guest(l1, ProcCtl.USE_TSC_OFFSETTING, ProcCtl.USE_MSR_BITMAPS, Proc2Ctl.ENABLE_RDTSCP)
    set_msr_bitmap(l1)
    offset = 1 << 50
    for program in (code.RDTSCP, code.RDMSR):
        before = l1.rdtsc()
        seen = guest.run(program, {"rcx": Msr.TSC}, TSC_OFFSET=offset)
        after = l1.rdtsc()
        assert seen == Succeed()
        assert before.value < _edx_eax(seen) - offset < after.value, program.hex()


@pytest.mark.needs(ProcCtl.USE_TSC_OFFSETTING)
def test_offset_of_the_host_adds(l1: L1) -> None:
    """L1's own offset, given by the host, is part of what L2 reads: the two add up."""
    guest = Guest(l1, ProcCtl.USE_TSC_OFFSETTING)
    for host in (1 << 44, 1 << 46):
        l1.vcpu.set_tsc_offset(host)
        before, first, second, after = _between(l1, guest, TSC_OFFSET=1 << 52)
        assert before < first - (1 << 52) < second - (1 << 52) < after
        # L1's own counter is as before the entry again: without L2's offset.
        assert before < after < before + (1 << 40)


@pytest.mark.needs(ProcCtl.USE_TSC_OFFSETTING, Proc2Ctl.USE_TSC_SCALING)
def test_multiplier(l1: L1) -> None:
    """The counter is multiplied by the multiplier / 2^48, then the offset is added.

    No two readings of the counter are the same, but a part of it may be.
    """
    guest = Guest(l1, ProcCtl.USE_TSC_OFFSETTING, Proc2Ctl.USE_TSC_SCALING)
    for multiplier in (1 << 48, 1 << 49, 3 << 47, 1 << 47, 0x1_2345_6789_ABCD):
        for offset in (0, 1 << 40, -(1 << 30) & MASK):
            before, first, second, after = _between(
                l1, guest, TSC_MULTIPLIER=multiplier, TSC_OFFSET=offset
            )
            low, high = (value * multiplier >> 48 for value in (before, after))
            first, second = first - offset & MASK, second - offset & MASK
            assert low <= first <= second <= high, (hex(multiplier), hex(offset))
            if multiplier >= 1 << 48:
                assert low < first < second < high, (hex(multiplier), hex(offset))


@pytest.mark.needs(ProcCtl.USE_TSC_OFFSETTING, Proc2Ctl.USE_TSC_SCALING)
def test_multiplier_needs_offsetting(l1: L1) -> None:
    """Without "use TSC offsetting" there is neither offset nor multiplier."""
    guest = Guest(l1, Proc2Ctl.USE_TSC_SCALING)
    before, first, second, after = _between(l1, guest, TSC_MULTIPLIER=1 << 50, TSC_OFFSET=1 << 60)
    assert before < first < second < after


def test_never_goes_back(l1: L1) -> None:
    """L1 and L2 in turn over many entries: each reading is greater than the one before."""
    guest = Guest(l1)
    last = 0
    for number in range(100):
        before, first, second, after = _between(l1, guest)
        assert last < before < first < second < after, number
        last = after


@pytest.mark.needs(ProcCtl.USE_TSC_OFFSETTING)
def test_l2_sets_the_counter(l1: L1) -> None:
    """WRMSR to the counter in L2, not intercepted, moves L1's counter and its TSC_ADJUST."""
    guest = Guest(l1, ProcCtl.USE_TSC_OFFSETTING, ProcCtl.USE_MSR_BITMAPS)
    set_msr_bitmap(l1)
    adjust = l1.rdmsr(Msr.TSC_ADJUST)
    target = 1 << 53
    regs = {"rcx": Msr.TSC, "rax": 0, "rdx": target >> 32}
    # The SDM: WRMSR writes the counter itself, the offset of L2 does not matter.
    seen = guest.run(code.WRMSR + code.RDTSC, regs, TSC_OFFSET=1 << 40)
    assert seen == Succeed()
    inside = _edx_eax(seen)
    now = l1.rdtsc()
    assert target + (1 << 40) <= inside < target + (1 << 40) + (1 << 35)
    assert target < now.value < target + (1 << 35)
    assert l1.rdmsr(Msr.TSC_ADJUST).value != adjust.value


@pytest.mark.needs(ProcCtl.USE_TSC_OFFSETTING, Proc2Ctl.USE_TSC_SCALING, Cap.TSC_CONTROL)
@pytest.mark.parametrize("numerator", [1, 3, 4], ids=["half", "3/2", "double"])
def test_rate_of_the_host_multiplies(l1: L1, numerator: int) -> None:
    """L1's own rate, given by the host, is part of what L2 reads: the two multiply.

    After the exit L1's counter is as before: between its two readings, whatever L2's rate is.
    """
    l1.vcpu.set_tsc_khz(l1.vcpu.get_tsc_khz() * numerator // 2)
    l1.vcpu.set_msrs({Msr.TSC: 1 << 40})  # far from where it wraps around
    guest = Guest(l1, ProcCtl.USE_TSC_OFFSETTING, Proc2Ctl.USE_TSC_SCALING)
    for multiplier in (1 << 49, 3 << 47, 1 << 47):
        for offset in (0, 1 << 40):
            before, first, second, after = _between(
                l1, guest, TSC_MULTIPLIER=multiplier, TSC_OFFSET=offset
            )
            low, high = (value * multiplier >> 48 for value in (before, after))
            assert low <= first - offset <= second - offset <= high, (hex(multiplier), offset)
            assert before < after < before + (1 << 40)


@pytest.mark.needs(ProcCtl.USE_TSC_OFFSETTING, Cap.TSC_CONTROL)
def test_rate_changes_while_l2_is_active(l1: L1) -> None:
    """Userspace that sets another rate while L2 is active changes L1's as well as L2's."""
    guest = Guest(l1, ProcCtl.USE_TSC_OFFSETTING)
    seen = guest.run(code.out8(0x80) + TWICE, TSC_OFFSET=1 << 40)
    assert isinstance(seen, HostExit)
    l1.vcpu.set_tsc_khz(l1.vcpu.get_tsc_khz() * 2)
    seen = guest.resume()
    after = l1.rdtsc()
    assert seen == Succeed()
    l2 = _edx_eax(seen) - (1 << 40)
    assert l2 < after.value < l2 + (1 << 38)
