"""A virtual interrupt does not wake an L2 that is entered in the HLT state, if VPPR is old."""

import pytest

from kvmnest.l1 import L1
from kvmnest.repro import Bug
from kvmnest.vmx import (
    ActivityState,
    ExitReason,
    Field,
    Misc,
    PinCtl,
    Proc2Ctl,
    ProcCtl,
    Rflags,
)
from kvmnest.vmx.outcome import Exit

BUG = Bug(
    vulnerable="L2 stays halted until its time is over",
    correct="L2 gets the interrupt at once",
    fix=(
        {
            "file": "arch/x86/kvm/vmx/nested.c",
            "function": "vmx_has_nested_events",
            "expression": "vppr = *((u32 *)(vapic + APIC_PROCPRI));",
            "replacement": """
            {
                int svi = vmcs_read16(GUEST_INTR_STATUS) >> 8;

                vppr = *((u32 *)(vapic + APIC_TASKPRI)) & 0xff;
                if ((svi & 0xf0) > (vppr & 0xf0))
                    vppr = svi & 0xf0;
            }""",
        },
    ),
)

VPPR, VIRR, VECTOR = 0xA0, 0x200, 0x51
PIN = PinCtl.EXTERNAL_INTERRUPT_EXITING | PinCtl.ACTIVATE_PREEMPTION_TIMER
PROC = ProcCtl.USE_TPR_SHADOW | ProcCtl.ACTIVATE_SECONDARY_CONTROLS
PROC2 = Proc2Ctl.APIC_REGISTER_VIRTUALIZATION | Proc2Ctl.VIRTUAL_INTERRUPT_DELIVERY


@pytest.mark.sdm("PPR Virtualization")
@pytest.mark.needs(Misc.ACTIVITY_HLT, *PIN, *PROC, *PROC2)
def test_interrupt_that_is_pending_at_the_entry(l1: L1) -> None:
    """VM entry computes VPPR anew before it looks whether an interrupt can be delivered."""
    vmcs = l1.launchable()
    vmcs.set_bits(Field.PIN_BASED_VM_EXEC_CONTROL, PIN)
    vmcs.set_bits(Field.CPU_BASED_VM_EXEC_CONTROL, PROC)
    vmcs.set_bits(Field.SECONDARY_VM_EXEC_CONTROL, PROC2)
    vmcs[Field.VIRTUAL_APIC_PAGE_ADDR] = page = l1.alloc()
    vmcs[Field.TPR_THRESHOLD] = 0
    vmcs[Field.GUEST_INTR_STATUS] = VECTOR  # RVI
    l1.write_int(page + VIRR + 16 * (VECTOR // 32), 1 << VECTOR % 32, 4)
    l1.write_int(page + VPPR, 0xF0, 4)  # above the vector; VTPR and SVI, which count, are 0
    vmcs[Field.VMX_PREEMPTION_TIMER_VALUE] = 100_000  # ends the HLT state if nothing else does
    vmcs[Field.GUEST_ACTIVITY_STATE] = ActivityState.HLT
    vmcs[Field.GUEST_RFLAGS] = 0x2 | Rflags.IF
    assert l1.vmlaunch() == Exit(ExitReason.VMCALL)  # of L2's handler
