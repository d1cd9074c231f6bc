"""CR3 of an L2 that starts in HLT is lost."""

import pytest

from kvmnest.l1 import L1
from kvmnest.repro import Bug
from kvmnest.vmx import ActivityState, ExitCtl, ExitReason, Field, Misc, Msr, PinCtl

BUG = Bug(
    subject="KVM: nVMX: Always write vmcs02.GUEST_CR3 during nested VM-Enter",
    hash="04f11ef45810",
    fixed="v5.5-rc1",
    vulnerable="GUEST_CR3 is that of the entry before",
    correct="GUEST_CR3 is that of this entry",
    edit={
        "file": "arch/x86/kvm/vmx/nested.c",
        "function": "prepare_vmcs02",
        "expression": "if (enable_ept) vmcs_writel(GUEST_CR3, vmcs12->guest_cr3);",
        "replacement": "",
    },
)


@pytest.mark.sdm("Saving Control Registers, Debug Registers, and MSRs")
@pytest.mark.needs(
    PinCtl.EXTERNAL_INTERRUPT_EXITING, ExitCtl.ACKNOWLEDGE_INTERRUPT_ON_EXIT, Misc.ACTIVITY_HLT
)
def test_cr3_of_a_halted_l2(l1: L1) -> None:
    """An exit from the HLT state saves the CR3 that the entry loaded."""
    l1.wrmsr(Msr.APIC_BASE, l1.rdmsr(Msr.APIC_BASE).value | 0xC00)  # x2APIC mode
    l1.wrmsr(Msr.X2APIC_SIVR, 0x1FF)  # enabled by software
    vmcs = l1.launchable()
    vmcs.set_bits(Field.PIN_BASED_VM_EXEC_CONTROL, PinCtl.EXTERNAL_INTERRUPT_EXITING)
    vmcs.set_bits(Field.VM_EXIT_CONTROLS, ExitCtl.ACKNOWLEDGE_INTERRUPT_ON_EXIT)
    l1.vmlaunch()
    table = l1.alloc()
    l1.write(table, l1.read(vmcs[Field.GUEST_CR3], 4096))
    vmcs[Field.GUEST_CR3] = table
    vmcs[Field.GUEST_ACTIVITY_STATE] = ActivityState.HLT
    l1.wrmsr(Msr.X2APIC_LVT_TIMER, 0x51)
    l1.wrmsr(Msr.X2APIC_INIT_COUNT, 50_000_000)  # 0.1 s: L2 has halted by then
    seen = l1.vmresume()
    assert (seen.reason, vmcs[Field.GUEST_CR3]) == (ExitReason.EXTERNAL_INTERRUPT, table)
