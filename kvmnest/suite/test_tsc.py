"""The time-stamp counter in L2: offset, multiplier, and that it never goes back."""

from __future__ import annotations

import pytest

from kvmnest.kvm import Cap, Kvm
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


#: RDTSC into R8; ADD R9; to EDX:EAX and R10; WRMSR to ECX; RDTSC into R11.
_SET_COUNTER = (
    code.RDTSC + b"\x48\xc1\xe2\x20\x48\x09\xd0\x49\x89\xc0"  # SHL RDX, 32; OR; MOV R8, RAX
    b"\x4c\x01\xc8\x49\x89\xc2"  # ADD RAX, R9; MOV R10, RAX
    b"\x48\x89\xc2\x48\xc1\xea\x20"  # MOV RDX, RAX; SHR RDX, 32
     + code.WRMSR + code.RDTSC + b"\x48\xc1\xe2\x20\x48\x09\xd0\x49\x89\xc3"
)


@pytest.mark.needs(ProcCtl.USE_TSC_OFFSETTING)
@pytest.mark.sdm("IA32_TSC_ADJUST Register Support")
@pytest.mark.parametrize("offset", [None, 0, 1 << 40, -(1 << 40) & MASK], ids=str)
def test_adjust_follows_the_counter(l1: L1, offset: int | None) -> None:
    """WRMSR to the counter by L1, or by L2 with an offset, moves IA32_TSC_ADJUST by as much.

    Counter less IA32_TSC_ADJUST is the time since the reset, which goes on as if nothing was.
    """
    guest = None
    if offset is not None:
        guest = Guest(l1, ProcCtl.USE_TSC_OFFSETTING, ProcCtl.USE_MSR_BITMAPS)
        set_msr_bitmap(l1)
    reading = offset or 0
    for change in (1 << 50, -(1 << 49) & MASK, 12345678):
        adjust = l1.rdmsr(Msr.TSC_ADJUST).value
        start = l1.rdtsc().value - adjust & MASK
        regs = {"rcx": Msr.TSC, "r9": change}
        seen = (
            guest.run(_SET_COUNTER, regs, TSC_OFFSET=reading)
            if guest
            else l1.call(_SET_COUNTER, regs=regs)
        )
        assert seen == Succeed()
        adjusted = l1.rdmsr(Msr.TSC_ADJUST).value
        end = l1.rdtsc().value - adjusted & MASK
        first, written, second = (seen.regs[name] for name in ("r8", "r10", "r11"))
        # L2 reads with its offset and writes without.
        moments = (
            first - reading - adjust & MASK,
            written - adjusted & MASK,
            second - reading - adjusted & MASK,
        )
        assert start < moments[0] < moments[1] <= moments[2] < end, hex(change)


@pytest.mark.needs(ProcCtl.USE_TSC_OFFSETTING)
@pytest.mark.sdm("IA32_TSC_ADJUST Register Support")
@pytest.mark.parametrize("who", ["L1", "L2"])
def test_counter_follows_adjust(l1: L1, who: str) -> None:
    """WRMSR to IA32_TSC_ADJUST moves the counter of L1, and with it L2's."""
    guest = Guest(l1, ProcCtl.USE_TSC_OFFSETTING, ProcCtl.USE_MSR_BITMAPS)
    set_msr_bitmap(l1)
    for value in (1 << 50, 1 << 41, 0):
        adjust = l1.rdmsr(Msr.TSC_ADJUST).value
        before = l1.rdtsc().value - adjust & MASK
        regs = {"rcx": Msr.TSC_ADJUST, "rax": value & 0xFFFFFFFF, "rdx": value >> 32}
        if who == "L1":
            assert l1.wrmsr(Msr.TSC_ADJUST, value) == Succeed()
        else:
            assert guest.run(code.WRMSR, regs, TSC_OFFSET=1 << 30) == Succeed()
        assert l1.rdmsr(Msr.TSC_ADJUST) == Succeed(value)
        one, two, three, four = _between(l1, guest, TSC_OFFSET=1 << 30)
        one, four = one - value & MASK, four - value & MASK
        two, three = (x - value - (1 << 30) & MASK for x in (two, three))
        assert before < one < two < three < four


@pytest.mark.needs(Cap.TSC_CONTROL, ProcCtl.USE_TSC_OFFSETTING, Proc2Ctl.USE_TSC_SCALING)
@pytest.mark.parametrize("times", [(1, 2), (3, 2), (2, 1)], ids=lambda n: f"{n[0]}-{n[1]}")
def test_frequency_of_the_host_multiplies(kvm: Kvm, l1: L1, times: tuple[int, int]) -> None:
    """KVM_SET_TSC_KHZ scales L1's counter, L1's multiplier scales that for L2, on top of it.

    Another VM, which is not scaled, tells the host's counter before and after.
    """
    khz = l1.vcpu.get_tsc_khz()
    wanted = khz * times[0] // times[1]
    if l1.nested_roundtrip:
        pytest.skip("a VM that replaces another one gets no frequency")
    l1.vcpu.set_tsc_khz(wanted)
    # A counter below 2^63: the reset gave one near 0, which would now be before it.
    l1.vcpu.set_tsc_offset(1 << 50)
    ratio = (wanted << 48) // khz
    guest = Guest(l1, ProcCtl.USE_TSC_OFFSETTING, Proc2Ctl.USE_TSC_SCALING)
    with L1(kvm) as other:

        def host() -> int:
            return int(other.rdtsc().value) - other.vcpu.get_tsc_offset() & MASK

        for multiplier in (1 << 48, 3 << 47, 1 << 47):
            early = host()
            own = l1.vcpu.get_tsc_offset()
            before, first, second, after = _between(
                l1, guest, TSC_MULTIPLIER=multiplier, TSC_OFFSET=1 << 40
            )
            late = host()
            low, high = ((x * ratio >> 48) + own & MASK for x in (early, late))
            assert low <= before < after <= high, "L1's counter"
            low, high = ((x * multiplier >> 48) + (1 << 40) & MASK for x in (before, after))
            assert low <= first <= second <= high, "L2's counter"


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
