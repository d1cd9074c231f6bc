"""An interrupt that waits makes L2 exit from HLT as if it were active."""

import pytest

from kvmnest.l1 import L1
from kvmnest.repro import Bug
from kvmnest.vmx import ActivityState, ExitReason, Field, Misc, Msr, PinCtl
from kvmnest.vmx.outcome import Exit, Succeed

BUG = Bug(
    vulnerable="the activity state saved is active",
    correct="the activity state saved is HLT",
    fix=(
        {
            "file": "arch/x86/kvm/vmx/nested.c",
            "function": "nested_vmx_run",
            "expression": "return kvm_emulate_halt_noskip(vcpu);",
            "replacement": """
                if (lapic_in_kernel(vcpu)) {
                    kvm_set_mp_state(vcpu, KVM_MP_STATE_HALTED);
                    return 1;
                }
                return kvm_emulate_halt_noskip(vcpu);""",
        },
    ),
)


@pytest.mark.sdm("Architectural State Before a VM Exit")
@pytest.mark.needs(Misc.ACTIVITY_HLT, PinCtl.EXTERNAL_INTERRUPT_EXITING)
def test_interrupt_that_waits(l1: L1) -> None:
    """An event that causes a VM exit directly does not end the HLT state before it is saved."""
    base = l1.rdmsr(Msr.APIC_BASE)
    assert isinstance(base, Succeed)
    l1.wrmsr(Msr.APIC_BASE, base.value | 0xC00)  # x2APIC mode
    l1.wrmsr(Msr.X2APIC_SIVR, 0x1FF)  # enabled by software
    vmcs = l1.launchable()
    vmcs.set_bits(Field.PIN_BASED_VM_EXEC_CONTROL, PinCtl.EXTERNAL_INTERRUPT_EXITING)
    vmcs[Field.GUEST_ACTIVITY_STATE] = ActivityState.HLT
    l1.wrmsr(Msr.X2APIC_SELF_IPI, 0x51)  # waits: L1 runs with RFLAGS.IF 0
    assert l1.vmlaunch() == Exit(ExitReason.EXTERNAL_INTERRUPT)
    assert vmcs.read(Field.GUEST_ACTIVITY_STATE) == (ActivityState.HLT,)
