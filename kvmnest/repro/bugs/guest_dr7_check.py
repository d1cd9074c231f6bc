"""Upper half of the guest's DR7 is not checked."""

import pytest

from kvmnest.l1 import L1
from kvmnest.repro import Bug
from kvmnest.vmx import EntryCtl, ExitReason, Field
from kvmnest.vmx.outcome import EntryFailure

BUG = Bug(
    subject="KVM: nVMX: Check GUEST_DR7 on vmentry of nested guests",
    hash="ecb697d10f70",
    since="v3.10",
    since_by="source",
    fixed="v5.6-rc1",
    vulnerable="L2 runs with bit 32 of GUEST_DR7 set",
    correct="VM entry fails: invalid guest state",
    edit={
        "file": "arch/x86/kvm/vmx/nested.c",
        "function": "nested_vmx_check_guest_state",
        "expression": "(CC(!kvm_dr7_valid(vmcs12->guest_dr7)) || CC(",
        "replacement": "(CC(",
    },
)


@pytest.mark.sdm("Checks on Guest Control Registers, Debug Registers, and MSRs")
@pytest.mark.needs(EntryCtl.LOAD_DEBUG_CONTROLS)
def test_upper_half_of_dr7(l1: L1) -> None:
    """Bits 63:32 of the field must be 0 if the debug controls are loaded."""
    vmcs = l1.launchable()
    vmcs.set_bits(Field.VM_ENTRY_CONTROLS, EntryCtl.LOAD_DEBUG_CONTROLS)
    vmcs[Field.GUEST_DR7] = 1 << 32 | 0x400
    assert l1.vmlaunch() == EntryFailure(ExitReason.INVALID_GUEST_STATE, qualification=0)
