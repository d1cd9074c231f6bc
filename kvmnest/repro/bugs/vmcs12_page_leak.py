"""A VM entry that KVM's guest-state check refuses leaks the pages of the VMCS."""

import pytest

from kvmnest.kvm import SealedMemory
from kvmnest.l1 import L1, code
from kvmnest.repro import Bug
from kvmnest.vmx import ExitReason, Field, ProcCtl
from kvmnest.vmx.outcome import EntryFailure

BUG = Bug(
    subject="KVM: nVMX: Put vmcs12 pages if nested VM-Enter fails due to invalid guest state",
    cve="CVE-2026-68081",
    since="96c66e87deee (v5.2)",
    since_by="CVE",
    fixed="v7.2-rc4, v6.1.192, v6.12.115",
    vulnerable="the virtual-APIC page stays referenced when the VM is gone",
    correct="no page stays referenced",
    edit={
        "file": "arch/x86/kvm/vmx/nested.c",
        "function": "nested_vmx_enter_non_root_mode",
        "expression": "kvm_vcpu_unmap(vcpu, &vmx->nested.virtual_apic_map, true);",
        "replacement": "",
    },
    newer=({"since": "7.0", "expression": "nested_put_vmcs12_pages(vcpu);"},),
)

PAGE = 0x20000000  # guest-physical, above L1's RAM


@pytest.mark.sdm("Checks on Guest Non-Register State")
@pytest.mark.needs(ProcCtl.USE_TPR_SHADOW)
def test_page_after_refused_entries(l1: L1) -> None:
    """The VMCS link pointer is not aligned; the page is in a memfd, which tells references."""
    memory = SealedMemory(4096)
    l1.vm.add_memory(7, PAGE, memory)
    vmcs = l1.launchable(l2=code.NOP)
    vmcs.set_bits(Field.CPU_BASED_VM_EXEC_CONTROL, ProcCtl.USE_TPR_SHADOW)
    vmcs[Field.VIRTUAL_APIC_PAGE_ADDR], vmcs[Field.TPR_THRESHOLD] = PAGE, 0
    vmcs[Field.VMCS_LINK_POINTER] = PAGE + 0x800
    for _ in range(3):
        assert l1.vmlaunch() == EntryFailure(ExitReason.INVALID_GUEST_STATE, qualification=4)
    l1.close()
    assert not memory.leaked()
