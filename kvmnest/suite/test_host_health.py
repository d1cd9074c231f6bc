"""What the host keeps after a VM that ran L2 is gone: no page, no file descriptor.

A fixture watches each: memory (``watched``), file descriptors (``descriptors``), KVM's own
statistics (``counted``). The kernel's messages are watched in every case.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from kvmnest.kvm import Cap, SealedMemory, exits
from kvmnest.l1 import L1, code
from kvmnest.suite.support.bitmaps import set_msr_bitmap
from kvmnest.suite.support.guest import Guest
from kvmnest.vmx import ExitReason, Field, Proc2Ctl, ProcCtl
from kvmnest.vmx.outcome import EntryFailure, HostExit, Outcome, Succeed, VMfailValid

pytestmark = [
    pytest.mark.series(24),
    pytest.mark.sdm("Software Use of Virtual-Machine Control Structures"),
]

#: Guest-physical address of the pages that are watched, above L1's RAM.
WATCHED = 0x20000000
_BAD_LINK = WATCHED + 0x800


@pytest.fixture
def watched(l1: L1) -> SealedMemory:
    """Four pages at ``WATCHED`` in a memory slot of their own."""
    if l1.nested_roundtrip:
        pytest.skip("a VM that replaces another one has no such memory slot")
    memory = SealedMemory(4 * 4096)
    l1.vm.add_memory(7, WATCHED, memory)
    return memory


@pytest.fixture
def descriptors() -> Callable[[], int]:
    """How many file descriptors this process has more than before the case."""
    before = len(os.listdir("/proc/self/fd"))
    return lambda: len(os.listdir("/proc/self/fd")) - before


@pytest.fixture
def counted(l1: L1) -> Callable[[str], int]:
    """By how much a statistic of the vCPU grew since the case began."""
    before = l1.vcpu.stats()

    def growth(name: str) -> int:
        now, then = l1.vcpu.stats()[name], before[name]
        assert isinstance(now, int)
        assert isinstance(then, int)
        return now - then

    return growth


def _guest(l1: L1) -> Guest:
    """An L2 whose virtual-APIC page, APIC-access page and MSR bitmap are watched pages."""
    guest = Guest(l1, ProcCtl.USE_TPR_SHADOW, Proc2Ctl.VIRTUALIZE_APIC_ACCESSES)
    guest.on(ProcCtl.USE_MSR_BITMAPS)
    set_msr_bitmap(l1)
    guest.vmcs[Field.VIRTUAL_APIC_PAGE_ADDR] = WATCHED
    guest.vmcs[Field.APIC_ACCESS_ADDR] = WATCHED + 0x1000
    guest.vmcs[Field.MSR_BITMAP] = WATCHED + 0x2000
    guest.vmcs[Field.TPR_THRESHOLD] = 0
    return guest


def _good(guest: Guest) -> Outcome:
    return guest.run(code.NOP)


def _bad_link(guest: Guest) -> Outcome:
    return guest.run(code.NOP, VMCS_LINK_POINTER=_BAD_LINK)


def _bad_cr3(guest: Guest) -> Outcome:
    return guest.run(code.NOP, GUEST_CR3=1 << 63)


def _bad_msr_area(guest: Guest) -> Outcome:
    guest.vmcs[Field.VM_ENTRY_MSR_LOAD_ADDR] = guest.l1.alloc()  # MSR 0 cannot be loaded
    guest.l1.write_int(guest.vmcs[Field.VM_ENTRY_MSR_LOAD_ADDR], 0x801)
    return guest.run(code.NOP, VM_ENTRY_MSR_LOAD_COUNT=1)


def _bad_segment(guest: Guest) -> Outcome:
    return guest.run(code.NOP, GUEST_TR_ACCESS_RIGHTS=0x10000)


def _bad_control(guest: Guest) -> Outcome:
    return guest.run(code.NOP, IO_BITMAP_A=1, CR3_TARGET_COUNT=5)


def _left_in_l2(guest: Guest) -> Outcome:
    return guest.run(code.out8(0x80))


def _bad(qualification: int) -> EntryFailure:
    return EntryFailure(ExitReason.INVALID_GUEST_STATE, qualification=qualification)


_ENDS: dict[str, tuple[Callable[[Guest], Outcome], object]] = {
    "exit": (_good, Succeed()),
    "link-pointer": (_bad_link, _bad(4)),
    "CR3": (_bad_cr3, _bad(0)),
    "MSR-area": (_bad_msr_area, EntryFailure(ExitReason.MSR_LOAD_FAIL, qualification=1)),
    "segment": (_bad_segment, _bad(0)),
    "control": (_bad_control, VMfailValid(7)),
    "in-L2": (_left_in_l2, None),
}


@pytest.mark.needs(
    ProcCtl.USE_TPR_SHADOW, Proc2Ctl.VIRTUALIZE_APIC_ACCESSES, ProcCtl.USE_MSR_BITMAPS
)
@pytest.mark.parametrize("end", _ENDS)
def test_pages_of_the_vmcs(l1: L1, watched: SealedMemory, end: str) -> None:
    """However entries of L2 end, KVM gives the pages that the VMCS names back with the VM."""
    enter, expected = _ENDS[end]
    guest = _guest(l1)
    for _ in range(1 if end == "in-L2" else 3):
        seen = enter(guest)
        if end == "in-L2":
            assert isinstance(seen, HostExit)
            assert isinstance(seen.exit, exits.IoExit)
        else:
            assert seen == expected
    l1.close()
    assert not watched.leaked()


@pytest.mark.parametrize("where", ["VMXON-region", "VMCS", "link-pointer"])
def test_pages_of_regions(l1: L1, watched: SealedMemory, where: str) -> None:
    """VMXON regions, VMCSs and shadow VMCSs are given back with the VM, L2 active or not."""
    region = l1.prepare_region(l1.alloc())
    watched.write(0, l1.read(region, 8))
    if where == "VMXON-region":
        assert l1.vmxon(WATCHED) == Succeed()
    else:
        guest = Guest(l1)
        if where == "VMCS":
            assert l1.vmclear(WATCHED) == Succeed()
            assert l1.vmptrld(WATCHED) == Succeed()
        else:
            seen = guest.run(code.out8(0x80), VMCS_LINK_POINTER=WATCHED)
            assert isinstance(seen, HostExit)
    l1.close()
    assert not watched.leaked()


@pytest.mark.parametrize("where", ["L1", "L2"])
def test_file_descriptors(l1: L1, descriptors: Callable[[], int], where: str) -> None:
    """A VM that is replaced, while L2 runs or not, leaves no file descriptor behind."""
    guest = Guest(l1)
    assert isinstance(guest.run(code.out8(0x80)), HostExit)
    if where == "L1":
        assert guest.resume() == Succeed()
    l1.vcpu.stats()
    l1.round_trip()
    first = descriptors()
    for _ in range(3):
        l1.vcpu.stats()
        l1.round_trip()
    assert descriptors() == first
    assert (guest.resume if where == "L2" else guest.go_on)() == Succeed()


@pytest.mark.needs(Cap.MCE, Cap.NESTED_STATE)
@pytest.mark.sdm("Machine-Check Architecture")
@pytest.mark.parametrize("way", ["nested-state", "close"])
def test_kernel_log_of_a_lost_triple_fault(l1: L1, way: str) -> None:
    """Userspace may leave an L2 for which a triple fault is pending: the kernel does not warn.

    A message of the kernel that reports a defect fails the case in which it comes.
    """
    outside = l1.vcpu.get_nested_state()
    l1.vcpu.setup_mce(1)
    guest = Guest(l1)
    assert isinstance(guest.run(code.out8(0x80)), HostExit)
    l1.vcpu.set_mce(0, 0xE2 << 56)  # valid, overflow, uncorrected, processor context corrupt
    if way == "close":
        l1.close()
        return
    l1.vcpu.set_nested_state(outside)
    assert l1.vcpu.get_nested_state() == outside


def test_statistics(l1: L1, counted: Callable[[str], int]) -> None:
    """KVM's own statistics count the entries of L2, and say whether L2 is active."""
    guest = Guest(l1)
    for count in (1, 2, 3):
        assert guest.run(code.NOP) == Succeed()
        assert (counted("nested_run"), counted("guest_mode")) == (count, 0)
    assert guest.run(code.NOP, VMCS_LINK_POINTER=0x800) == _bad(4)
    assert counted("nested_run") == 3  # an entry that failed is none
    guest.vmcs[Field.VMCS_LINK_POINTER] = (1 << 64) - 1
    assert isinstance(guest.run(code.out8(0x80)), HostExit)
    assert (counted("nested_run"), counted("guest_mode")) == (4, 1)
    assert guest.resume() == Succeed()
    assert (counted("nested_run"), counted("guest_mode")) == (4, 0)
