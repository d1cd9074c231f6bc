"""An exit while L2 is halted saves the activity state as active."""

import pytest

from kvmnest.l1 import L1, code
from kvmnest.repro import Bug
from kvmnest.vmx import ActivityState, ExitReason, Field, PinCtl

BUG = Bug(
    subject="KVM: nVMX: Update guest activity state field on L2 exits",
    hash="3edf1e698ff6",
    since="v3.1",
    since_by="source",
    fixed="v3.14",
    vulnerable="GUEST_ACTIVITY_STATE is active",
    correct="GUEST_ACTIVITY_STATE is HLT",
    edit={
        "file": "arch/x86/kvm/vmx/nested.c",
        "function": "sync_vmcs02_to_vmcs12",
        "expression": "vmcs12->guest_activity_state = GUEST_ACTIVITY_HLT;",
        "replacement": "vmcs12->guest_activity_state = GUEST_ACTIVITY_ACTIVE;",
    },
)


@pytest.mark.sdm("Saving Non-Register State")
@pytest.mark.needs(PinCtl.ACTIVATE_PREEMPTION_TIMER)
def test_preemption_timer_ends_hlt(l1: L1) -> None:
    """L2 halts, and the VMX-preemption timer exits."""
    vmcs = l1.launchable(l2=code.HLT)
    vmcs.set_bits(Field.PIN_BASED_VM_EXEC_CONTROL, PinCtl.ACTIVATE_PREEMPTION_TIMER)
    vmcs[Field.VMX_PREEMPTION_TIMER_VALUE] = 0x2000
    seen = l1.vmlaunch()
    state = vmcs[Field.GUEST_ACTIVITY_STATE]
    assert (seen.reason, state) == (ExitReason.PREEMPTION_TIMER, ActivityState.HLT)
