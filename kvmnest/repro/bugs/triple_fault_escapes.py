"""Userspace makes KVM warn: L2 is left while a triple fault is pending."""

import pytest

from kvmnest.kvm import Cap
from kvmnest.l1 import L1, code
from kvmnest.repro import Bug
from kvmnest.vmx import Cr4, Field

BUG = Bug(
    subject='KVM: x86: Drop WARNs that assert a triple fault never "escapes" from L2',
    cve="CVE-2022-49559",
    hash="45846661d104",
    since="cb6a32c2b877 (v5.13)",
    since_by="Fixes",
    fixed="v5.19",
    vulnerable="the host's kernel prints a warning with a call trace",
    correct="the host's kernel says nothing",
    edit={
        "file": "arch/x86/kvm/vmx/nested.c",
        "function": "nested_vmx_vmexit",
        "expression": "vmx->nested.mtf_pending = false;",
        "replacement": (
            "vmx->nested.mtf_pending = false; "
            "WARN_ON_ONCE(kvm_test_request(KVM_REQ_TRIPLE_FAULT, vcpu));"
        ),
    },
    newer=({"since": "7.2", "function": "__nested_vmx_vmexit"},),
)

FATAL = 0xE2 << 56  # status of a bank: valid, overflow, uncorrected, context corrupt
BANKS = 1


@pytest.mark.sdm("Machine-Check Architecture")
@pytest.mark.needs(Cap.MCE, Cap.NESTED_STATE)
def test_l2_is_left(l1: L1) -> None:
    """A machine check shuts L2 down, whose CR4.MCE is 0; userspace restores an older state."""
    outside = l1.vcpu.get_nested_state()
    l1.vcpu.setup_mce(BANKS)
    vmcs = l1.launchable(l2=code.out8(0x80))
    vmcs[Field.GUEST_CR4] &= ~Cr4.MCE
    l1.vmlaunch()  # comes to userspace at the OUT, with L2 active
    l1.vcpu.set_mce(0, FATAL)
    l1.vcpu.set_nested_state(outside)
    assert l1.vcpu.get_nested_state() == outside
