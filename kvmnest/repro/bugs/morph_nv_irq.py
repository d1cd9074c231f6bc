"""A posted-interrupt notification that waits in L1's APIC makes the VM entry exit."""

import pytest

from kvmnest.l1 import L1, code
from kvmnest.repro import Bug
from kvmnest.vmx import ExitCtl, ExitReason, Field, Msr, PinCtl, Proc2Ctl, ProcCtl
from kvmnest.vmx.outcome import Exit

BUG = Bug(
    subject="KVM: nVMX: Morph notification vector IRQ on nested VM-Enter to pending PI",
    hash="25bb2cf97139",
    since="705699a13994 (v4.0)",
    since_by="Fixes",
    fixed="v5.9",
    vulnerable="L2 exits with reason 1, external interrupt",
    correct="L2 gets the posted interrupt without an exit",
    edit={
        "file": "arch/x86/kvm/vmx/nested.c",
        "function": "nested_vmx_run",
        "expression": "kvm_apic_has_interrupt(vcpu) == vmx->nested.posted_intr_nv) {",
        "replacement": "0) {",
    },
    newer=(
        {
            "since": "7.2",
            "function": "vmx_check_nested_events",
            "expression": "if (irq == vmx->nested.posted_intr_nv) {",
            "replacement": "if (0) {",
        },
    ),
)

NOTIFICATION, POSTED = 0xF2, 0x51
DELIVERY = Proc2Ctl.VIRTUALIZE_X2APIC_MODE | Proc2Ctl.VIRTUAL_INTERRUPT_DELIVERY
PINS = PinCtl.EXTERNAL_INTERRUPT_EXITING | PinCtl.PROCESS_POSTED_INTERRUPTS


@pytest.mark.sdm("Posted-Interrupt Processing")
@pytest.mark.needs(PINS, DELIVERY, ProcCtl.USE_TPR_SHADOW, ExitCtl.ACKNOWLEDGE_INTERRUPT_ON_EXIT)
def test_notification_before_the_entry(l1: L1) -> None:
    """The notification is sent in VMX root operation, where L1's interrupts are disabled."""
    l1.wrmsr(Msr.APIC_BASE, l1.rdmsr(Msr.APIC_BASE).value | 0xC00)  # x2APIC mode
    l1.wrmsr(Msr.X2APIC_SIVR, 0x1FF)  # enabled by software
    vmcs, descriptor = l1.launchable(l2=code.NOP), l1.alloc()
    vmcs.set_bits(Field.PIN_BASED_VM_EXEC_CONTROL, PINS)
    proc = ProcCtl.ACTIVATE_SECONDARY_CONTROLS | ProcCtl.USE_TPR_SHADOW
    vmcs.set_bits(Field.CPU_BASED_VM_EXEC_CONTROL, proc)
    vmcs.set_bits(Field.SECONDARY_VM_EXEC_CONTROL, DELIVERY)
    vmcs.set_bits(Field.VM_EXIT_CONTROLS, ExitCtl.ACKNOWLEDGE_INTERRUPT_ON_EXIT)
    vmcs[Field.VIRTUAL_APIC_PAGE_ADDR], vmcs[Field.TPR_THRESHOLD] = l1.alloc(), 0
    vmcs[Field.POSTED_INTR_NV], vmcs[Field.POSTED_INTR_DESC_ADDR] = NOTIFICATION, descriptor
    vmcs[Field.GUEST_RFLAGS] = 0x202
    l1.write_int(descriptor, 1 << 256 | 1 << POSTED, 64)  # outstanding, and the vector
    l1.wrmsr(Msr.X2APIC_SELF_IPI, NOTIFICATION)
    assert l1.vmlaunch() == Exit(ExitReason.VMCALL)  # of a handler of L2, or at its end
    assert l1.l2_frame(1) == [POSTED]
