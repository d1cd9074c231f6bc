"""APIC virtualization that is activated while L2 runs stays off for L1."""

import pytest

from kvmnest.kvm import Cap
from kvmnest.l1 import L1, code
from kvmnest.repro import Bug
from kvmnest.vmx import ExitReason, Msr
from kvmnest.vmx.outcome import Exit

BUG = Bug(
    subject="KVM: nVMX: Immediately refresh APICv controls as needed on nested VM-Exit",
    hash="297631388309",
    since="7c69661e225c (v5.18)",
    since_by="Fixes",
    fixed="v6.19, v6.1.162",
    vulnerable="L1 does not take the interrupt",
    correct="L1 takes the interrupt",
    edit={
        "file": "arch/x86/kvm/vmx/nested.c",
        "function": "nested_vmx_vmexit",
        "expression": "vmx_refresh_apicv_exec_ctrl(vcpu);",
        "replacement": "kvm_make_request(KVM_REQ_APICV_UPDATE, vcpu);",
    },
    newer=(
        {
            "since": "7.2",
            "file": "arch/x86/kvm/vmx/vmx.c",
            "function": "vmx_refresh_apicv_exec_ctrl",
            "expression": "guard(vmx_vmcs01)(vcpu);",
            "replacement": "if (is_guest_mode(vcpu)) return; guard(vmx_vmcs01)(vcpu);",
        },
    ),
)

VECTOR = 0x51
ENABLE, BLOCK_INTERRUPTS = 1, 0x100000  # KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_BLOCKIRQ


@pytest.mark.sdm("Virtual-Interrupt Delivery")
@pytest.mark.needs(Cap.SET_GUEST_DEBUG)
def test_interrupts_unblocked_while_l2_runs(l1: L1) -> None:
    """A debugger that blocks interrupts inhibits APIC virtualization, and is left in L2."""
    l1.wrmsr(Msr.APIC_BASE, l1.rdmsr(Msr.APIC_BASE).value | 0xC00)  # x2APIC mode
    l1.wrmsr(Msr.X2APIC_SIVR, 0x1FF)  # enabled by software
    l1.write_int(l1.cpu.block + l1.sym("CPU_EOI"), l1.sym("EOI_X2APIC"))
    l1.launchable(l2=code.out8(0x80))
    l1.vcpu.set_guest_debug(ENABLE | BLOCK_INTERRUPTS)
    l1.vmlaunch()  # comes to userspace at the OUT
    l1.vcpu.set_guest_debug(0)
    assert l1.resume() == Exit(ExitReason.VMCALL)
    l1.wrmsr(Msr.X2APIC_SELF_IPI, VECTOR)
    l1.call(code.NOP, rflags=0x202)
    assert l1.read_int(l1.cpu.block + l1.sym("CPU_IRQ_COUNT")) == 1
