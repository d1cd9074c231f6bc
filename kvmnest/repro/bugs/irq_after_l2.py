"""An interrupt that L2 leaves pending is not taken by L1."""

import pytest

from kvmnest.l1 import L1, code
from kvmnest.repro import Bug
from kvmnest.vmx import ExitReason, Field, Msr, ProcCtl
from kvmnest.vmx.outcome import Exit

BUG = Bug(
    subject="KVM: nVMX: Process events on nested VM-Exit if injectable IRQ or NMI is pending",
    hash="982caaa11504",
    fixed="v6.14",
    vulnerable="L1 executes with RFLAGS.IF set and does not take the interrupt",
    correct="L1 takes the interrupt behind STI",
    params={"enable_apicv": "0"},
    edit_since="6.15",
    edit={
        "file": "arch/x86/kvm/vmx/nested.c",
        "function": "__nested_vmx_vmexit",
        "expression": "if (kvm_cpu_has_injectable_intr(vcpu) || vcpu->arch.nmi_pending)",
        "replacement": "if (0)",
    },
)

VECTOR = 0x51


@pytest.mark.sdm("External interrupts")
@pytest.mark.needs(ProcCtl.USE_MSR_BITMAPS)
def test_interrupt_behind_the_exit(l1: L1) -> None:
    """L2, which has L1's APIC, sends an interrupt and exits with it pending."""
    l1.wrmsr(Msr.APIC_BASE, l1.rdmsr(Msr.APIC_BASE).value | 0xC00)  # x2APIC mode
    l1.wrmsr(Msr.X2APIC_SIVR, 0x1FF)  # enabled by software
    l1.write_int(l1.cpu.block + l1.sym("CPU_EOI"), l1.sym("EOI_X2APIC"))
    vmcs = l1.launchable(l2=code.WRMSR + code.NOP)
    vmcs.set_bits(Field.CPU_BASED_VM_EXEC_CONTROL, ProcCtl.USE_MSR_BITMAPS)
    vmcs[Field.MSR_BITMAP] = l1.alloc()
    # L1 sets IF right behind the exit: STI; NOP; NOP; CLI; JMP to the payload's own exit handler.
    jump = b"\xff\x25\0\0\0\0" + l1.sym("vmexit_entry").to_bytes(8, "little")
    vmcs[Field.HOST_RIP] = stub = l1.alloc()
    l1.write(stub, code.STI + code.NOP * 2 + code.CLI + jump)
    regs = {"rcx": Msr.X2APIC_SELF_IPI, "rax": VECTOR, "rdx": 0}
    assert l1.vmlaunch(regs=regs) == Exit(ExitReason.VMCALL)
    assert l1.read_int(l1.cpu.block + l1.sym("CPU_IRQ_COUNT")) == 1
