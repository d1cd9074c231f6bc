"""L2 reads the x2APIC registers of the host."""

import pytest

from kvmnest.l1 import L1, code
from kvmnest.repro import Bug
from kvmnest.vmx import Field, Msr, Proc2Ctl, ProcCtl

BUG = Bug(
    subject="KVM: x86: nVMX: close leak of L0's x2APIC MSRs (CVE-2019-3887)",
    cve="CVE-2019-3887",
    since="v4.16",
    since_by="CVE",
    fixed="v5.1-rc4",
    vulnerable="RDMSR in L2 reads the host's local APIC, or faults with it",
    correct="RDMSR in L2 reads what L1's local APIC holds",
    edit={
        "file": "arch/x86/kvm/vmx/nested.c",
        "function": "nested_vmx_prepare_msr_bitmap",
        "expression": "if (nested_cpu_has_virt_x2apic_mode(vmcs12)) {",
        "replacement": "if (1) {",
    },
)


PRIORITY = 0x44


@pytest.mark.sdm("Virtualizing MSR-Based APIC Accesses")
@pytest.mark.needs(Proc2Ctl.APIC_REGISTER_VIRTUALIZATION, ProcCtl.USE_MSR_BITMAPS)
def test_task_priority(l1: L1) -> None:
    """APIC-register virtualization without "virtualize x2APIC mode"; no MSR is intercepted."""
    l1.wrmsr(Msr.APIC_BASE, l1.rdmsr(Msr.APIC_BASE).value | 0xC00)  # x2APIC mode
    l1.wrmsr(Msr.X2APIC_TPR, PRIORITY)
    vmcs = l1.launchable(l2=code.RDMSR)
    proc = ProcCtl.ACTIVATE_SECONDARY_CONTROLS | ProcCtl.USE_TPR_SHADOW | ProcCtl.USE_MSR_BITMAPS
    vmcs.set_bits(Field.CPU_BASED_VM_EXEC_CONTROL, proc)
    vmcs.set_bits(Field.SECONDARY_VM_EXEC_CONTROL, Proc2Ctl.APIC_REGISTER_VIRTUALIZATION)
    vmcs[Field.VIRTUAL_APIC_PAGE_ADDR], vmcs[Field.TPR_THRESHOLD] = l1.alloc(), 0
    vmcs[Field.MSR_BITMAP] = l1.alloc()
    assert l1.vmlaunch(regs={"rcx": Msr.X2APIC_TPR}).regs["rax"] == PRIORITY
