"""An event to inject in the wait-for-SIPI state is not refused."""

import pytest

from kvmnest.l1 import L1
from kvmnest.repro import Bug
from kvmnest.vmx import (
    ActivityState,
    ExitReason,
    Field,
    IntrType,
    Misc,
    PinCtl,
    Vector,
    intr_info,
)
from kvmnest.vmx.outcome import EntryFailure

BUG = Bug(
    vulnerable="L2 is entered",
    correct="VM entry fails: invalid guest state",
    fix=(
        {
            "file": "arch/x86/kvm/vmx/nested.c",
            "function": "nested_check_guest_non_reg_state",
            "expression": "vmcs12->guest_activity_state != GUEST_ACTIVITY_WAIT_SIPI))",
            "replacement": """
            vmcs12->guest_activity_state != GUEST_ACTIVITY_WAIT_SIPI) ||
            CC(vmcs12->guest_activity_state == GUEST_ACTIVITY_WAIT_SIPI &&
               (vmcs12->vm_entry_intr_info_field & INTR_INFO_VALID_MASK)))""",
        },
    ),
)


@pytest.mark.sdm("Checks on Guest Non-Register State")
@pytest.mark.needs(Misc.ACTIVITY_WAIT_FOR_SIPI, PinCtl.ACTIVATE_PREEMPTION_TIMER)
def test_nmi_in_the_wait_for_sipi_state(l1: L1) -> None:
    """A processor that waits for a SIPI takes no other event."""
    vmcs = l1.launchable()
    vmcs[Field.GUEST_ACTIVITY_STATE] = ActivityState.WAIT_FOR_SIPI
    vmcs[Field.VM_ENTRY_INTR_INFO_FIELD] = intr_info(Vector.NMI, IntrType.NMI)
    # Ends the wait if it begins.
    vmcs.set_bits(Field.PIN_BASED_VM_EXEC_CONTROL, PinCtl.ACTIVATE_PREEMPTION_TIMER)
    vmcs[Field.VMX_PREEMPTION_TIMER_VALUE] = 0
    assert l1.vmlaunch() == EntryFailure(ExitReason.INVALID_GUEST_STATE, qualification=0)
