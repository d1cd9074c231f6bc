"""IA32_VMX_VMCS_ENUM does not cover every field."""

import pytest

from kvmnest.l1 import L1
from kvmnest.repro import Bug
from kvmnest.vmx import Field
from kvmnest.vmx.outcome import Succeed

BUG = Bug(
    subject="KVM: nVMX: Dynamically compute max VMCS index for vmcs12",
    hash="ba1f82456ba8",
    since="v3.1",
    since_by="source",
    fixed="v5.14-rc1",
    vulnerable="IA32_VMX_VMCS_ENUM is below the index of fields that L1 can read",
    correct="no field has a higher index than IA32_VMX_VMCS_ENUM says",
    edit={
        "file": "arch/x86/kvm/vmx/nested.c",
        "function": "nested_vmx_calc_vmcs_enum_msr",
        "expression": "if (idx > max_idx)",
        "replacement": "if (0)",
    },
)


@pytest.mark.sdm("VMX Capability Reporting Facility")
def test_highest_index(l1: L1) -> None:
    """IA32_VMX_VMCS_ENUM holds the highest index of any field."""
    l1.launchable()
    indices = [field.index for field in Field if l1.vmread(field) == Succeed()]
    assert max(indices) <= l1.caps.vmcs_enum_max_index
