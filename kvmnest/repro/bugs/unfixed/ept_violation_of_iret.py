"""The exit for an EPT violation of IRET does not say that NMIs are unblocked."""

import pytest

from kvmnest.l1 import L1
from kvmnest.repro import Bug
from kvmnest.vmx import ExitReason, Field, Interruptibility, PinCtl, Proc2Ctl
from kvmnest.vmx.outcome import Exit

BUG = Bug(
    vulnerable="bit 12 of the exit qualification is 0, and NMIs are blocked",
    correct="bit 12 of the exit qualification is 1, and NMIs are not blocked",
    fix=(
        {
            "file": "arch/x86/kvm/vmx/nested.c",
            "function": "nested_ept_inject_page_fault",
            "expression": "exit_qualification |= vmx_get_exit_qual(vcpu) & mask;",
            "replacement": """
            {
                exit_qualification |= vmx_get_exit_qual(vcpu) & mask;
                if (!(vmx->idt_vectoring_info & VECTORING_INFO_VALID_MASK) &&
                    (vmx_get_exit_qual(vcpu) & INTR_INFO_UNBLOCK_NMI)) {
                    exit_qualification |= INTR_INFO_UNBLOCK_NMI;
                    vmx_set_nmi_mask(vcpu, false);
                }
            }""",
        },
    ),
)

IRETQ = b"\x48\xcf"


@pytest.mark.sdm("Exit Qualification for EPT Violations")
@pytest.mark.needs(Proc2Ctl.ENABLE_EPT, PinCtl.NMI_EXITING, PinCtl.VIRTUAL_NMIS)
def test_iret_with_a_stack_that_is_not_mapped(l1: L1) -> None:
    """IRET ends blocking by NMI even if it meets an EPT violation, which bit 12 tells L1."""
    vmcs = l1.launchable(l2=IRETQ, ept=True)
    stack = l1.alloc()
    l1.write_int(l1.sym("ept_pml4_pt") + stack // 4096 * 8, 0)
    vmcs.set_bits(Field.PIN_BASED_VM_EXEC_CONTROL, PinCtl.NMI_EXITING | PinCtl.VIRTUAL_NMIS)
    vmcs[Field.GUEST_INTERRUPTIBILITY_INFO] = Interruptibility.NMI
    vmcs[Field.GUEST_RSP] = stack + 0x800
    seen = l1.vmlaunch()
    assert seen == Exit(ExitReason.EPT_VIOLATION)
    (blocking,) = vmcs.read(Field.GUEST_INTERRUPTIBILITY_INFO)
    assert (seen.qualification >> 12 & 1, blocking) == (1, 0)
