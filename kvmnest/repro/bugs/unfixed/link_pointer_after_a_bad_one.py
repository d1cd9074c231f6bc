"""A VMCS link pointer that leads nowhere makes KVM refuse the last good one."""

import pytest

from kvmnest.l1 import L1
from kvmnest.repro import Bug
from kvmnest.vmx import ExitReason, Field, Proc2Ctl
from kvmnest.vmx.outcome import EntryFailure, Exit

BUG = Bug(
    vulnerable="VM entry fails with the link pointer that was good before",
    correct="VM entry succeeds with the good link pointer again",
    fix=(
        {
            "file": "arch/x86/kvm/vmx/nested.c",
            "function": "nested_vmx_check_vmcs_link_ptr",
            "expression": "vmcs12->vmcs_link_pointer, VMCS12_SIZE))) return -EINVAL;",
            "replacement": """
                vmcs12->vmcs_link_pointer, VMCS12_SIZE))) {
                    ghc->gpa = INVALID_GPA;
                    return -EINVAL;
                }""",
        },
    ),
)

NOWHERE = 0x10000000  # no memory there


@pytest.mark.sdm("Checks on Guest Non-Register State")
@pytest.mark.needs(Proc2Ctl.VMCS_SHADOWING)
def test_good_pointer_again(l1: L1) -> None:
    """Whether a VMCS link pointer is good does not depend on the entry before."""
    vmcs = l1.launchable()
    good = l1.prepare_region(l1.alloc())
    vmcs[Field.VMCS_LINK_POINTER] = good
    assert l1.vmlaunch() == Exit(ExitReason.VMCALL)
    vmcs[Field.VMCS_LINK_POINTER] = NOWHERE
    assert l1.vmresume() == EntryFailure(ExitReason.INVALID_GUEST_STATE, qualification=4)
    vmcs[Field.VMCS_LINK_POINTER] = good
    assert l1.vmresume() == Exit(ExitReason.VMCALL)
