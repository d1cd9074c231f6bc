"""VMWRITE calls a field that does not exist read-only."""

import pytest

from kvmnest.l1 import L1
from kvmnest.repro import Bug
from kvmnest.vmx import Misc, Msr, VmxError
from kvmnest.vmx.outcome import VMfailValid

BUG = Bug(
    subject="kvm: nVMX: VMWRITE checks unsupported field before read-only field",
    hash="693e02cc2409",
    since="49f705c5324a (v3.1)",
    since_by="Fixes",
    fixed="v5.6-rc1",
    vulnerable="VMWRITE fails with error 13, a read-only field",
    correct="VMWRITE fails with error 12, an unsupported field",
    edit={
        "file": "arch/x86/kvm/vmx/nested.c",
        "function": "handle_vmwrite",
        "expression": "offset = get_vmcs12_field_offset(field); if (offset < 0)",
        "replacement": (
            "if (vmcs_field_readonly(field) && !nested_cpu_has_vmwrite_any_field(vcpu)) return "
            "nested_vmx_fail(vcpu, VMXERR_VMWRITE_READ_ONLY_VMCS_COMPONENT); offset = "
            "get_vmcs12_field_offset(field); if (offset < 0)"
        ),
    },
)

NO_SUCH_FIELD = 0x47FE  # 32 bits, of the read-only kind, with the highest index


@pytest.mark.sdm("VMWRITE - Write Field to Virtual-Machine Control Structure")
def test_read_only_field_that_does_not_exist(l1: L1) -> None:
    """Whether a field exists comes before whether it can be written."""
    msr = Msr.IA32_VMX_MISC
    l1.set_feature_msrs({msr: l1.vcpu.get_msrs([msr])[msr] & ~Misc.VMWRITE_ANY_FIELD})
    l1.launchable()
    assert l1.vmwrite(NO_SUCH_FIELD, 0) == VMfailValid(VmxError.UNSUPPORTED_VMCS_COMPONENT)
