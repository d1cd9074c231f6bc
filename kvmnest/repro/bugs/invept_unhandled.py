"""No handler for INVEPT of L1."""

import pytest

from kvmnest.l1 import L1
from kvmnest.repro import Bug
from kvmnest.vmx import Vector
from kvmnest.vmx.outcome import Fault

BUG = Bug(
    subject="nEPT: Nested INVEPT",
    hash="bfd0a56b9000",
    cve="CVE-2014-3645",
    fixed="v3.12-rc1",
    vulnerable="KVM_RUN ends with an internal error: INVEPT of the guest kills its VM",
    correct="INVEPT outside VMX operation is #UD",
    death="VmLost: internal error",
    edit={
        "file": "arch/x86/kvm/vmx/nested.c",
        "function": "nested_vmx_hardware_setup",
        "expression": "exit_handlers[EXIT_REASON_INVEPT] = handle_invept;",
        "replacement": "exit_handlers[EXIT_REASON_INVEPT] = 0 ? handle_invept : NULL;",
    },
)


@pytest.mark.sdm("INVEPT - Invalidate Translations Derived from EPT")
def test_invept_outside_vmx_operation(l1: L1) -> None:
    """Any guest can execute it; it needs no VMX operation for that."""
    assert l1.invept(2) == Fault(Vector.UD)
