"""Userspace that puts a vCPU into SMM leaves L2 active."""

import pytest

from kvmnest.kvm import Cap
from kvmnest.l1 import L1, code
from kvmnest.repro import Bug

BUG = Bug(
    subject="KVM: x86: Forcibly leave nested virt when SMM state is toggled",
    cve="CVE-2022-48763",
    since="v4.2",
    since_by="source",
    fixed="v5.17",
    vulnerable="the vCPU is in SMM and in L2 at once",
    correct="the vCPU has left VMX operation",
    edit={
        "file": "arch/x86/kvm/x86.c",
        "function": "kvm_vcpu_ioctl_x86_set_vcpu_events",
        "expression": "kvm_leave_nested(vcpu);",
        "replacement": "",
    },
)

VALID_SMM = 8  # kvm_vcpu_events.flags


@pytest.mark.sdm("Default Treatment of SMI Delivery")
@pytest.mark.needs(Cap.X86_SMM, Cap.MULTI_ADDRESS_SPACE, Cap.NESTED_STATE)
def test_smm_while_l2_is_active(l1: L1) -> None:
    """KVM_SET_VCPU_EVENTS that sets smi.smm ends the nested operation."""
    l1.enable_smm()
    l1.launchable(l2=code.out8(0x80))
    l1.vmlaunch()  # comes to userspace at the OUT, with L2 active
    events = l1.vcpu.get_vcpu_events()
    events.smi.smm = 1
    events.flags |= VALID_SMM
    l1.vcpu.set_vcpu_events(events)
    state = l1.vcpu.get_nested_state()
    assert (state[0] & 1, state[8:16]) == (0, b"\xff" * 8)
