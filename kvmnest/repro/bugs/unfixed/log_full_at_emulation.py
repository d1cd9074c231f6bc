"""A page-modification log that is full at an emulated write makes the host's kernel warn."""

import pytest

from kvmnest.l1 import L1
from kvmnest.repro import Bug
from kvmnest.vmx import ExitReason, Field, Proc2Ctl, ProcCtl
from kvmnest.vmx.outcome import Exit

BUG = Bug(
    vulnerable="the kernel warns in nested_ept_inject_page_fault",
    correct="L2 exits, and the kernel is silent",
    fix=(
        {
            "file": "arch/x86/kvm/vmx/nested.c",
            "function": "nested_ept_inject_page_fault",
            "expression": """
                WARN_ON_ONCE(vmx->vt.exit_reason.basic != EXIT_REASON_EPT_VIOLATION);""",
            "replacement": "",
        },
        {
            "file": "arch/x86/kvm/vmx/nested.c",
            "function": "nested_ept_inject_page_fault",
            "expression": "exit_qualification = vmx_get_exit_qual(vcpu) & INTR_INFO_UNBLOCK_NMI;",
            "replacement": """
                exit_qualification = from_hardware ?
                                     vmx_get_exit_qual(vcpu) & INTR_INFO_UNBLOCK_NMI : 0;""",
        },
    ),
)

ACCESSED, DIRTY, ENABLE_AD = 1 << 8, 1 << 9, 1 << 6


@pytest.mark.sdm("Page-Modification Logging")
@pytest.mark.needs(Proc2Ctl.ENABLE_PML)
def test_ins_when_the_log_is_full(l1: L1) -> None:
    """KVM carries out INSB, so no EPT violation of the processor comes before this exit."""
    vmcs = l1.launchable(l2=b"\x6c", ept=True)
    page = l1.alloc()
    start, end = l1.sym("ept_pml4"), l1.sym("ept_pml4_pt") + 8 * (l1.sym("RAM_SIZE") >> 12)
    clean = l1.sym("ept_pml4_pt") + page // 4096 * 8
    for entry in range(start, end, 8):
        value = l1.read_int(entry)
        if value and entry != clean:
            l1.write_int(entry, value | ACCESSED | DIRTY)
    vmcs.set_bits(Field.CPU_BASED_VM_EXEC_CONTROL, ProcCtl.ACTIVATE_SECONDARY_CONTROLS)
    vmcs.set_bits(Field.SECONDARY_VM_EXEC_CONTROL, Proc2Ctl.ENABLE_PML)
    vmcs[Field.EPT_POINTER] |= ENABLE_AD
    vmcs[Field.PML_ADDRESS], vmcs[Field.GUEST_PML_INDEX] = l1.alloc(), 0xFFFF
    l1.vmlaunch(regs={"rdx": 0x3F8, "rdi": page})  # comes to userspace at the INSB
    l1.vcpu.set_io_data(b"\x42")
    assert l1.resume() == Exit(ExitReason.PML_FULL)
