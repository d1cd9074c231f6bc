"""VMX instructions above CPL 0 give #UD instead of #GP."""

import pytest

from kvmnest.l1 import L1
from kvmnest.repro import Bug
from kvmnest.vmx import Vector
from kvmnest.vmx.outcome import Fault

BUG = Bug(
    subject="kvm: nVMX: Fix fault vector for VMX operation at CPL > 0",
    since="727ba748e110 (v4.18-rc1)",
    since_by="Fixes",
    fixed="v4.19",
    vulnerable="VMCLEAR at CPL 3 of L1 is #UD",
    correct="VMCLEAR at CPL 3 is #GP(0)",
    edit={
        "file": "arch/x86/kvm/vmx/nested.c",
        "function": "nested_vmx_check_permission",
        "expression": "kvm_inject_gp(vcpu, 0);",
        "replacement": "kvm_queue_exception(vcpu, UD_VECTOR);",
    },
)


@pytest.mark.sdm("VMCLEAR - Clear Virtual-Machine Control Structure")
def test_vmclear_at_cpl_3(l1: L1) -> None:
    """In VMX operation VMCLEAR at CPL 3 is #GP(0); #UD is for L1 outside of it."""
    l1.enter_vmx()
    region = l1.prepare_region(l1.sym("vmcs_a"))
    seen = l1.vmclear(region, cpl=3)
    if not isinstance(seen, Fault):
        pytest.skip("VMCLEAR executes at CPL 3, so this kernel has the older bug vmx-cpl")
    assert seen == Fault(Vector.GP, error_code=0)
