"""A pending debug exception does not wake an L2 that is entered in the HLT state."""

import pytest

from kvmnest.l1 import L1
from kvmnest.repro import Bug
from kvmnest.vmx import (
    ActivityState,
    ExitReason,
    Field,
    Misc,
    PendingDebug,
    PinCtl,
    Rflags,
    Vector,
)
from kvmnest.vmx.outcome import Exit

BUG = Bug(
    vulnerable="L2 stays halted until its time is over",
    correct="the debug exception comes at once",
    fix=(
        {
            "file": "arch/x86/kvm/vmx/nested.c",
            "function": "nested_vmx_run",
            "expression": "if (!(vmcs12->vm_entry_intr_info_field & INTR_INFO_VALID_MASK) &&",
            "replacement": """
            if (!(vmcs12->vm_entry_intr_info_field & INTR_INFO_VALID_MASK) &&
                !(vmcs12->guest_pending_dbg_exceptions & (DR6_BS | BIT(12))) &&""",
        },
    ),
)


@pytest.mark.sdm("Delivery of Pending Debug Exceptions after VM Entry")
@pytest.mark.needs(Misc.ACTIVITY_HLT, PinCtl.ACTIVATE_PREEMPTION_TIMER)
def test_single_step_in_the_hlt_state(l1: L1) -> None:
    """Of the activity states only shutdown and wait-for-SIPI hold back what is pending."""
    vmcs = l1.launchable()
    vmcs[Field.EXCEPTION_BITMAP] = 1 << Vector.DB
    vmcs[Field.GUEST_RFLAGS] = 0x2 | Rflags.TF
    vmcs[Field.GUEST_PENDING_DBG_EXCEPTIONS] = PendingDebug.BS
    vmcs[Field.GUEST_ACTIVITY_STATE] = ActivityState.HLT
    # Ends the HLT state if nothing else does.
    vmcs.set_bits(Field.PIN_BASED_VM_EXEC_CONTROL, PinCtl.ACTIVATE_PREEMPTION_TIMER)
    vmcs[Field.VMX_PREEMPTION_TIMER_VALUE] = 100_000
    assert l1.vmlaunch() == Exit(ExitReason.EXCEPTION_NMI)
