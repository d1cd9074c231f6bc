"""Posted interrupts stay posted while the outstanding-notification bit is clear."""

import pytest

from kvmnest.l1 import L1
from kvmnest.repro import Bug
from kvmnest.vmx import ExitCtl, ExitReason, Field, Msr, PinCtl, Proc2Ctl, ProcCtl, Rflags
from kvmnest.vmx.outcome import Exit, Succeed

BUG = Bug(
    vulnerable="L2 does not get the interrupt",
    correct="L2 gets the interrupt",
    fix=(
        {
            "file": "arch/x86/kvm/vmx/nested.c",
            "function": "vmx_complete_nested_posted_interrupt",
            "expression": "if (!pi_test_and_clear_on(vmx->nested.pi_desc)) return 0;",
            "replacement": "pi_test_and_clear_on(vmx->nested.pi_desc);",
        },
    ),
)

NOTIFICATION, VECTOR = 0xF2, 0x51
PIN = PinCtl.EXTERNAL_INTERRUPT_EXITING | PinCtl.PROCESS_POSTED_INTERRUPTS
PROC = ProcCtl.USE_TPR_SHADOW | ProcCtl.ACTIVATE_SECONDARY_CONTROLS
PROC2 = Proc2Ctl.APIC_REGISTER_VIRTUALIZATION | Proc2Ctl.VIRTUAL_INTERRUPT_DELIVERY


@pytest.mark.sdm("Posted-Interrupt Processing")
@pytest.mark.needs(*PIN, *PROC, *PROC2, ExitCtl.ACKNOWLEDGE_INTERRUPT_ON_EXIT)
def test_notification_without_the_bit(l1: L1) -> None:
    """The processor clears the bit, and never tests it: the notification vector is enough."""
    base = l1.rdmsr(Msr.APIC_BASE)
    assert isinstance(base, Succeed)
    l1.wrmsr(Msr.APIC_BASE, base.value | 0xC00)  # x2APIC mode
    l1.wrmsr(Msr.X2APIC_SIVR, 0x1FF)  # enabled by software
    vmcs = l1.launchable()
    vmcs.set_bits(Field.PIN_BASED_VM_EXEC_CONTROL, PIN)
    vmcs.set_bits(Field.CPU_BASED_VM_EXEC_CONTROL, PROC)
    vmcs.set_bits(Field.SECONDARY_VM_EXEC_CONTROL, PROC2)
    vmcs.set_bits(Field.VM_EXIT_CONTROLS, ExitCtl.ACKNOWLEDGE_INTERRUPT_ON_EXIT)
    vmcs[Field.VIRTUAL_APIC_PAGE_ADDR] = l1.alloc()
    vmcs[Field.TPR_THRESHOLD] = vmcs[Field.GUEST_INTR_STATUS] = 0
    vmcs[Field.POSTED_INTR_DESC_ADDR] = descriptor = l1.alloc()
    vmcs[Field.POSTED_INTR_NV] = NOTIFICATION
    vmcs[Field.GUEST_RFLAGS] = 0x2 | Rflags.IF
    start = vmcs[Field.GUEST_RIP]
    l1.write_int(descriptor, 1 << VECTOR, 64)
    l1.wrmsr(Msr.X2APIC_SELF_IPI, NOTIFICATION)  # waits: L1 runs with RFLAGS.IF 0
    # Both L2 and its handlers end in VMCALL.
    seen = l1.vmlaunch()
    assert seen == Exit(ExitReason.VMCALL)
    assert seen.rip != start
