"""What cannot be in the HLT state is not refused: events, blocking, SS.DPL."""

import pytest

from kvmnest.l1 import L1
from kvmnest.repro import Bug
from kvmnest.vmx import ActivityState, ExitReason, Field, IntrType, Misc, Vector, intr_info
from kvmnest.vmx.outcome import EntryFailure

BUG = Bug(
    vulnerable="L2 takes #UD in the HLT state",
    correct="VM entry fails: invalid guest state",
    fix=(
        {
            "file": "arch/x86/kvm/vmx/nested.c",
            "function": "nested_vmx_check_guest_state",
            "expression": "if (nested_check_guest_non_reg_state(vmcs12))",
            # The field still has the event that L1 injected when L2, restored, halts by itself.
            "replacement": """
                if (vcpu->arch.nested_run_pending &&
                    vmcs12->guest_activity_state == GUEST_ACTIVITY_HLT) {
                    u32 event = vmcs12->vm_entry_intr_info_field;
                    u32 type = event & INTR_INFO_INTR_TYPE_MASK;
                    u32 vector = event & INTR_INFO_VECTOR_MASK;

                    if (CC(VMX_AR_DPL(vmcs12->guest_ss_ar_bytes)) ||
                        CC(vmcs12->guest_interruptibility_info &
                           (GUEST_INTR_STATE_STI | GUEST_INTR_STATE_MOV_SS)))
                        return -EINVAL;
                    if (CC((event & INTR_INFO_VALID_MASK) &&
                           type != INTR_TYPE_EXT_INTR && type != INTR_TYPE_NMI_INTR &&
                           type != INTR_TYPE_OTHER_EVENT &&
                           !(type == INTR_TYPE_HARD_EXCEPTION &&
                             (vector == DB_VECTOR || vector == MC_VECTOR))))
                        return -EINVAL;
                }
                if (nested_check_guest_non_reg_state(vmcs12))""",
        },
    ),
)


@pytest.mark.sdm("Checks on Guest Non-Register State")
@pytest.mark.needs(Misc.ACTIVITY_HLT)
def test_ud_in_the_hlt_state(l1: L1) -> None:
    """A processor in the HLT state takes interrupts, NMIs, #DB and #MC, but no #UD."""
    vmcs = l1.launchable()
    vmcs[Field.GUEST_ACTIVITY_STATE] = ActivityState.HLT
    vmcs[Field.VM_ENTRY_INTR_INFO_FIELD] = intr_info(Vector.UD, IntrType.HARDWARE_EXCEPTION)
    assert l1.vmlaunch() == EntryFailure(ExitReason.INVALID_GUEST_STATE, qualification=0)
