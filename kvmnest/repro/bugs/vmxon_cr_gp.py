"""VMXON with bad CR0 or CR4 gives #UD instead of #GP."""

import pytest

from kvmnest.l1 import L1
from kvmnest.repro import Bug
from kvmnest.vmx import Cr0, Vector
from kvmnest.vmx.outcome import Fault

BUG = Bug(
    subject='KVM: nVMX: Inject #GP, not #UD, if "generic" VMXON CR0/CR4 check fails',
    hash="9cc409325ddd",
    since="c7d855c2aff2 (v6.0-rc1)",
    since_by="Fixes",
    fixed="v6.2-rc1, v6.1.4",
    vulnerable="VMXON with CR0.NE 0 is #UD",
    correct="VMXON with CR0.NE 0 is #GP(0)",
    edit={
        "file": "arch/x86/kvm/vmx/nested.c",
        "function": "handle_vmxon",
        "expression": "!nested_host_cr4_valid(vcpu, kvm_read_cr4(vcpu))) { kvm_inject_gp(vcpu, 0);",
        "replacement": (
            "!nested_host_cr4_valid(vcpu, kvm_read_cr4(vcpu))) { kvm_queue_exception(vcpu, "
            "UD_VECTOR);"
        ),
    },
)


@pytest.mark.sdm("VMXON - Enter VMX Operation")
def test_vmxon_without_cr0_ne(l1: L1) -> None:
    """A bit that IA32_VMX_CR0_FIXED0 fixes to 1 and that is 0: #GP(0)."""
    l1.write_cr(0, l1.read_cr(0).value & ~Cr0.NE)
    assert l1.vmxon() == Fault(Vector.GP, error_code=0)
