"""A VM entry that fails by invalid guest state saves guest state."""

import pytest

from kvmnest.l1 import L1
from kvmnest.repro import Bug
from kvmnest.vmx import ExitCtl, ExitReason, Field
from kvmnest.vmx.outcome import EntryFailure

BUG = Bug(
    vulnerable="GUEST_DR7 is overwritten",
    correct="GUEST_DR7 is what L1 wrote",
    fix=(
        {
            "file": "arch/x86/kvm/vmx/nested.c",
            "function": "__nested_vmx_vmexit",
            "expression": "sync_vmcs02_to_vmcs12(vcpu, vmcs12);",
            "replacement": """
                if (vm_exit_reason == -1 || !(vm_exit_reason & VMX_EXIT_REASONS_FAILED_VMENTRY))
                    sync_vmcs02_to_vmcs12(vcpu, vmcs12);
                else
                    vmcs_read_cet_state(vcpu, &vmcs12->guest_s_cet, &vmcs12->guest_ssp,
                                        &vmcs12->guest_ssp_tbl);""",
        },
    ),
)


@pytest.mark.sdm("VM-Entry Failures During or After Loading Guest State")
@pytest.mark.needs(ExitCtl.SAVE_DEBUG_CONTROLS)
def test_dr7_after_a_failed_entry(l1: L1) -> None:
    """Only a VM exit saves guest state, not a VM entry that fails."""
    vmcs = l1.launchable()
    vmcs.set_bits(Field.VM_EXIT_CONTROLS, ExitCtl.SAVE_DEBUG_CONTROLS)
    vmcs[Field.GUEST_DR7] = 0x7F1
    vmcs[Field.GUEST_RFLAGS] = 0  # bit 1 must be 1; KVM leaves that to the processor
    assert l1.vmlaunch() == EntryFailure(ExitReason.INVALID_GUEST_STATE, qualification=0)
    assert vmcs.read(Field.GUEST_DR7) == (0x7F1,)
