"""Userspace's MSR filter holds for what KVM loads, stores and emulates for L2 too.

KVM's documentation, "KVM_X86_SET_MSR_FILTER": an access that the filter denies is #GP in the guest;
for the MSR areas of a VM entry or exit it fails as an access to an MSR does that is not there.
"""

from __future__ import annotations

import pytest

from kvmnest.kvm import Cap
from kvmnest.l1 import L1, VmLost, code
from kvmnest.suite.support.bitmaps import set_msr_bitmap
from kvmnest.suite.support.failures import write_msr_area
from kvmnest.suite.support.guest import Guest
from kvmnest.vmx import ExitReason, Field, Msr, ProcCtl, Vector
from kvmnest.vmx.outcome import EntryFailure, Fault, Succeed

pytestmark = [pytest.mark.series(17), pytest.mark.needs(Cap.X86_MSR_FILTER)]

READ, WRITE = 1, 2
#: An MSR that L1 may use, and one that the filter denies it.
FREE, DENIED = Msr.SYSENTER_CS, Msr.KERNEL_GS_BASE


def _deny(l1: L1, access: int) -> None:
    l1.vm.set_msr_filter([(access, DENIED, 1, b"\0")])


@pytest.mark.sdm("Loading MSRs")
def test_entry_load_area(l1: L1) -> None:
    """VM entry fails at the entry whose MSR the filter lets nobody write; reading is no matter."""
    guest, area = Guest(l1), l1.alloc()
    write_msr_area(l1, area, (FREE, 0), (DENIED, 0x1234))
    loads = {"VM_ENTRY_MSR_LOAD_ADDR": area, "VM_ENTRY_MSR_LOAD_COUNT": 2}
    _deny(l1, READ)
    assert guest.run(code.NOP, **loads) == Succeed()
    _deny(l1, WRITE)
    failure = EntryFailure(ExitReason.MSR_LOAD_FAIL, qualification=2)
    assert guest.run(code.NOP, **loads) == failure
    l1.vm.set_msr_filter([])
    assert guest.run(code.NOP) == Succeed()


@pytest.mark.sdm("VMX Aborts")
@pytest.mark.parametrize("area", ["store", "load"])
def test_exit_areas(l1: L1, area: str) -> None:
    """A VM exit that may not store or load an MSR is a VMX abort."""
    guest, page = Guest(l1), l1.alloc()
    write_msr_area(l1, page, (DENIED, 0))
    name = f"VM_EXIT_MSR_{area.upper()}"
    guest.vmcs[Field[f"{name}_ADDR"]], guest.vmcs[Field[f"{name}_COUNT"]] = page, 1
    _deny(l1, WRITE if area == "store" else READ)
    assert guest.run(code.NOP) == Succeed()
    _deny(l1, READ if area == "store" else WRITE)
    with pytest.raises(VmLost, match="SHUTDOWN"):
        guest.run(code.NOP)


@pytest.mark.sdm("MSR-Bitmap Address")
@pytest.mark.needs(ProcCtl.USE_MSR_BITMAPS)
@pytest.mark.parametrize("access", [READ, WRITE], ids=["RDMSR", "WRMSR"])
def test_l2_without_interception(l1: L1, access: int) -> None:
    """An MSR that L1's bitmap leaves to L2 is still denied by the filter: #GP, and no VM exit."""
    guest = Guest(l1, ProcCtl.USE_MSR_BITMAPS)
    set_msr_bitmap(l1)
    denied, other = (code.RDMSR, code.WRMSR) if access == READ else (code.WRMSR, code.RDMSR)
    regs = {"rcx": DENIED, "rax": 0, "rdx": 0}
    assert guest.run(denied, regs) == Succeed()
    _deny(l1, access)
    assert guest.run(denied, regs) == Fault(Vector.GP, error_code=0, rip=0)
    assert guest.run(other, regs) == Succeed()
    assert guest.run(denied, {**regs, "rcx": FREE}) == Succeed()
