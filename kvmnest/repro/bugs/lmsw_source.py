"""The exit of LMSW is decided by RAX, not by the operand."""

import pytest

from kvmnest.l1 import L1
from kvmnest.repro import Bug
from kvmnest.vmx import Cr0, ExitReason, Field
from kvmnest.vmx.outcome import Exit

BUG = Bug(
    subject="KVM: nVMX: Fix handling of lmsw instruction",
    hash="e1d39b17e044",
    since="v3.1",
    since_by="source",
    fixed="v4.12",
    vulnerable="LMSW executes: KVM looks for the new PE in RAX",
    correct="LMSW exits: it would set a bit whose read shadow is 0",
    edit={
        "file": "arch/x86/kvm/vmx/nested.c",
        "function": "nested_vmx_exit_handled_cr",
        "expression": "val = (exit_qualification >> LMSW_SOURCE_DATA_SHIFT) & 0x0f;",
        "replacement": "val = kvm_register_read(vcpu, (exit_qualification >> 8) & 15);",
    },
)

LMSW_BX = b"\x0f\x01\xf3"


@pytest.mark.sdm("Instructions That Cause VM Exits Conditionally")
def test_lmsw_of_another_register(l1: L1) -> None:
    """L1 owns PE and shows L2 a 0; BX has PE set, RAX is 0."""
    vmcs = l1.launchable(l2=LMSW_BX)
    vmcs[Field.CR0_GUEST_HOST_MASK], vmcs[Field.CR0_READ_SHADOW] = Cr0.PE, 0
    assert l1.vmlaunch(regs={"rax": 0, "rbx": 1}) == Exit(ExitReason.CR_ACCESS)
