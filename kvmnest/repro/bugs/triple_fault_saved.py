"""A triple fault that is pending for L2 is lost over save and restore."""

import pytest

from kvmnest.kvm import Cap
from kvmnest.l1 import L1, code
from kvmnest.repro import Bug
from kvmnest.vmx import Cr4, ExitReason, Field
from kvmnest.vmx.outcome import Exit

BUG = Bug(
    subject="KVM: x86: Extend KVM_{G,S}ET_VCPU_EVENTS to support pending triple fault",
    hash="ed2351174e38",
    fixed="v6.0",
    vulnerable="L2 goes on in the new VM",
    correct="L2 ends in a triple fault in the new VM",
    edit={
        "file": "arch/x86/kvm/x86.c",
        "function": "kvm_vcpu_ioctl_x86_get_vcpu_events",
        "expression": "events->triple_fault.pending = kvm_test_request(",
        "replacement": "events->triple_fault.pending = 0 && kvm_test_request(",
    },
)

FATAL = 0xE2 << 56  # status of a bank: valid, overflow, uncorrected, context corrupt
BANKS = 1


@pytest.mark.sdm("Machine-Check Architecture")
@pytest.mark.needs(Cap.MCE, Cap.NESTED_STATE)
def test_machine_check_without_mce(l1: L1) -> None:
    """An uncorrected machine check shuts down an L2 with CR4.MCE 0, which is then moved."""
    if l1.kvm.check_extension(Cap.X86_TRIPLE_FAULT_EVENT):
        l1.enable_cap(Cap.X86_TRIPLE_FAULT_EVENT)
    l1.vcpu.setup_mce(BANKS)
    vmcs = l1.launchable(l2=code.out8(0x80))
    vmcs[Field.GUEST_CR4] &= ~Cr4.MCE
    l1.vmlaunch()  # comes to userspace at the OUT, with L2 active
    l1.vcpu.run(immediate_exit=True)
    l1.vcpu.set_mce(0, FATAL)
    l1.round_trip()
    assert l1.resume() == Exit(ExitReason.TRIPLE_FAULT)
