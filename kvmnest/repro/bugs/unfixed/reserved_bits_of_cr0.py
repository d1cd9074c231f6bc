"""Reserved bits of CR0 that L2 writes are read back, and saved at the exit."""

import pytest

from kvmnest.l1 import L1, code
from kvmnest.repro import Bug
from kvmnest.vmx import ExitReason, Field
from kvmnest.vmx.outcome import Exit

BUG = Bug(
    vulnerable="CR0 of L2 has a reserved bit set, and ET clear",
    correct="CR0 is as it was",
    fix=(
        {
            "file": "arch/x86/kvm/vmx/vmx.c",
            "function": "handle_set_cr0",
            "expression": "vmcs_writel(CR0_READ_SHADOW, orig_val);",
            "replacement": """
                vmcs_writel(CR0_READ_SHADOW, (orig_val & ~CR0_RESERVED_BITS) | X86_CR0_ET);""",
        },
    ),
)

# BTS RAX, 19; BTR RAX, 4 (ET)
CHANGED = b"\x48\x0f\xba\xe8\x13" + b"\x48\x0f\xba\xf0\x04"


@pytest.mark.sdm("Control Registers")
def test_reserved_bits(l1: L1) -> None:
    """MOV to CR0 does not change bits that are reserved, nor ET."""
    move = code.mov_from_cr(0) + CHANGED + code.mov_to_cr(0) + code.mov_from_cr(0)
    vmcs = l1.launchable(move)
    before = vmcs[Field.GUEST_CR0]
    seen = l1.vmlaunch()
    assert seen == Exit(ExitReason.VMCALL)
    assert (seen.regs["rax"], vmcs[Field.GUEST_CR0]) == (before, before)
