"""The exit for an exception that KVM raises says that an IRET unblocked NMIs."""

import pytest

from kvmnest.l1 import L1, code
from kvmnest.repro import Bug
from kvmnest.vmx import (
    ExitReason,
    Field,
    Interruptibility,
    IntrType,
    PinCtl,
    ProcCtl,
    Vector,
    intr_info,
)
from kvmnest.vmx.outcome import Exit

BUG = Bug(
    vulnerable="bit 12 of the interruption information is 1 for RDMSR",
    correct="bit 12 of the interruption information is 0 for RDMSR",
    fix=(
        {
            "file": "arch/x86/kvm/vmx/nested.c",
            "function": "nested_vmx_inject_exception_vmexit",
            "expression": """
                if (!(vmcs12->idt_vectoring_info_field & VECTORING_INFO_VALID_MASK) &&
                    vmx_get_nmi_mask(vcpu))""",
            "replacement": """
                if (vmx_get_exit_reason(vcpu).basic == EXIT_REASON_EXCEPTION_NMI &&
                    !(to_vmx(vcpu)->idt_vectoring_info & VECTORING_INFO_VALID_MASK) &&
                    (vmx_get_intr_info(vcpu) & INTR_INFO_UNBLOCK_NMI))""",
        },
    ),
)


@pytest.mark.sdm("Information for VM Exits Due to Vectored Events")
@pytest.mark.needs(PinCtl.VIRTUAL_NMIS, ProcCtl.USE_MSR_BITMAPS)
def test_fault_of_rdmsr(l1: L1) -> None:
    """Bit 12, "NMI unblocking due to IRET", is 0 when no IRET was executed."""
    vmcs = l1.launchable(l2=code.RDMSR)
    vmcs.set_bits(Field.PIN_BASED_VM_EXEC_CONTROL, PinCtl.NMI_EXITING | PinCtl.VIRTUAL_NMIS)
    vmcs.set_bits(Field.CPU_BASED_VM_EXEC_CONTROL, ProcCtl.USE_MSR_BITMAPS)
    vmcs[Field.MSR_BITMAP] = l1.alloc()  # no MSR exits
    vmcs[Field.GUEST_INTERRUPTIBILITY_INFO] = Interruptibility.NMI
    vmcs[Field.EXCEPTION_BITMAP] = 1 << Vector.GP
    seen = l1.vmlaunch(regs={"rcx": 0x1FFF})  # no such MSR
    info = intr_info(Vector.GP, IntrType.HARDWARE_EXCEPTION, error_code=True)
    assert seen == Exit(ExitReason.EXCEPTION_NMI, intr_info=info)
