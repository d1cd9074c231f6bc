"""An interrupt makes L2 exit before an open interrupt window does."""

import pytest

from kvmnest.l1 import L1, code
from kvmnest.repro import Bug
from kvmnest.vmx import ExitCtl, ExitReason, Field, Msr, PinCtl, ProcCtl
from kvmnest.vmx.outcome import Exit, Succeed

BUG = Bug(
    vulnerable="the exit is for the external interrupt",
    correct="the exit is for the interrupt window",
    fix=(
        {
            "file": "arch/x86/kvm/vmx/nested.c",
            "function": "vmx_check_nested_events",
            "expression": "if (kvm_cpu_has_interrupt(vcpu) && !vmx_interrupt_blocked(vcpu)) {",
            "replacement": """
                if (kvm_cpu_has_interrupt(vcpu) && nested_exit_on_intr(vcpu) &&
                    nested_cpu_has(get_vmcs12(vcpu), CPU_BASED_INTR_WINDOW_EXITING) &&
                    (vmx_get_rflags(vcpu) & X86_EFLAGS_IF) &&
                    !(vmcs_read32(GUEST_INTERRUPTIBILITY_INFO) &
                      (GUEST_INTR_STATE_STI | GUEST_INTR_STATE_MOV_SS))) {
                        if (block_nested_events)
                                return -EBUSY;
                        nested_vmx_vmexit(vcpu, EXIT_REASON_INTERRUPT_WINDOW, 0, 0);
                        return 0;
                }
                if (kvm_cpu_has_interrupt(vcpu) && !vmx_interrupt_blocked(vcpu)) {""",
        },
    ),
)

X2APIC_ON, ENABLED, VECTOR = 0xC00, 0x1FF, 0x51


@pytest.mark.sdm("Other Causes of VM Exits")
def test_interrupt_while_the_window_is_open(l1: L1) -> None:
    """Exits for an interrupt window take priority over external interrupts."""
    base = l1.rdmsr(Msr.APIC_BASE)
    assert isinstance(base, Succeed)
    for msr, value in (
        (Msr.APIC_BASE, base.value | X2APIC_ON),
        (Msr.X2APIC_SIVR, ENABLED),
        (Msr.X2APIC_SELF_IPI, VECTOR),
    ):
        assert l1.wrmsr(msr, value) == Succeed()
    vmcs = l1.launchable(code.NOP)
    vmcs[Field.PIN_BASED_VM_EXEC_CONTROL] |= PinCtl.EXTERNAL_INTERRUPT_EXITING
    vmcs[Field.CPU_BASED_VM_EXEC_CONTROL] |= ProcCtl.INTERRUPT_WINDOW_EXITING
    vmcs[Field.VM_EXIT_CONTROLS] &= ~ExitCtl.ACKNOWLEDGE_INTERRUPT_ON_EXIT
    vmcs[Field.GUEST_RFLAGS] = 0x202
    assert l1.vmlaunch() == Exit(ExitReason.INTERRUPT_WINDOW)
