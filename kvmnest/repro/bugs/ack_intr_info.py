"""Acknowledge interrupt on exit gives no vector."""

import pytest

from kvmnest.l1 import L1
from kvmnest.repro import Bug
from kvmnest.vmx import ExitCtl, ExitReason, Field, IntrType, Msr, PinCtl, intr_info
from kvmnest.vmx.outcome import Exit

BUG = Bug(
    subject="KVM: nVMX: Ack and write vector info to intr_info if L1 asks us to",
    fixed="v3.15",
    vulnerable="the exit has no interruption information",
    correct="the exit says which vector it was",
    edit={
        "file": "arch/x86/kvm/vmx/nested.c",
        "function": "nested_vmx_vmexit",
        "expression": (
            "if ((u16)vm_exit_reason == EXIT_REASON_EXTERNAL_INTERRUPT && "
            "nested_exit_intr_ack_set(vcpu)) {"
        ),
        "replacement": "if (0) {",
    },
    newer=(
        {
            "since": "6.12",
            "function": "vmx_check_nested_events",
            "expression": "if (!nested_exit_intr_ack_set(vcpu)) {",
            "replacement": "if (1) {",
        },
    ),
)

VECTOR = 0x51


@pytest.mark.sdm("External interrupts")
@pytest.mark.needs(PinCtl.EXTERNAL_INTERRUPT_EXITING, ExitCtl.ACKNOWLEDGE_INTERRUPT_ON_EXIT)
def test_acknowledged_interrupt(l1: L1) -> None:
    """With "acknowledge interrupt on exit" the interruption information has the vector."""
    l1.wrmsr(Msr.APIC_BASE, l1.rdmsr(Msr.APIC_BASE).value | 0xC00)  # x2APIC mode
    l1.wrmsr(Msr.X2APIC_SIVR, 0x1FF)  # enabled by software
    vmcs = l1.launchable()
    vmcs.set_bits(Field.PIN_BASED_VM_EXEC_CONTROL, PinCtl.EXTERNAL_INTERRUPT_EXITING)
    vmcs.set_bits(Field.VM_EXIT_CONTROLS, ExitCtl.ACKNOWLEDGE_INTERRUPT_ON_EXIT)
    l1.wrmsr(Msr.X2APIC_SELF_IPI, VECTOR)  # waits, since L1 runs with RFLAGS.IF clear
    info = intr_info(VECTOR, IntrType.EXTERNAL_INTERRUPT)
    assert l1.vmlaunch() == Exit(ExitReason.EXTERNAL_INTERRUPT, intr_info=info)
