"""Blocking by NMI is set again for an IRET that faulted."""

import pytest

from kvmnest.l1 import L1
from kvmnest.repro import Bug
from kvmnest.vmx import Field, Interruptibility, PinCtl, Vector

BUG = Bug(
    vulnerable="L1 finds blocking by NMI in the interruptibility state of L2",
    correct="NMIs are not blocked after an IRET that faulted, and bit 12 tells L1",
    fix=(
        {
            "file": "arch/x86/kvm/vmx/nested.c",
            "function": "nested_vmx_reflect_vmexit",
            "expression": "reflect_vmexit:",
            "replacement": """
                if (exit_reason.basic == EXIT_REASON_EXCEPTION_NMI &&
                    (exit_intr_info & INTR_INFO_UNBLOCK_NMI) &&
                    (exit_intr_info & INTR_INFO_VECTOR_MASK) != DF_VECTOR &&
                    !(vmx->idt_vectoring_info & VECTORING_INFO_VALID_MASK))
                    vmx_set_nmi_mask(vcpu, false);
                reflect_vmexit:""",
        },
    ),
)

IRETQ = b"\x48\xcf"
UNMAPPED = 0x50000000


@pytest.mark.sdm("Resuming Guest Software after Handling an Exception")
@pytest.mark.needs(PinCtl.NMI_EXITING, PinCtl.VIRTUAL_NMIS)
def test_iret_that_faults(l1: L1) -> None:
    """IRET ends blocking by NMI even if it faults; bit 12 tells L1 to set it if it resumes L2."""
    vmcs = l1.launchable(l2=IRETQ)
    vmcs.set_bits(Field.PIN_BASED_VM_EXEC_CONTROL, PinCtl.NMI_EXITING | PinCtl.VIRTUAL_NMIS)
    vmcs[Field.GUEST_INTERRUPTIBILITY_INFO] = Interruptibility.NMI
    vmcs[Field.GUEST_RSP] = UNMAPPED
    vmcs[Field.EXCEPTION_BITMAP] = 1 << Vector.PF
    seen = l1.vmlaunch()
    (blocking,) = vmcs.read(Field.GUEST_INTERRUPTIBILITY_INFO)
    assert (seen.intr_info >> 12 & 1, blocking) == (1, 0)
