"""DR6 that a guest wrote is replaced by an old value."""

import pytest

from kvmnest.l1 import L1, code
from kvmnest.repro import Bug
from kvmnest.vmx import Msr

BUG = Bug(
    subject="KVM: x86: Load DR6 with guest value only before entering .vcpu_run() loop",
    cve="CVE-2025-21839",
    since="375e28ffc0cf (v5.15)",
    since_by="Fixes",
    fixed="v6.14, v6.1.139, v6.12.16",
    vulnerable="DR6 is what it was before the guest wrote it",
    correct="DR6 is what the guest wrote",
    edit_since="7.0",
    edit={
        "file": "arch/x86/kvm/vmx/vmx.c",
        "function": "vmx_vcpu_run",
        "expression": "if (run_flags & KVM_RUN_LOAD_GUEST_DR6)",
        "replacement": "if (vcpu->arch.switch_db_regs & KVM_DEBUGREG_WONT_EXIT)",
    },
)

WRITE_DR6, READ_DR6 = b"\x0f\x23\xf3", b"\x0f\x21\xf3"  # MOV DR6, RBX; MOV RBX, DR6
TO_ITSELF = 0x40051  # x2APIC ICR: vector 51h, shorthand "self"


@pytest.mark.sdm("Debug Status Register (DR6)")
def test_dr6_over_an_exit_that_kvm_handles_at_once(l1: L1) -> None:
    """WRMSR of the x2APIC's ICR goes back into the guest from where it left it."""
    l1.wrmsr(Msr.APIC_BASE, l1.rdmsr(Msr.APIC_BASE).value | 0xC00)  # x2APIC mode
    l1.wrmsr(Msr.X2APIC_SIVR, 0x1FF)  # enabled by software
    regs = {"rcx": 0x830, "rax": 0x51, "rdx": 0, "rbx": 0xFFFF0FF3}
    seen = l1.call(WRITE_DR6 + code.WRMSR + READ_DR6, regs=regs)
    assert seen.regs["rbx"] == 0xFFFF0FF3
