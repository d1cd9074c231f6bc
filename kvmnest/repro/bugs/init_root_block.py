"""INIT is not blocked in VMX root operation."""

import pytest

from kvmnest.kvm import Cap
from kvmnest.l1 import L1
from kvmnest.repro import Bug
from kvmnest.vmx import ExitReason, Msr
from kvmnest.vmx.outcome import Exit

BUG = Bug(
    subject="KVM: x86: Fix INIT signal handling in various CPU states",
    hash="4b9852f4f389",
    fixed="v5.4-rc1",
    vulnerable="INIT resets L1 in the middle of VMX root operation",
    correct="INIT waits and makes L2 exit",
    death="VmLost: internal error",
    edit={
        "file": "arch/x86/kvm/vmx/vmx.c",
        "function": "vmx_apic_init_signal_blocked",
        "expression": "return to_vmx(vcpu)->nested.vmxon && !is_guest_mode(vcpu);",
        "replacement": "return false;",
    },
)

IPI_TO_APIC_0, INIT = 0xFEE00000, 5 << 8


@pytest.mark.sdm("Other Causes of VM Exits")
@pytest.mark.needs(Cap.SIGNAL_MSI)
def test_init_in_root_operation(l1: L1) -> None:
    """INIT is blocked in VMX root operation; it stays pending until L2 is entered."""
    l1.wrmsr(Msr.APIC_BASE, l1.rdmsr(Msr.APIC_BASE).value | 0xC00)  # x2APIC mode
    l1.wrmsr(Msr.X2APIC_SIVR, 0x1FF)  # enabled by software
    l1.launchable()
    l1.vm.signal_msi(IPI_TO_APIC_0, INIT)
    assert l1.vmlaunch() == Exit(ExitReason.INIT_SIGNAL)
