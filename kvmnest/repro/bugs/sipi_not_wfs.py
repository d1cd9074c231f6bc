"""A SIPI makes an active L2 exit."""

import pytest

from kvmnest.kvm import Cap
from kvmnest.l1 import L1, code
from kvmnest.repro import Bug
from kvmnest.vmx import ExitReason, Msr
from kvmnest.vmx.outcome import Exit

BUG = Bug(
    subject="KVM: nVMX: Ignore SIPI that arrives in L2 when vCPU is not in WFS",
    hash="c2086eca8658",
    fixed="v6.1-rc1",
    vulnerable="L2, which is active, exits with reason 4",
    correct="L2 goes on",
    edit={
        "file": "arch/x86/kvm/vmx/nested.c",
        "function": "vmx_check_nested_events",
        "expression": "if (vcpu->arch.mp_state == KVM_MP_STATE_INIT_RECEIVED) {",
        "replacement": "if (1) {",
    },
)

IPI_TO_APIC_0, SIPI = 0xFEE00000, 6 << 8 | 0x12


@pytest.mark.sdm("Other Causes of VM Exits")
@pytest.mark.needs(Cap.SIGNAL_MSI)
def test_sipi_to_an_active_l2(l1: L1) -> None:
    """A start-up IPI exits in the wait-for-SIPI state only; elsewhere it is lost."""
    l1.wrmsr(Msr.APIC_BASE, l1.rdmsr(Msr.APIC_BASE).value | 0xC00)  # x2APIC mode
    l1.wrmsr(Msr.X2APIC_SIVR, 0x1FF)  # enabled by software
    l1.launchable(l2=code.out8(0x80))
    l1.vmlaunch()  # comes to userspace at the OUT, which the next KVM_RUN ends
    l1.vcpu.run(immediate_exit=True)
    l1.vm.signal_msi(IPI_TO_APIC_0, SIPI)
    assert l1.resume() == Exit(ExitReason.VMCALL)
