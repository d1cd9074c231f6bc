"""INVVPID accepts a linear address that is not canonical."""

import pytest

from kvmnest.l1 import L1
from kvmnest.repro import Bug
from kvmnest.vmx import EptVpidCap, VmxError
from kvmnest.vmx.outcome import VMfailValid

BUG = Bug(
    subject="kvm: nVMX: Check memory operand to INVVPID",
    hash="403526054a38",
    fixed="v4.13",
    vulnerable="INVVPID of a linear address that is not canonical succeeds",
    correct="INVVPID fails with error 28",
    edit={
        "file": "arch/x86/kvm/vmx/nested.c",
        "function": "handle_invvpid",
        "expression": "if (!operand.vpid || is_noncanonical_address(operand.gla, vcpu))",
        "replacement": "if (!operand.vpid)",
    },
    newer=(
        {
            "since": "6.12",
            "expression": "is_noncanonical_invlpg_address(operand.gla, vcpu))",
            "replacement": "0)",
        },
    ),
)

INDIVIDUAL_ADDRESS = 0


@pytest.mark.sdm("INVVPID - Invalidate Translations Based on VPID")
@pytest.mark.needs(EptVpidCap.INVVPID, EptVpidCap.INVVPID_INDIVIDUAL_ADDRESS)
def test_linear_address_not_canonical(l1: L1) -> None:
    """The linear address of the individual-address type must be canonical."""
    l1.launchable()
    seen = l1.invvpid(INDIVIDUAL_ADDRESS, 1, 0x8000000000000000)
    assert seen == VMfailValid(VmxError.INVALID_OPERAND_TO_INVEPT_INVVPID)
