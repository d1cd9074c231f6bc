"""VM entry does not check IA32_DEBUGCTL of the guest state."""

import pytest

from kvmnest.l1 import L1
from kvmnest.repro import Bug
from kvmnest.vmx import EntryCtl, ExitReason, Field
from kvmnest.vmx.outcome import EntryFailure

BUG = Bug(
    subject="KVM: nVMX: Check vmcs12->guest_ia32_debugctl on nested VM-Enter",
    hash="095686e6fcb4",
    fixed="v6.17, v6.1.149, v6.12.43",
    vulnerable="L2 is entered",
    correct="VM entry fails: invalid guest state",
    edit={
        "file": "arch/x86/kvm/vmx/nested.c",
        "function": "nested_vmx_check_guest_state",
        "expression": "CC(!vmx_is_valid_debugctl(vcpu, vmcs12->guest_ia32_debugctl, false))",
        "replacement": "0",
    },
    newer=({"since": "7.0", "expression": "CC(!vmx_is_valid_debugctl(vcpu, debugctl, false))"},),
)

TR = 1 << 6  # branch-trace messages, which KVM does not offer


@pytest.mark.sdm("Checks on Guest Control Registers, Debug Registers, and MSRs")
@pytest.mark.needs(EntryCtl.LOAD_DEBUG_CONTROLS)
def test_bit_that_kvm_does_not_offer(l1: L1) -> None:
    """With "load debug controls" the bits that L1's processor does not have must be 0."""
    vmcs = l1.launchable()
    vmcs.set_bits(Field.VM_ENTRY_CONTROLS, EntryCtl.LOAD_DEBUG_CONTROLS)
    vmcs[Field.GUEST_IA32_DEBUGCTL] = TR
    assert l1.vmlaunch() == EntryFailure(ExitReason.INVALID_GUEST_STATE, qualification=0)
