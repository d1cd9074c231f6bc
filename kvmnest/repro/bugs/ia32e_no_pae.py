"""IA-32e mode guest without CR4.PAE is entered."""

import pytest

from kvmnest.l1 import L1
from kvmnest.repro import Bug
from kvmnest.vmx import Cr4, ExitReason, Field
from kvmnest.vmx.outcome import EntryFailure

BUG = Bug(
    subject="KVM: nVMX: add missing consistency checks for CR0 and CR4",
    hash="112e66017bff",
    cve="CVE-2023-30456",
    since="v3.1",
    since_by="source",
    fixed="v6.3-rc3",
    vulnerable="L2 runs in IA-32e mode with CR4.PAE 0",
    correct="VM entry fails: invalid guest state",
    death="KvmError: KVM_RUN",  # of the VM, on newer kernels
    params={"ept": "0"},
    edit={
        "file": "arch/x86/kvm/vmx/nested.c",
        "function": "nested_vmx_check_guest_state",
        "expression": "if (CC(ia32e && !(vmcs12->guest_cr4 & X86_CR4_PAE)) ||",
        "replacement": "if (",
    },
)


@pytest.mark.sdm("Checks on Guest Control Registers, Debug Registers, and MSRs")
def test_ia32e_mode_without_pae(l1: L1) -> None:
    """The control "IA-32e mode guest" needs CR4.PAE; with ept=0 KVM has to check that itself."""
    vmcs = l1.launchable()
    vmcs.clear_bits(Field.GUEST_CR4, Cr4.PAE)
    assert l1.vmlaunch() == EntryFailure(ExitReason.INVALID_GUEST_STATE, qualification=0)
