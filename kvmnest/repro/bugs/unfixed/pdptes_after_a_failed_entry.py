"""A failed VM entry makes the next one run a PAE guest with stale PDPTEs."""

import pytest

from kvmnest.l1 import L1, L2Mode
from kvmnest.repro import Bug
from kvmnest.vmx import ExitReason, Field, Proc2Ctl
from kvmnest.vmx.outcome import EntryFailure, Exit

BUG = Bug(
    vulnerable="L2 ends in a triple fault at its first instruction",
    correct="L2 runs after the failed entry",
    fix=(
        {
            "file": "arch/x86/kvm/vmx/nested.c",
            "function": "prepare_vmcs02",
            "expression": "vmx->nested.dirty_vmcs12 = false;",
            "replacement": "",
        },
        {
            "file": "arch/x86/kvm/vmx/nested.c",
            "function": "prepare_vmcs02",
            "expression": "kvm_rsp_write(vcpu, vmcs12->guest_rsp);",
            "replacement": """
                vmx->nested.dirty_vmcs12 = false;
                kvm_rsp_write(vcpu, vmcs12->guest_rsp);""",
        },
    ),
)


@pytest.mark.sdm("Loading Page-Directory-Pointer-Table Entries")
@pytest.mark.needs(Proc2Ctl.ENABLE_EPT)
def test_good_entry_after_a_failed_one(l1: L1) -> None:
    """With EPT and PAE paging each VM entry loads the PDPTEs from the guest-state area."""
    vmcs = l1.launchable(mode=L2Mode.PAE, ept=True)
    cr3 = vmcs[Field.GUEST_CR3]
    vmcs[Field.GUEST_CR3] = cr3 | 1 << 52  # beyond every physical-address width
    assert l1.vmlaunch() == EntryFailure(ExitReason.INVALID_GUEST_STATE, qualification=0)
    vmcs[Field.GUEST_CR3] = cr3
    assert l1.vmlaunch() == Exit(ExitReason.VMCALL)
