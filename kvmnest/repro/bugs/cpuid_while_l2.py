"""KVM takes another CPUID while L2 is active."""

import pytest

from kvmnest.kvm import Cap, KvmError
from kvmnest.kvm.cpuid import CPUID_1_ECX_VMX, leaf
from kvmnest.l1 import L1, code
from kvmnest.repro import Bug

BUG = Bug(
    subject="KVM: x86: Disallow setting CPUID and/or feature MSRs if L2 is active",
    fixed="v7.0",
    vulnerable="a vCPU without VMX runs L2",
    correct="KVM_SET_CPUID2 is refused",
    edit_since="7.0",
    edit={
        "file": "arch/x86/kvm/x86.h",
        "function": "kvm_can_set_cpuid_and_feature_msrs",
        "expression": "&& !is_guest_mode(vcpu)",
        "replacement": "",
    },
)


@pytest.mark.sdm("Discovering Support for VMX")
@pytest.mark.needs(Cap.NESTED_STATE)
def test_vmx_taken_away(l1: L1) -> None:
    """A vCPU that never ran and whose restored L2 is active keeps its CPUID."""
    l1.launchable(l2=code.out8(0x80))
    l1.vmlaunch()  # comes to userspace at the OUT, with L2 active
    l1.round_trip()
    cpuid = l1.vcpu.get_cpuid()
    leaf(cpuid, 1).ecx &= ~CPUID_1_ECX_VMX
    with pytest.raises(KvmError):
        l1.vcpu.set_cpuid(cpuid)
