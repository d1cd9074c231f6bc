"""VMRESUME enters a VMCS that was never launched.

The first line is the title. Below it stands what helps to understand the bug: the report, the
section of the SDM, what L1 executes.
"""

import pytest

from kvmnest.l1 import L1
from kvmnest.repro import Bug
from kvmnest.vmx import VmxError
from kvmnest.vmx.outcome import VMfailValid

BUG = Bug(
    subject="subject of the commit that fixes it, or of the report",
    # hash="0123456789ab",
    # cve="CVE-2026-0001",
    # since="0123456789ab (v5.0)",
    # since_by="Fixes",  # the tag says so; or "source", if you read v5.0 and v4.20
    # fixed="v6.3",
    vulnerable="VMRESUME of a clear VMCS runs L2",
    correct="VMRESUME of a clear VMCS fails with error 5",
    # death="VmLost: triple fault",  # if the VM dies of it
    # params={"ept": "0"},  # if it needs kvm_intel with ept=0
    # Brings the bug back for `kvmnest repro verify`; the expression occurs once in the function.
    edit={
        "file": "arch/x86/kvm/vmx/nested.c",
        "function": "nested_vmx_run",
        "expression": "if (CC(vmcs12->launch_state == launch))",
        "replacement": "if (launch && CC(vmcs12->launch_state == launch))",
    },
)


@pytest.mark.sdm("VMLAUNCH/VMRESUME - Launch/Resume Virtual Machine")
# @pytest.mark.needs(Proc2Ctl.ENABLE_VPID)  # from kvmnest.vmx: skipped where it is not offered
def test_vmresume_of_a_clear_vmcs(l1: L1) -> None:
    """What the SDM demands."""
    l1.launchable()
    assert l1.vmresume() == VMfailValid(VmxError.VMRESUME_NONLAUNCHED_VMCS)
