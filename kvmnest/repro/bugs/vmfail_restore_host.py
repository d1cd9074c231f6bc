"""L1's state is not restored when the hardware refuses the entry."""

import pytest

from kvmnest.l1 import L1
from kvmnest.repro import Bug
from kvmnest.vmx import Cr4, Field, ProcCtl
from kvmnest.vmx.outcome import VMfailValid

BUG = Bug(
    subject="KVM: nVMX: restore host state in nested_vmx_vmexit for VMFail",
    hash="bd18bffca353",
    since="4f350c6dbcb9 (v4.14)",
    since_by="Fixes",
    fixed="v4.19 or v4.20",
    vulnerable="KVM takes L2's CR4 for L1's after VMLAUNCH failed, or L1 is lost",
    correct="VMLAUNCH fails and L1 has the CR4 that it had",
    death="VmLost: ",
    edit={
        "file": "arch/x86/kvm/vmx/nested.c",
        "function": "nested_vmx_vmexit",
        "expression": "nested_vmx_restore_host_state(vcpu);",
        "replacement": "if (0) nested_vmx_restore_host_state(vcpu);",
    },
    newer=(
        {
            "since": "7.2",
            "function": "__nested_vmx_vmexit",
        },
    ),
)


@pytest.mark.sdm("VM-Execution Control Fields")
@pytest.mark.needs(ProcCtl.USE_TPR_SHADOW)
def test_l1_after_a_late_failure(l1: L1) -> None:
    """KVM leaves the TPR in memory to the processor and has to undo what it loaded before."""
    vmcs = l1.launchable()
    vmcs.set_bits(Field.CPU_BASED_VM_EXEC_CONTROL, ProcCtl.USE_TPR_SHADOW)
    vmcs[Field.VIRTUAL_APIC_PAGE_ADDR] = page = l1.alloc()
    l1.write_int(page + 0x80, 0x50, 4)
    vmcs[Field.TPR_THRESHOLD] = 6  # above bits 7:4 of that TPR
    vmcs.set_bits(Field.GUEST_CR4, Cr4.PSE)  # L1's own is 0
    cr4 = l1.vcpu.get_sregs().cr4
    # Which error number it is, is another bug: deferred-vmfail.
    assert isinstance(l1.vmlaunch(), VMfailValid)
    assert l1.vcpu.get_sregs().cr4 == cr4
