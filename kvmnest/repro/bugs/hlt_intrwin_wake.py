"""Interrupt-window exiting does not end the HLT state of an entry."""

import pytest

from kvmnest.l1 import L1
from kvmnest.repro import Bug
from kvmnest.vmx import ActivityState, ExitReason, Field, Misc, ProcCtl, Rflags
from kvmnest.vmx.outcome import Exit

BUG = Bug(
    subject="kvm: nVMX: NMI-window and interrupt-window exiting should wake L2 from HLT",
    since="6dfacadd5858",
    since_by="Fixes",
    fixed="v5.0-rc1",
    vulnerable="L2 sleeps: no exit comes",
    correct="the interrupt-window exit comes at once",
    death="VmLost: hang",
    edit={
        "file": "arch/x86/kvm/vmx/nested.c",
        "function": "nested_vmx_run",
        "expression": (
            "!(nested_cpu_has(vmcs12, CPU_BASED_INTR_WINDOW_EXITING) && (vmcs12->guest_rflags & "
            "X86_EFLAGS_IF))) {"
        ),
        "replacement": "1) {",
    },
)


@pytest.mark.sdm("Interrupt-Window Exiting and Virtual-Interrupt Delivery")
@pytest.mark.needs(ProcCtl.INTERRUPT_WINDOW_EXITING, Misc.ACTIVITY_HLT)
def test_open_window_of_a_halted_l2(l1: L1) -> None:
    """The exit comes in the HLT state too, if RFLAGS.IF is set."""
    vmcs = l1.launchable()
    vmcs.set_bits(Field.CPU_BASED_VM_EXEC_CONTROL, ProcCtl.INTERRUPT_WINDOW_EXITING)
    vmcs[Field.GUEST_RFLAGS] = Rflags.IF | 2
    vmcs[Field.GUEST_ACTIVITY_STATE] = ActivityState.HLT
    assert l1.vmlaunch() == Exit(ExitReason.INTERRUPT_WINDOW)
