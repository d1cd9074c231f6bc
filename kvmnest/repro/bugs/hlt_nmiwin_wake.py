"""NMI-window exiting does not end the HLT state of an entry."""

import pytest

from kvmnest.l1 import L1
from kvmnest.repro import Bug
from kvmnest.vmx import ActivityState, ExitReason, Field, Misc, PinCtl, ProcCtl
from kvmnest.vmx.outcome import Exit

BUG = Bug(
    subject="kvm: nVMX: NMI-window and interrupt-window exiting should wake L2 from HLT",
    since="6dfacadd5858",
    since_by="Fixes",
    fixed="v5.0-rc1",
    vulnerable="L2 sleeps: no exit comes",
    correct="the NMI-window exit comes at once",
    death="VmLost: hang",
    edit={
        "file": "arch/x86/kvm/vmx/nested.c",
        "function": "nested_vmx_run",
        "expression": "!nested_cpu_has(vmcs12, CPU_BASED_NMI_WINDOW_EXITING) &&",
        "replacement": "1 &&",
    },
)


@pytest.mark.sdm("Non-Maskable Interrupt-Window Exiting")
@pytest.mark.needs(PinCtl.VIRTUAL_NMIS, ProcCtl.NMI_WINDOW_EXITING, Misc.ACTIVITY_HLT)
def test_open_window_of_a_halted_l2(l1: L1) -> None:
    """The exit comes in the HLT state too, with RFLAGS.IF set or clear."""
    vmcs = l1.launchable()
    vmcs.set_bits(Field.PIN_BASED_VM_EXEC_CONTROL, PinCtl.NMI_EXITING | PinCtl.VIRTUAL_NMIS)
    vmcs.set_bits(Field.CPU_BASED_VM_EXEC_CONTROL, ProcCtl.NMI_WINDOW_EXITING)
    vmcs[Field.GUEST_ACTIVITY_STATE] = ActivityState.HLT
    assert l1.vmlaunch() == Exit(ExitReason.NMI_WINDOW)
