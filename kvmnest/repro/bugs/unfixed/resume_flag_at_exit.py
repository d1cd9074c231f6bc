"""The exit for a fault that KVM raises in L2 saves RFLAGS without RF."""

import pytest

from kvmnest.l1 import L1, code
from kvmnest.repro import Bug
from kvmnest.vmx import ExitReason, Field, Rflags, Vector
from kvmnest.vmx.outcome import Exit

BUG = Bug(
    vulnerable="RF is 0 in the saved RFLAGS",
    correct="RF is 1, as for a fault that the processor raises",
    fix=(
        {
            "file": "arch/x86/kvm/vmx/nested.c",
            "function": "nested_vmx_inject_exception_vmexit",
            "expression": """
                nested_vmx_vmexit(vcpu, EXIT_REASON_EXCEPTION_NMI, intr_info, exit_qual);""",
            "replacement": """
                if (!kvm_exception_is_soft(ex->vector) && ex->vector != DB_VECTOR &&
                    ex->vector != DF_VECTOR && ex->vector != MC_VECTOR)
                    vmx_set_rflags(vcpu, vmx_get_rflags(vcpu) | X86_EFLAGS_RF);
                nested_vmx_vmexit(vcpu, EXIT_REASON_EXCEPTION_NMI, intr_info, exit_qual);""",
        },
    ),
)


@pytest.mark.sdm("Saving RIP, RSP, RFLAGS, and SSP")
def test_refused_move_to_cr8(l1: L1) -> None:
    """An exit for a fault saves the RFLAGS that the fault's delivery would have pushed."""
    vmcs = l1.launchable(code.mov("rax", 1 << 4) + code.mov_to_cr(8))
    vmcs[Field.EXCEPTION_BITMAP] = 1 << Vector.GP
    assert l1.vmlaunch() == Exit(ExitReason.EXCEPTION_NMI)
    assert vmcs[Field.GUEST_RFLAGS] & Rflags.RF == Rflags.RF
