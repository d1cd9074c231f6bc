"""VM entry loads an MSR that userspace has denied."""

import pytest

from kvmnest.kvm import Cap
from kvmnest.l1 import L1
from kvmnest.repro import Bug
from kvmnest.vmx import ExitReason, Field, Msr
from kvmnest.vmx.outcome import EntryFailure

BUG = Bug(
    subject="KVM: nVMX: Honor userspace MSR filter lists for nested VM-Enter/VM-Exit",
    fixed="v6.12",
    vulnerable="the VM-entry MSR-load area changes an MSR that the filter denies",
    correct="VM entry fails at that entry",
    edit_since="6.12",
    edit={
        "file": "arch/x86/kvm/vmx/nested.c",
        "function": "nested_vmx_load_msr",
        "expression": "kvm_emulate_msr_write(",
        "replacement": "__kvm_emulate_msr_write(",
    },
)

WRITE = 2


@pytest.mark.sdm("Loading MSRs")
@pytest.mark.needs(Cap.X86_MSR_FILTER)
def test_denied_msr(l1: L1) -> None:
    """The second entry of the area names the MSR."""
    vmcs, area = l1.launchable(), l1.alloc()
    for number, msr in enumerate((Msr.SYSENTER_CS, Msr.KERNEL_GS_BASE)):
        l1.write_int(area + 16 * number, msr)
    vmcs[Field.VM_ENTRY_MSR_LOAD_ADDR], vmcs[Field.VM_ENTRY_MSR_LOAD_COUNT] = area, 2
    l1.vm.set_msr_filter([(WRITE, Msr.KERNEL_GS_BASE, 1, b"\0")])
    assert l1.vmlaunch() == EntryFailure(ExitReason.MSR_LOAD_FAIL, qualification=2)
