"""A VM entry that the processor refuses undoes an earlier MOV to CR0 or CR4."""

import pytest

from kvmnest.l1 import L1
from kvmnest.repro import Bug
from kvmnest.vmx import Cr4, Field, ProcCtl
from kvmnest.vmx.outcome import Succeed, VMfailValid

BUG = Bug(
    vulnerable="CR4.TSD of L1 is lost when VMLAUNCH fails",
    correct="VMLAUNCH that fails leaves CR4 alone",
    fix=(
        {
            "file": "arch/x86/kvm/vmx/nested.c",
            "function": "nested_vmx_restore_host_state",
            "expression": "vmx_set_cr0(vcpu, vmcs_readl(CR0_READ_SHADOW));",
            "replacement": """
                vmx_set_cr0(vcpu, (vmcs_readl(CR0_READ_SHADOW) & vmcs_readl(CR0_GUEST_HOST_MASK)) |
                                  (vmcs_readl(GUEST_CR0) & ~vmcs_readl(CR0_GUEST_HOST_MASK)));""",
        },
        {
            "file": "arch/x86/kvm/vmx/nested.c",
            "function": "nested_vmx_restore_host_state",
            "expression": "vmx_set_cr4(vcpu, vmcs_readl(CR4_READ_SHADOW));",
            "replacement": """
                vmx_set_cr4(vcpu, (vmcs_readl(CR4_READ_SHADOW) & vmcs_readl(CR4_GUEST_HOST_MASK)) |
                                  (vmcs_readl(GUEST_CR4) & ~vmcs_readl(CR4_GUEST_HOST_MASK)));""",
        },
    ),
)


@pytest.mark.sdm("VMLAUNCH/VMRESUME - Launch/Resume Virtual Machine")
@pytest.mark.needs(ProcCtl.USE_TPR_SHADOW)
def test_cr4_after_vmfail(l1: L1) -> None:
    """A VM entry that fails by its controls changes nothing of L1 but RFLAGS."""
    vmcs = l1.launchable()
    # KVM leaves this check to the processor, and has loaded L2's state by then.
    vmcs.set_bits(Field.CPU_BASED_VM_EXEC_CONTROL, ProcCtl.USE_TPR_SHADOW)
    vmcs[Field.VIRTUAL_APIC_PAGE_ADDR] = l1.alloc()
    vmcs[Field.TPR_THRESHOLD] = 1  # above the TPR in the page
    before = l1.read_cr(4)
    assert isinstance(before, Succeed)
    # L1 owns CR4.TSD: this MOV does not come to KVM.
    assert l1.write_cr(4, before.value | Cr4.TSD) == Succeed()
    assert isinstance(l1.vmlaunch(), VMfailValid)
    assert l1.read_cr(4) == Succeed(before.value | Cr4.TSD)
