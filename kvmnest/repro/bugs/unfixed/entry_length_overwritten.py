"""A VM exit during the delivery of INT n changes the VM-entry instruction length."""

import pytest

from kvmnest.l1 import L1, code
from kvmnest.repro import Bug
from kvmnest.vmx import ExitReason, Field, Vector
from kvmnest.vmx.outcome import Exit

BUG = Bug(
    vulnerable="the VM-entry instruction length of L1 is the length of L2's INT n",
    correct="the VM-entry instruction length is what L1 wrote",
    fix=(
        {
            "file": "arch/x86/kvm/vmx/nested.c",
            "function": "vmcs12_save_pending_event",
            "expression": "vmcs12->vm_entry_instruction_len =",
            "replacement": "vmcs12->vm_exit_instruction_len =",
        },
    ),
)

UNMAPPED = 0x50000000


@pytest.mark.sdm("VM-Entry Controls for Event Injection")
def test_length_after_an_exit(l1: L1) -> None:
    """A VM exit clears the valid bit of the event to inject, and changes no other such field."""
    vmcs = l1.launchable(l2=code.int_n(0x80))
    vmcs[Field.GUEST_RSP] = UNMAPPED  # a page fault in the delivery
    vmcs[Field.EXCEPTION_BITMAP] = 1 << Vector.PF
    vmcs[Field.VM_ENTRY_INSTRUCTION_LEN] = 15
    assert l1.vmlaunch() == Exit(ExitReason.EXCEPTION_NMI)
    assert vmcs.read(Field.VM_ENTRY_INSTRUCTION_LEN) == (15,)
