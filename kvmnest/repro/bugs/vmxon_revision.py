"""Revision identifier of the VMXON region is not checked."""

import pytest

from kvmnest.l1 import L1
from kvmnest.repro import Bug
from kvmnest.vmx.outcome import (
    VMfailInvalid,
)

BUG = Bug(
    subject="KVM: nVMX: additional checks on vmxon region",
    hash="3573e22cfeca",
    since="v3.1",
    since_by="source",
    fixed="v3.16",
    vulnerable="VMXON takes a region with a wrong revision identifier",
    correct="VMXON is VMfailInvalid",
    edit={
        "file": "arch/x86/kvm/vmx/nested.c",
        "function": "handle_vmxon",
        "expression": "|| revision != VMCS12_REVISION)",
        "replacement": ")",
    },
)


@pytest.mark.sdm("VMXON Region")
def test_wrong_revision(l1: L1) -> None:
    """The region must begin with the identifier of IA32_VMX_BASIC."""
    region = l1.prepare_region(l1.sym("vmxon_region"), l1.caps.basic.revision_id ^ 1)
    assert l1.vmxon(region) == VMfailInvalid()
