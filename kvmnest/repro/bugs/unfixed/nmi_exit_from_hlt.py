"""An NMI that makes L2 exit from HLT finds it active."""

import threading

import pytest

from kvmnest.kvm import Cap
from kvmnest.l1 import L1, code
from kvmnest.repro import Bug
from kvmnest.vmx import ActivityState, ExitReason, Field, Msr, PinCtl, ProcCtl
from kvmnest.vmx.outcome import Exit, Succeed

BUG = Bug(
    vulnerable="the activity state saved is active",
    correct="the activity state saved is HLT",
    fix=(
        {
            "file": "arch/x86/kvm/x86.c",
            "function": "vcpu_block",
            "expression": "int r = kvm_check_nested_events(vcpu);",
            "replacement": """
                int r;

                if (kvm_check_request(KVM_REQ_NMI, vcpu))
                    process_nmi(vcpu);
                r = kvm_check_nested_events(vcpu);""",
        },
    ),
)


@pytest.mark.sdm("Saving Non-Register State")
@pytest.mark.needs(Cap.SIGNAL_MSI, PinCtl.NMI_EXITING)
def test_nmi_while_l2_sleeps(l1: L1) -> None:
    """The activity state that is saved is the one at the exit: HLT."""
    base = l1.rdmsr(Msr.APIC_BASE)
    assert isinstance(base, Succeed)
    l1.wrmsr(Msr.APIC_BASE, base.value | 0xC00)  # x2APIC mode
    l1.wrmsr(Msr.X2APIC_SIVR, 0x1FF)  # enabled by software
    vmcs = l1.launchable(l2=code.HLT + code.NOP)
    vmcs.set_bits(Field.PIN_BASED_VM_EXEC_CONTROL, PinCtl.NMI_EXITING)
    vmcs.clear_bits(Field.CPU_BASED_VM_EXEC_CONTROL, ProcCtl.HLT_EXITING)
    nmi = threading.Timer(0.05, lambda: l1.vm.signal_msi(0xFEE00000, 4 << 8))
    nmi.start()
    seen = l1.vmlaunch()
    nmi.join()
    assert seen == Exit(ExitReason.EXCEPTION_NMI)
    assert vmcs.read(Field.GUEST_ACTIVITY_STATE) == (ActivityState.HLT,)
