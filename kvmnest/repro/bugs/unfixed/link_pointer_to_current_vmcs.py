"""A VMCS link pointer to the current VMCS is not refused."""

import pytest

from kvmnest.l1 import L1
from kvmnest.repro import Bug
from kvmnest.vmx import ExitReason, Field
from kvmnest.vmx.outcome import EntryFailure

BUG = Bug(
    vulnerable="L2 runs with the current VMCS as its shadow VMCS",
    correct="VM entry fails: VMCS link pointer",
    fix=(
        {
            "file": "arch/x86/kvm/vmx/nested.c",
            "function": "nested_vmx_check_vmcs_link_ptr",
            "expression": "if (CC(!page_address_valid(vcpu, vmcs12->vmcs_link_pointer)))",
            "replacement": """
                if (CC(!page_address_valid(vcpu, vmcs12->vmcs_link_pointer)) ||
                    CC(vmcs12->vmcs_link_pointer == vmx->nested.current_vmptr))""",
        },
    ),
)


@pytest.mark.sdm("Checks on Guest Non-Register State")
def test_pointer_to_the_current_vmcs(l1: L1) -> None:
    """The VMCS link pointer is not the current-VMCS pointer."""
    vmcs = l1.launchable()
    vmcs[Field.VMCS_LINK_POINTER] = vmcs.address
    assert l1.vmlaunch() == EntryFailure(ExitReason.INVALID_GUEST_STATE, qualification=4)
