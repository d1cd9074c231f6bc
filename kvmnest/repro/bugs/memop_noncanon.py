"""Memory operand with a non-canonical address gives no #GP."""

import pytest

from kvmnest.l1 import L1
from kvmnest.repro import Bug
from kvmnest.vmx import Vector
from kvmnest.vmx.outcome import Fault

BUG = Bug(
    subject="KVM: nVMX: VMX instructions: add checks for #GP/#SS exceptions",
    hash="f9eb4af67c9d",
    since="v3.1",
    since_by="source",
    fixed="v4.1",
    vulnerable="VMCLEAR reads its operand from somewhere else",
    correct="VMCLEAR is #GP(0)",
    edit={
        "file": "arch/x86/kvm/vmx/nested.c",
        "function": "get_vmx_mem_address",
        "expression": "exn = is_noncanonical_address(*ret, vcpu);",
        "replacement": "exn = false;",
    },
    newer=(
        {
            "since": "6.12",
            "expression": "exn = is_noncanonical_address(*ret, vcpu, 0);",
        },
    ),
)


@pytest.mark.sdm("VMCLEAR - Clear Virtual-Machine Control Structure")
def test_operand_not_canonical(l1: L1) -> None:
    """A memory operand at a linear address that is not canonical is #GP(0)."""
    l1.enter_vmx()
    assert l1.vmclear(0, at=0x8000000000000000) == Fault(Vector.GP, error_code=0)
