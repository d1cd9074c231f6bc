"""MOV to CR8 in L2 ignores bits 63:8 instead of faulting."""

import pytest

from kvmnest.l1 import L1, code
from kvmnest.repro import Bug
from kvmnest.vmx import ExitReason, Field, IntrType, ProcCtl, Vector, intr_info
from kvmnest.vmx.outcome import Exit

BUG = Bug(
    vulnerable="L2 writes a reserved bit of CR8 without a fault",
    correct="L2 takes #GP",
    fix=(
        {
            "file": "arch/x86/kvm/vmx/vmx.c",
            "function": "handle_cr",
            "expression": "err = kvm_set_cr8(vcpu, cr8);",
            "replacement": "err = kvm_set_cr8(vcpu, val);",
        },
    ),
)


@pytest.mark.sdm("MOV - Move to/from Control Registers")
def test_high_bit_of_cr8(l1: L1) -> None:
    """An attempt to write a 1 to a reserved bit of CR8 is #GP(0)."""
    vmcs = l1.launchable(code.mov("rax", 1 << 8) + code.mov_to_cr(8))
    # Without a TPR shadow the move is KVM's.
    assert not vmcs[Field.CPU_BASED_VM_EXEC_CONTROL] & ProcCtl.USE_TPR_SHADOW
    vmcs[Field.EXCEPTION_BITMAP] = 1 << Vector.GP
    info = intr_info(Vector.GP, IntrType.HARDWARE_EXCEPTION, error_code=True)
    assert l1.vmlaunch() == Exit(ExitReason.EXCEPTION_NMI, intr_info=info, intr_error=0)
