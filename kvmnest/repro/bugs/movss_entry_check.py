"""VM entry in the shadow of MOV SS.

The subject of the commit is not verified: it was not found in the lists' archives.
"""

import pytest

from kvmnest.l1 import L1, Shadow
from kvmnest.repro import Bug
from kvmnest.vmx import VmxError
from kvmnest.vmx.outcome import VMfailValid

BUG = Bug(
    subject="KVM: nVMX: MOV-SS blocking check on VMLAUNCH/VMRESUME",
    since="v3.1",
    since_by="source",
    vulnerable="VMLAUNCH behind MOV SS enters L2",
    correct="VMLAUNCH behind MOV SS fails with error 26",
    edit={
        "file": "arch/x86/kvm/vmx/nested.c",
        "function": "nested_vmx_run",
        "expression": "if (CC(interrupt_shadow & KVM_X86_SHADOW_INT_MOV_SS))",
        "replacement": "if (0)",
    },
)


@pytest.mark.sdm("VMLAUNCH/VMRESUME - Launch/Resume Virtual Machine")
def test_vmlaunch_behind_mov_ss(l1: L1) -> None:
    """Blocking by MOV SS makes VM entry fail."""
    l1.launchable()
    blocked = VMfailValid(VmxError.ENTRY_EVENTS_BLOCKED_BY_MOV_SS)
    assert l1.vmlaunch(shadow=Shadow.MOV_SS) == blocked
