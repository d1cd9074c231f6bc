"""Null selector of HOST_TR is accepted."""

import pytest

from kvmnest.l1 import L1
from kvmnest.repro import Bug
from kvmnest.vmx import Field, VmxError
from kvmnest.vmx.outcome import VMfailValid

BUG = Bug(
    subject=(
        "KVM nVMX: Check Host Segment Registers and Descriptor Tables on vmentry of nested guests"
    ),
    since="v3.1",
    since_by="source",
    fixed="v5.3-rc1",
    vulnerable="L2 runs with a null selector in HOST_TR_SELECTOR",
    correct="VM entry fails with error 8, an invalid host-state field",
    edit={
        "file": "arch/x86/kvm/vmx/nested.c",
        "function": "nested_vmx_check_host_state",
        "expression": "CC(vmcs12->host_tr_selector == 0) ||",
        "replacement": "",
    },
)


@pytest.mark.sdm("Checks on Host Segment and Descriptor-Table Registers")
def test_null_tr(l1: L1) -> None:
    """The selector of TR must not be null."""
    vmcs = l1.launchable()
    vmcs[Field.HOST_TR_SELECTOR] = 0
    assert l1.vmlaunch() == VMfailValid(VmxError.ENTRY_INVALID_HOST_STATE_FIELD)
