"""An activity state that IA32_VMX_MISC does not report is not refused."""

import pytest

from kvmnest.l1 import L1
from kvmnest.repro import Bug
from kvmnest.vmx import ActivityState, ExitReason, Field, Misc, Msr, ProcCtl
from kvmnest.vmx.outcome import EntryFailure

BUG = Bug(
    vulnerable="L2 is entered in the HLT state",
    correct="VM entry fails: invalid guest state",
    fix=(
        {
            "file": "arch/x86/kvm/vmx/nested.c",
            "function": "nested_vmx_check_guest_state",
            "expression": "*entry_failure_code = ENTRY_FAIL_DEFAULT;",
            # L2 gets into the HLT state by itself, too: a restored one may be in it.
            "replacement": """
                *entry_failure_code = ENTRY_FAIL_DEFAULT;
                if (vcpu->arch.nested_run_pending &&
                    (vmcs12->guest_activity_state == GUEST_ACTIVITY_HLT ||
                     vmcs12->guest_activity_state == GUEST_ACTIVITY_WAIT_SIPI) &&
                    CC(!(to_vmx(vcpu)->nested.msrs.misc_low &
                         BIT(5 + vmcs12->guest_activity_state))))
                    return -EINVAL;""",
        },
    ),
)


@pytest.mark.sdm("Checks on Guest Non-Register State")
@pytest.mark.needs(Misc.ACTIVITY_HLT, ProcCtl.INTERRUPT_WINDOW_EXITING)
def test_state_that_userspace_took_away(l1: L1) -> None:
    """The state must be one that IA32_VMX_MISC reports; KVM lets userspace take it away."""
    misc = l1.vcpu.get_msrs([Msr.IA32_VMX_MISC])[Msr.IA32_VMX_MISC]
    l1.set_feature_msrs({Msr.IA32_VMX_MISC: misc & ~Misc.ACTIVITY_HLT})
    vmcs = l1.launchable()
    # An open interrupt window ends the HLT state at once, should L2 get there.
    vmcs.set_bits(Field.CPU_BASED_VM_EXEC_CONTROL, ProcCtl.INTERRUPT_WINDOW_EXITING)
    vmcs[Field.GUEST_RFLAGS] = 0x202
    vmcs[Field.GUEST_ACTIVITY_STATE] = ActivityState.HLT
    assert l1.vmlaunch() == EntryFailure(ExitReason.INVALID_GUEST_STATE, qualification=0)
