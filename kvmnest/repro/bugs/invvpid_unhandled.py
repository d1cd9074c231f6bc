"""No handler for INVVPID of L1."""

import pytest

from kvmnest.l1 import L1
from kvmnest.repro import Bug
from kvmnest.vmx import Vector
from kvmnest.vmx.outcome import Fault

BUG = Bug(
    subject="kvm: vmx: handle invvpid vm exit gracefully",
    hash="a642fc305053",
    cve="CVE-2014-3646",
    fixed="v3.18-rc2",
    vulnerable="KVM_RUN ends with an internal error: INVVPID of the guest kills its VM",
    correct="INVVPID outside VMX operation is #UD",
    death="VmLost: internal error",
    edit={
        "file": "arch/x86/kvm/vmx/nested.c",
        "function": "nested_vmx_hardware_setup",
        "expression": "exit_handlers[EXIT_REASON_INVVPID] = handle_invvpid;",
        "replacement": "exit_handlers[EXIT_REASON_INVVPID] = 0 ? handle_invvpid : NULL;",
    },
)


@pytest.mark.sdm("INVVPID - Invalidate Translations Based on VPID")
def test_invvpid_outside_vmx_operation(l1: L1) -> None:
    """Any guest can execute it; it needs no VMX operation for that."""
    assert l1.invvpid(2) == Fault(Vector.UD)
