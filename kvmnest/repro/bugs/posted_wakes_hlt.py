"""A posted interrupt does not wake L2 from HLT."""

import pytest

from kvmnest.l1 import L1, code
from kvmnest.repro import Bug
from kvmnest.vmx import ExitCtl, ExitReason, Field, Msr, PinCtl, Proc2Ctl, ProcCtl
from kvmnest.vmx.outcome import Exit

BUG = Bug(
    subject="KVM: nVMX: Check for pending posted interrupts when looking for nested events",
    hash="27c4fa42b11a",
    fixed="v6.11",
    vulnerable="L2 sleeps on: KVM looks at RVI only",
    correct="L2 wakes and gets the posted interrupt",
    death="VmLost: hang",
    edit_since="6.11",
    edit={
        "file": "arch/x86/kvm/vmx/nested.c",
        "function": "vmx_has_nested_events",
        "expression": "if (vmx->nested.pi_pending && vmx->nested.pi_desc &&",
        "replacement": "if (0 &&",
    },
)

NOTIFICATION, POSTED = 0xF2, 0x51
DELIVERY = Proc2Ctl.VIRTUALIZE_X2APIC_MODE | Proc2Ctl.VIRTUAL_INTERRUPT_DELIVERY
PINS = PinCtl.EXTERNAL_INTERRUPT_EXITING | PinCtl.PROCESS_POSTED_INTERRUPTS


@pytest.mark.sdm("Posted-Interrupt Processing")
@pytest.mark.needs(PINS, DELIVERY, ProcCtl.USE_TPR_SHADOW, ExitCtl.ACKNOWLEDGE_INTERRUPT_ON_EXIT)
def test_notification_to_a_halted_l2(l1: L1) -> None:
    """The notification comes from the timer of L1's APIC while L2 sleeps."""
    l1.wrmsr(Msr.APIC_BASE, l1.rdmsr(Msr.APIC_BASE).value | 0xC00)  # x2APIC mode
    l1.wrmsr(Msr.X2APIC_SIVR, 0x1FF)  # enabled by software
    vmcs, descriptor = l1.launchable(l2=code.HLT + code.NOP), l1.alloc()
    vmcs.set_bits(Field.PIN_BASED_VM_EXEC_CONTROL, PINS)
    proc = ProcCtl.ACTIVATE_SECONDARY_CONTROLS | ProcCtl.USE_TPR_SHADOW
    vmcs.set_bits(Field.CPU_BASED_VM_EXEC_CONTROL, proc)
    vmcs.set_bits(Field.SECONDARY_VM_EXEC_CONTROL, DELIVERY)
    vmcs.set_bits(Field.VM_EXIT_CONTROLS, ExitCtl.ACKNOWLEDGE_INTERRUPT_ON_EXIT)
    vmcs[Field.VIRTUAL_APIC_PAGE_ADDR], vmcs[Field.TPR_THRESHOLD] = l1.alloc(), 0
    vmcs[Field.POSTED_INTR_NV], vmcs[Field.POSTED_INTR_DESC_ADDR] = NOTIFICATION, descriptor
    vmcs[Field.GUEST_RFLAGS] = 0x202
    l1.write_int(descriptor, 1 << 256 | 1 << POSTED, 64)  # outstanding, and the vector
    l1.wrmsr(Msr.X2APIC_LVT_TIMER, NOTIFICATION)
    l1.wrmsr(Msr.X2APIC_INIT_COUNT, 50_000_000)  # 0.1 s: L2 has halted by then
    assert l1.vmlaunch() == Exit(ExitReason.VMCALL)  # of a handler of L2, or at its end
    assert l1.l2_frame(1) == [POSTED]
