"""VMREAD goes on after a page fault of its memory operand."""

import pytest

from kvmnest.l1 import L1
from kvmnest.repro import Bug
from kvmnest.vmx import Field, Vector
from kvmnest.vmx.outcome import Fault

BUG = Bug(
    subject="KVM: nVMX: vmread should not set rflags to specify success in case of #PF",
    hash="a4d956b93904",
    since="v3.1",
    since_by="source",
    fixed="v5.6-rc1",
    vulnerable="the page fault is reported behind the VMREAD",
    correct="the page fault is reported at the VMREAD",
    edit={
        "file": "arch/x86/kvm/vmx/nested.c",
        "function": "handle_vmread",
        "expression": "if (r != X86EMUL_CONTINUE) return kvm_handle_memory_failure(vcpu, r, &e);",
        "replacement": "if (r != X86EMUL_CONTINUE) kvm_handle_memory_failure(vcpu, r, &e);",
    },
)


@pytest.mark.sdm("VMREAD - Read Field from Virtual-Machine Control Structure")
def test_operand_not_mapped(l1: L1) -> None:
    """#PF is a fault: RIP stays at the instruction (of a field that no shadow VMCS holds)."""
    l1.launchable()
    at = 0x40000120
    assert l1.vmread(Field.GUEST_LDTR_LIMIT, at=at) == Fault(Vector.PF, cr2=at, rip=0)
