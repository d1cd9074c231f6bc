"""Wrong error number when the hardware refuses the entry.

The commit ended more than that: before it, the failure was also taken for a VM exit. The edit
brings one symptom back.
"""

import pytest

from kvmnest.l1 import L1
from kvmnest.repro import Bug
from kvmnest.vmx import Field, ProcCtl, VmxError
from kvmnest.vmx.outcome import VMfailValid

BUG = Bug(
    subject="kvm: nVMX: Handle deferred early VMLAUNCH/VMRESUME failure properly",
    hash="4f350c6dbcb9",
    since="v3.1",
    since_by="source",
    fixed="v4.14",
    vulnerable="VMLAUNCH fails with error 8, an invalid host-state field",
    correct="VMLAUNCH fails with error 7, an invalid control field",
    edit={
        "file": "arch/x86/kvm/vmx/nested.c",
        "function": "nested_vmx_vmexit",
        "expression": "(void)nested_vmx_fail(vcpu, VMXERR_ENTRY_INVALID_CONTROL_FIELD);",
        "replacement": "(void)nested_vmx_fail(vcpu, VMXERR_ENTRY_INVALID_HOST_STATE_FIELD);",
    },
    newer=(
        {
            "since": "7.2",
            "function": "__nested_vmx_vmexit",
        },
    ),
)


@pytest.mark.sdm("VM-Execution Control Fields")
@pytest.mark.needs(ProcCtl.USE_TPR_SHADOW)
def test_error_of_a_late_failure(l1: L1) -> None:
    """KVM leaves the TPR in memory to the processor and has to tell L1 what that found."""
    vmcs = l1.launchable()
    vmcs.set_bits(Field.CPU_BASED_VM_EXEC_CONTROL, ProcCtl.USE_TPR_SHADOW)
    vmcs[Field.VIRTUAL_APIC_PAGE_ADDR] = page = l1.alloc()
    l1.write_int(page + 0x80, 0x50, 4)
    vmcs[Field.TPR_THRESHOLD] = 6  # above bits 7:4 of that TPR
    assert l1.vmlaunch() == VMfailValid(VmxError.ENTRY_INVALID_CONTROL_FIELD)
