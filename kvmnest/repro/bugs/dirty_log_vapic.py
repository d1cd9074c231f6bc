"""Dirty log lacks the virtual-APIC page."""

import pytest

from kvmnest.l1 import L1, code
from kvmnest.repro import Bug
from kvmnest.vmx import Field, ProcCtl

BUG = Bug(
    subject="KVM: nVMX: mark vmcs12 pages dirty on L2 exit",
    fixed="v4.15",
    vulnerable="KVM_GET_DIRTY_LOG lacks the virtual-APIC page that L2 wrote",
    correct="KVM_GET_DIRTY_LOG has the virtual-APIC page",
    edit={
        "file": "arch/x86/kvm/vmx/vmx.c",
        "function": "__vmx_handle_exit",
        "expression": "nested_mark_vmcs12_pages_dirty(vcpu);",
        "replacement": "",
    },
    newer=(
        {
            "since": "7.2",
            "expression": "nested_vmx_mark_all_vmcs12_pages_dirty(vcpu);",
        },
    ),
)


@pytest.mark.sdm("TPR Virtualization")
@pytest.mark.needs(ProcCtl.USE_TPR_SHADOW)
def test_virtual_apic_page_is_logged_dirty(l1: L1) -> None:
    """A write to the TPR of L2 changes memory, which a migration has to copy."""
    vmcs = l1.launchable(l2=code.mov_to_cr(8) + code.out8(0x80))
    vmcs.set_bits(Field.CPU_BASED_VM_EXEC_CONTROL, ProcCtl.USE_TPR_SHADOW)
    vmcs[Field.TPR_THRESHOLD] = 0
    vmcs[Field.VIRTUAL_APIC_PAGE_ADDR] = page = l1.alloc()
    l1.vm.add_memory(0, 0, l1.memory, log_dirty=True)
    l1.vmlaunch(regs={"rax": 5})  # comes to userspace at the OUT, with L2 active
    number = page // 4096
    assert l1.vm.dirty_log(0)[number // 8] >> number % 8 & 1
