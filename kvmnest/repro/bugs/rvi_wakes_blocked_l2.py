"""A virtual interrupt that L2 blocks wakes it from HLT."""

import pytest

from kvmnest.l1 import L1, code
from kvmnest.repro import Bug
from kvmnest.vmx import ExitReason, Field, Msr, PinCtl, Proc2Ctl, ProcCtl
from kvmnest.vmx.outcome import Exit

BUG = Bug(
    subject="KVM: nVMX: Fold requested virtual interrupt check into has_nested_events()",
    hash="321ef62b0c5f",
    fixed="v6.11, v6.1.177",
    vulnerable="L2 wakes and goes on behind HLT",
    correct="L2 sleeps until an interrupt of L1's makes it exit",
    edit={
        "file": "arch/x86/kvm/vmx/nested.c",
        "function": "vmx_has_nested_events",
        "expression": "__vmx_interrupt_blocked(vcpu))",
        "replacement": "vmx_interrupt_blocked(vcpu))",
    },
)

TIMER, REQUESTED = 0x51, 0x61
PROC2 = Proc2Ctl.VIRTUALIZE_X2APIC_MODE | Proc2Ctl.VIRTUAL_INTERRUPT_DELIVERY


@pytest.mark.sdm("Evaluation of Pending Virtual Interrupts")
@pytest.mark.needs(PinCtl.EXTERNAL_INTERRUPT_EXITING, PROC2, ProcCtl.USE_TPR_SHADOW)
def test_hlt_with_interrupts_disabled(l1: L1) -> None:
    """RFLAGS.IF of L2 is clear; the timer of L1's APIC ends its sleep."""
    l1.wrmsr(Msr.APIC_BASE, l1.rdmsr(Msr.APIC_BASE).value | 0xC00)  # x2APIC mode
    l1.wrmsr(Msr.X2APIC_SIVR, 0x1FF)  # enabled by software
    vmcs, page = l1.launchable(l2=code.HLT + code.NOP), l1.alloc()
    vmcs.set_bits(Field.PIN_BASED_VM_EXEC_CONTROL, PinCtl.EXTERNAL_INTERRUPT_EXITING)
    proc = ProcCtl.ACTIVATE_SECONDARY_CONTROLS | ProcCtl.USE_TPR_SHADOW
    vmcs.set_bits(Field.CPU_BASED_VM_EXEC_CONTROL, proc)
    vmcs.set_bits(Field.SECONDARY_VM_EXEC_CONTROL, PROC2)
    vmcs[Field.VIRTUAL_APIC_PAGE_ADDR], vmcs[Field.TPR_THRESHOLD] = page, 0
    l1.write_int(page + 0x200 + REQUESTED // 32 * 16, 1 << REQUESTED % 32, 4)  # VIRR
    vmcs[Field.GUEST_INTR_STATUS] = REQUESTED
    l1.wrmsr(Msr.X2APIC_LVT_TIMER, TIMER)
    l1.wrmsr(Msr.X2APIC_INIT_COUNT, 50_000_000)  # 0.1 s: L2 has halted by then
    assert l1.vmlaunch() == Exit(ExitReason.EXTERNAL_INTERRUPT)
