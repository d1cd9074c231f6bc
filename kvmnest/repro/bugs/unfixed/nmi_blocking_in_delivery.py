"""The exit for a fault in the delivery of an injected NMI shows NMIs as not blocked."""

import pytest

from kvmnest.l1 import L1, code
from kvmnest.repro import Bug
from kvmnest.vmx import ExitReason, Field, IntrType, Vector, intr_info
from kvmnest.vmx.outcome import Exit

BUG = Bug(
    vulnerable="blocking by NMI is 0",
    correct="blocking by NMI is 1",
    fix=(
        {
            "file": "arch/x86/kvm/vmx/nested.c",
            "function": "vmcs12_save_pending_event",
            "expression": """
                vmcs12->idt_vectoring_info_field =
                    INTR_TYPE_NMI_INTR | INTR_INFO_VALID_MASK | NMI_VECTOR;""",
            "replacement": """
                vmcs12->idt_vectoring_info_field =
                    INTR_TYPE_NMI_INTR | INTR_INFO_VALID_MASK | NMI_VECTOR;
                vmcs12->guest_interruptibility_info |= GUEST_INTR_STATE_NMI;""",
        },
    ),
)

NMI = intr_info(Vector.NMI, IntrType.NMI)
BLOCKED = 8


@pytest.mark.sdm("Architectural State Before a VM Exit")
def test_fault_in_the_delivery_of_an_nmi(l1: L1) -> None:
    """Blocking by NMI is in effect before an exit for an exception in an NMI's delivery."""
    vmcs = l1.launchable(code.NOP)
    vmcs[Field.VM_ENTRY_INTR_INFO_FIELD] = NMI
    vmcs[Field.GUEST_IDTR_LIMIT] = 0
    vmcs[Field.EXCEPTION_BITMAP] = 1 << Vector.GP
    assert l1.vmlaunch() == Exit(ExitReason.EXCEPTION_NMI, idt_info=NMI)
    assert vmcs[Field.GUEST_INTERRUPTIBILITY_INFO] & BLOCKED == BLOCKED
