"""A read of the virtual x2APIC TPR by L2 gives L1's TPR."""

import pytest

from kvmnest.l1 import L1, code
from kvmnest.repro import Bug
from kvmnest.vmx import Field, Msr, Proc2Ctl, ProcCtl

BUG = Bug(
    subject="KVM: x86: nVMX: fix x2APIC VTPR read intercept",
    hash="c73f4c998e1f",
    fixed="v5.1-rc4",
    vulnerable="RDMSR 808H in L2 gives L1's TPR",
    correct="RDMSR 808H in L2 gives the TPR of the virtual-APIC page",
    edit={
        "file": "arch/x86/kvm/vmx/nested.c",
        "function": "nested_vmx_prepare_msr_bitmap",
        "expression": "X2APIC_MSR(APIC_TASKPRI), MSR_TYPE_R | MSR_TYPE_W);",
        "replacement": "X2APIC_MSR(APIC_TASKPRI), MSR_TYPE_W);",
    },
)


@pytest.mark.sdm("Virtualizing MSR-Based APIC Accesses")
@pytest.mark.needs(ProcCtl.USE_TPR_SHADOW, ProcCtl.USE_MSR_BITMAPS, Proc2Ctl.VIRTUALIZE_X2APIC_MODE)
def test_tpr_of_a_virtual_x2apic(l1: L1) -> None:
    """With "virtualize x2APIC mode" the processor reads the virtual-APIC page for L2."""
    l1.wrmsr(Msr.APIC_BASE, l1.rdmsr(Msr.APIC_BASE).value | 0xC00)  # L1's own: x2APIC, TPR 0
    vmcs = l1.launchable(l2=code.RDMSR)
    vmcs.set_bits(
        Field.CPU_BASED_VM_EXEC_CONTROL,
        ProcCtl.USE_TPR_SHADOW | ProcCtl.USE_MSR_BITMAPS | ProcCtl.ACTIVATE_SECONDARY_CONTROLS,
    )
    vmcs.set_bits(Field.SECONDARY_VM_EXEC_CONTROL, Proc2Ctl.VIRTUALIZE_X2APIC_MODE)
    vmcs[Field.MSR_BITMAP] = l1.alloc()
    vmcs[Field.TPR_THRESHOLD] = 0
    vmcs[Field.VIRTUAL_APIC_PAGE_ADDR] = page = l1.alloc()
    l1.write_int(page + 0x80, 0x35, 4)
    seen = l1.vmlaunch(regs={"rcx": Msr.X2APIC_TPR})
    assert seen.regs["rax"] == 0x35
