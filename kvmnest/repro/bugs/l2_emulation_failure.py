"""An instruction of L2 that KVM cannot emulate ends the whole VM."""

import pytest

from kvmnest.l1 import L1
from kvmnest.repro import Bug
from kvmnest.vmx import ExitReason, Field, Proc2Ctl, Vector
from kvmnest.vmx.outcome import Exit

BUG = Bug(
    subject="KVM: X86: Don't report L2 emulation failures to user-space",
    fixed="v2.6.38",
    vulnerable="KVM_RUN ends in an internal error",
    correct="L2 gets #UD",
    death="VmLost: internal error",
    edit={
        "file": "arch/x86/kvm/x86.c",
        "function": "handle_emulation_failure",
        "expression": "if (!is_guest_mode(vcpu) && ",
        "replacement": "if (",
    },
)

FNSAVE = b"\xdd\x37"  # FNSAVE [RDI]
NOWHERE = 0x10000000  # guest-physical, without memory


@pytest.mark.sdm("VMX Non-Root Operation")
@pytest.mark.needs(Proc2Ctl.ENABLE_EPT)
def test_fnsave_to_mmio(l1: L1) -> None:
    """L1, which intercepts #UD, lives on."""
    vmcs = l1.launchable(l2=FNSAVE, ept=True)
    vmcs[Field.EXCEPTION_BITMAP] = 1 << Vector.UD
    assert l1.vmlaunch(regs={"rdi": NOWHERE}) == Exit(ExitReason.EXCEPTION_NMI)
