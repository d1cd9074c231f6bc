"""Guest activity state is not checked.

The subject of the commit is not verified: it was not found in the lists' archives.
"""

import pytest

from kvmnest.l1 import L1
from kvmnest.repro import Bug
from kvmnest.vmx import ExitReason, Field
from kvmnest.vmx.outcome import EntryFailure

BUG = Bug(
    subject="KVM: nVMX: check vmcs12 for valid activity state",
    vulnerable="L2 runs from an activity state that does not exist",
    correct="VM entry fails: invalid guest state",
    edit={
        "file": "arch/x86/kvm/vmx/nested.c",
        "function": "nested_vmx_check_guest_state",
        "expression": "if (nested_check_guest_non_reg_state(vmcs12))",
        "replacement": "if (0 && nested_check_guest_non_reg_state(vmcs12))",
    },
)


@pytest.mark.sdm("Checks on Guest Non-Register State")
def test_activity_state_4(l1: L1) -> None:
    """The activity state must be one that IA32_VMX_MISC reports."""
    vmcs = l1.launchable()
    vmcs[Field.GUEST_ACTIVITY_STATE] = 4
    assert l1.vmlaunch() == EntryFailure(ExitReason.INVALID_GUEST_STATE, qualification=0)
