"""INIT exits L2 without the single-step trap that is pending."""

import pytest

from kvmnest.kvm import Cap
from kvmnest.l1 import L1, code
from kvmnest.repro import Bug
from kvmnest.vmx import ExitReason, Field, Msr, Rflags

BUG = Bug(
    subject="KVM: nVMX: Handle pending #DB when injecting INIT VM-exit",
    hash="684c0422da71",
    since="4b9852f4f389 (v5.4)",
    since_by="Fixes",
    fixed="v5.6",
    vulnerable="the pending debug exceptions of the VMCS are 0",
    correct="the pending debug exceptions have BS",
    edit={
        "file": "arch/x86/kvm/vmx/nested.c",
        "function": "vmx_check_nested_events",
        "expression": (
            "nested_vmx_update_pending_dbg(vcpu); clear_bit(KVM_APIC_INIT, &apic->pending_events);"
        ),
        "replacement": "clear_bit(KVM_APIC_INIT, &apic->pending_events);",
    },
)

TO_APIC_0, INIT = 0xFEE00000, 5 << 8
BS = 1 << 14


@pytest.mark.sdm("Saving Non-Register State")
@pytest.mark.needs(Cap.SIGNAL_MSI, Cap.EXCEPTION_PAYLOAD)
def test_init_behind_a_single_step(l1: L1) -> None:
    """L2 sets TF and executes an OUT, which userspace sees; INIT comes before its trap does."""
    l1.enable_cap(Cap.EXCEPTION_PAYLOAD)
    l1.wrmsr(Msr.APIC_BASE, l1.rdmsr(Msr.APIC_BASE).value | 0xC00)  # x2APIC mode
    l1.wrmsr(Msr.X2APIC_SIVR, 0x1FF)  # enabled by software
    vmcs = l1.launchable(l2=b"\x50" + code.POPFQ + code.out8(0x80) + code.NOP)  # PUSH RAX first
    l1.vmlaunch(regs={"rax": 2 | Rflags.TF})
    l1.vm.signal_msi(TO_APIC_0, INIT)
    seen = l1.resume()
    pending = vmcs[Field.GUEST_PENDING_DBG_EXCEPTIONS]
    assert (seen.reason, pending) == (ExitReason.INIT_SIGNAL, BS)
