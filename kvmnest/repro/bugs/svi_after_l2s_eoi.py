"""L1's interrupts stay blocked after L2 has acknowledged one."""

import pytest

from kvmnest.l1 import L1, code
from kvmnest.repro import Bug
from kvmnest.vmx import Field, Msr, ProcCtl

BUG = Bug(
    subject="KVM: nVMX: Defer SVI update to vmcs01 on EOI when L2 is active w/o VID",
    hash="04bc93cf49d1",
    since="c7c9c56ca26f (v3.9)",
    since_by="Fixes",
    fixed="v6.14, v6.1.149, v6.12.43",
    vulnerable="L1 does not get its next interrupt: for the processor one is in service still",
    correct="L1 gets its next interrupt",
    edit={
        "file": "arch/x86/kvm/vmx/vmx.c",
        "function": "vmx_hwapic_isr_update",
        "expression": "to_vmx(vcpu)->nested.update_vmcs01_hwapic_isr = true;",
        "replacement": "",
    },
    newer=(
        {
            "since": "7.2",
            "expression": "guard(vmx_vmcs01)(vcpu);",
            "replacement": "if (is_guest_mode(vcpu)) return;",
        },
    ),
)

VECTOR, IF = 0x51, 0x202


@pytest.mark.sdm("EOI Virtualization")
@pytest.mark.needs(ProcCtl.USE_MSR_BITMAPS)
def test_interrupt_after_an_eoi_of_l2(l1: L1) -> None:
    """L1 takes an interrupt, L2, which has L1's APIC, writes its EOI; L1 gets another one."""
    l1.wrmsr(Msr.APIC_BASE, l1.rdmsr(Msr.APIC_BASE).value | 0xC00)  # x2APIC mode
    l1.wrmsr(Msr.X2APIC_SIVR, 0x1FF)  # enabled by software
    vmcs = l1.launchable(l2=code.WRMSR)
    vmcs.set_bits(Field.CPU_BASED_VM_EXEC_CONTROL, ProcCtl.USE_MSR_BITMAPS)
    vmcs[Field.MSR_BITMAP] = l1.alloc()
    taken = l1.cpu.block + l1.sym("CPU_IRQ_COUNT")
    before = l1.read_int(taken)
    l1.wrmsr(Msr.X2APIC_SELF_IPI, VECTOR)
    l1.call(code.NOP, rflags=IF)
    l1.vmlaunch(regs={"rcx": Msr.X2APIC_EOI, "rax": 0, "rdx": 0})
    l1.wrmsr(Msr.X2APIC_SELF_IPI, VECTOR)
    l1.call(code.NOP, rflags=IF)
    assert l1.read_int(taken) - before == 2
