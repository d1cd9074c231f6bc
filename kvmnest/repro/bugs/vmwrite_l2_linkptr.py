"""VMWRITE of L2 looks at the field before it finds that there is no link pointer."""

import pytest

from kvmnest.l1 import L1, code
from kvmnest.repro import Bug
from kvmnest.vmx import Field, Proc2Ctl, ProcCtl, Rflags

BUG = Bug(
    subject="kvm: nVMX: VMWRITE checks VMCS-link pointer before VMCS field",
    hash="dd2d6042b7f4",
    since="6d894f498f5d",
    since_by="Fixes",
    fixed="v5.6-rc1",
    vulnerable="VMWRITE in L2 of a field that does not exist is VMfailValid",
    correct="VMWRITE in L2 is VMfailInvalid",
    edit={
        "file": "arch/x86/kvm/vmx/nested.c",
        "function": "handle_vmwrite",
        "expression": (
            "if (vmx->nested.current_vmptr == INVALID_GPA || (is_guest_mode(vcpu) && "
            "get_vmcs12(vcpu)->vmcs_link_pointer == INVALID_GPA))"
        ),
        "replacement": "if (vmx->nested.current_vmptr == INVALID_GPA)",
    },
)

NO_SUCH_FIELD = 0x03FE
VMWRITE = b"\x0f\x79\xc3"  # VMWRITE RAX, RBX
FLAGS = code.PUSHFQ + b"\x41\x5f"  # POP R15


@pytest.mark.sdm("VMWRITE - Write Field to Virtual-Machine Control Structure")
@pytest.mark.needs(Proc2Ctl.VMCS_SHADOWING)
def test_vmwrite_of_l2_without_link_pointer(l1: L1) -> None:
    """With VMCS shadowing and no link pointer there is no VMCS that L2 could write."""
    vmcs = l1.launchable(l2=VMWRITE + FLAGS)
    vmcs.set_bits(Field.CPU_BASED_VM_EXEC_CONTROL, ProcCtl.ACTIVATE_SECONDARY_CONTROLS)
    vmcs.set_bits(Field.SECONDARY_VM_EXEC_CONTROL, Proc2Ctl.VMCS_SHADOWING)
    vmcs[Field.VMREAD_BITMAP] = vmcs[Field.VMWRITE_BITMAP] = l1.alloc()
    vmcs[Field.VMCS_LINK_POINTER] = (1 << 64) - 1
    seen = l1.vmlaunch(regs={"rax": NO_SUCH_FIELD, "rbx": 0})
    assert seen.regs["r15"] & (Rflags.CF | Rflags.ZF) == Rflags.CF
