"""A shadow VMCS can be launched.

The subject of the commit is not verified: it was not found in the lists' archives.
"""

import pytest

from kvmnest.l1 import L1
from kvmnest.repro import Bug
from kvmnest.vmx import Proc2Ctl
from kvmnest.vmx.outcome import VMfailInvalid

BUG = Bug(
    subject="kvm: nVMX: Fail VMLAUNCH and VMRESUME on shadow VMCS",
    fixed="v4.19",
    vulnerable="VMLAUNCH of a shadow VMCS enters L2",
    correct="VMLAUNCH of a shadow VMCS is VMfailInvalid",
    edit={
        "file": "arch/x86/kvm/vmx/nested.c",
        "function": "nested_vmx_run",
        "expression": "if (CC(vmcs12->hdr.shadow_vmcs))",
        "replacement": "if (0)",
    },
)

SHADOW = 1 << 31  # shadow-VMCS indicator, in the revision identifier


@pytest.mark.sdm("VMLAUNCH/VMRESUME - Launch/Resume Virtual Machine")
@pytest.mark.needs(Proc2Ctl.VMCS_SHADOWING)
def test_vmlaunch_of_a_shadow_vmcs(l1: L1) -> None:
    """A shadow VMCS can be current, but not be entered."""
    legal = l1.launchable().baseline
    region = l1.prepare_region(l1.alloc(), l1.caps.basic.revision_id | SHADOW)
    l1.vmclear(region)
    l1.vmptrld(region)
    for field, value in legal.items():
        l1.vmwrite(field, value)
    assert l1.vmlaunch() == VMfailInvalid()
