"""CPL is not checked before VMX instructions."""

import pytest

from kvmnest.l1 import L1
from kvmnest.repro import Bug
from kvmnest.vmx.outcome import Fault

BUG = Bug(
    subject="kvm: nVMX: Enforce cpl=0 for VMX instructions",
    hash="727ba748e110",
    cve="CVE-2018-12904",
    since="70f3aac964ae",
    since_by="Fixes",
    fixed="v4.18-rc1",
    vulnerable="VMCLEAR executes at CPL 3 of L1",
    correct="VMCLEAR at CPL 3 faults",
    edit={
        "file": "arch/x86/kvm/vmx/nested.c",
        "function": "nested_vmx_check_permission",
        "expression": "if (vmx_get_cpl(vcpu)) {",
        "replacement": "if (0) {",
    },
)


@pytest.mark.sdm("VMCLEAR - Clear Virtual-Machine Control Structure")
def test_vmclear_at_cpl_3(l1: L1) -> None:
    """In VMX operation the user mode of L1 must not get at a VMCS."""
    l1.enter_vmx()
    region = l1.prepare_region(l1.sym("vmcs_a"))
    # Which exception it is, is another bug: vmx-cpl-vector.
    seen = l1.vmclear(region, cpl=3)
    assert isinstance(seen, Fault), f"VMCLEAR at CPL 3: {seen!r}"
