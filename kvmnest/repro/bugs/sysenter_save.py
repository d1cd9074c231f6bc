"""SYSENTER_EIP written by L2 is not saved at the exit."""

import pytest

from kvmnest.l1 import L1, code
from kvmnest.repro import Bug
from kvmnest.vmx import Field, Msr, ProcCtl

BUG = Bug(
    subject="KVM: nVMX: Update vmcs12 for SYSENTER MSR writes",
    fixed="v5.2",
    vulnerable="GUEST_SYSENTER_EIP has the value from before",
    correct="GUEST_SYSENTER_EIP has L2's value",
    edit={
        "file": "arch/x86/kvm/vmx/vmx.c",
        "function": "vmx_set_msr",
        "expression": "get_vmcs12(vcpu)->guest_sysenter_eip = data;",
        "replacement": ";",
    },
)


@pytest.mark.sdm("Saving Control Registers, Debug Registers, and MSRs")
@pytest.mark.needs(ProcCtl.USE_MSR_BITMAPS)
def test_sysenter_eip_of_l2(l1: L1) -> None:
    """The exit saves what L2 wrote to IA32_SYSENTER_EIP."""
    vmcs = l1.launchable(l2=code.WRMSR)
    vmcs.set_bits(Field.CPU_BASED_VM_EXEC_CONTROL, ProcCtl.USE_MSR_BITMAPS)
    vmcs[Field.MSR_BITMAP] = l1.alloc()  # no MSR access exits
    l1.vmlaunch(regs={"rcx": Msr.SYSENTER_EIP, "rax": 0x12345678, "rdx": 0})
    assert vmcs[Field.GUEST_SYSENTER_EIP] == 0x12345678
