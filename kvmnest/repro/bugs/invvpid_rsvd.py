"""INVVPID accepts reserved bits of its descriptor."""

import pytest

from kvmnest.l1 import L1
from kvmnest.repro import Bug
from kvmnest.vmx import EptVpidCap, VmxError
from kvmnest.vmx.outcome import VMfailValid

BUG = Bug(
    subject="kvm: nVMX: Validate/check INVVPID operand (2017 series)",
    fixed="v4.13",
    vulnerable="INVVPID of VPID 10001H succeeds",
    correct="INVVPID fails with error 28",
    edit={
        "file": "arch/x86/kvm/vmx/nested.c",
        "function": "handle_invvpid",
        "expression": "if (operand.vpid >> 16)",
        "replacement": "if (0)",
    },
)

SINGLE_CONTEXT = 1


@pytest.mark.sdm("INVVPID - Invalidate Translations Based on VPID")
@pytest.mark.needs(EptVpidCap.INVVPID, EptVpidCap.INVVPID_SINGLE_CONTEXT)
def test_reserved_bits_of_the_descriptor(l1: L1) -> None:
    """Bits 63:16 of the descriptor must be 0."""
    l1.launchable()
    seen = l1.invvpid(SINGLE_CONTEXT, 0x10001)
    assert seen == VMfailValid(VmxError.INVALID_OPERAND_TO_INVEPT_INVVPID)
