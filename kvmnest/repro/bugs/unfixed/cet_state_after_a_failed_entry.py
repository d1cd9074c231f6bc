"""A VM entry that fails gives L1 the CET state of the guest-state area."""

import pytest

from kvmnest.l1 import L1
from kvmnest.repro import Bug
from kvmnest.vmx import EntryCtl, ExitReason, Field, Msr
from kvmnest.vmx.outcome import EntryFailure, Succeed

BUG = Bug(
    vulnerable="L1 finds GUEST_S_CET in its IA32_S_CET",
    correct="L1 finds IA32_S_CET as it was",
    fix=(
        {
            "file": "arch/x86/kvm/vmx/nested.c",
            "function": "nested_vmx_enter_non_root_mode",
            "expression": """
                load_vmcs12_host_state(vcpu, vmcs12);
                vmcs12->vm_exit_reason = exit_reason.full;""",
            "replacement": """
                vmcs12->vm_exit_reason = exit_reason.full;
                load_vmcs12_host_state(vcpu, vmcs12);""",
        },
        {
            "file": "arch/x86/kvm/vmx/nested.c",
            "function": "load_vmcs12_host_state",
            "expression": "else vmcs_write_cet_state(vcpu, vmcs12->guest_s_cet, vmcs12->guest_ssp,",
            # Only a failure of the MSR-load area comes after guest state was loaded.
            "replacement": """
                else if (!(vmcs12->vm_exit_reason & VMX_EXIT_REASONS_FAILED_VMENTRY) ||
                         ((u16)vmcs12->vm_exit_reason == EXIT_REASON_MSR_LOAD_FAIL &&
                          vmcs12->vm_entry_controls & VM_ENTRY_LOAD_CET_STATE))
                    vmcs_write_cet_state(vcpu, vmcs12->guest_s_cet, vmcs12->guest_ssp,""",
        },
    ),
)

OF_L1, OF_L2 = 0x11114000, 0x22224000  # pages of a legacy bitmap: no effect while CR4.CET is 0


@pytest.mark.sdm("VM-Entry Failures During or After Loading Guest State")
@pytest.mark.needs(EntryCtl.LOAD_CET_STATE)
def test_s_cet_of_l1(l1: L1) -> None:
    """A control loads CET state at VM entry, another one at VM exit; both are 0 here."""
    if not isinstance(l1.wrmsr(Msr.S_CET, OF_L1), Succeed):
        pytest.skip("needs IBT")
    vmcs = l1.launchable()
    vmcs[Field.GUEST_S_CET] = OF_L2
    vmcs[Field.GUEST_CR3] |= 1 << 52  # beyond every physical-address width
    assert l1.vmlaunch() == EntryFailure(ExitReason.INVALID_GUEST_STATE, qualification=0)
    assert l1.rdmsr(Msr.S_CET) == Succeed(OF_L1)
