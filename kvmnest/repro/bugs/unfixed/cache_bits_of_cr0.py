"""VM entry loads CR0.CD and CR0.NW, which it has to leave alone."""

import pytest

from kvmnest.l1 import L1
from kvmnest.repro import Bug
from kvmnest.vmx import Cr0, ExitReason, Field
from kvmnest.vmx.outcome import Exit, Succeed

BUG = Bug(
    vulnerable="CD and NW come from the VMCS at VM entry and VM exit",
    correct="CD and NW stay as they are",
    fix=(
        {
            "file": "arch/x86/kvm/vmx/nested.c",
            "function": "prepare_vmcs02",
            "expression": """
                vmx_set_cr0(vcpu, vmcs12->guest_cr0);
                vmcs_writel(CR0_READ_SHADOW, nested_read_cr0(vmcs12));""",
            "replacement": """
                if (vcpu->arch.nested_run_pending)
                    vmcs12->guest_cr0 = (vmcs12->guest_cr0 & ~(X86_CR0_CD | X86_CR0_NW)) |
                                        kvm_read_cr0_bits(vcpu, X86_CR0_CD | X86_CR0_NW);
                vmx_set_cr0(vcpu, vmcs12->guest_cr0);
                vmcs_writel(CR0_READ_SHADOW, nested_read_cr0(vmcs12));""",
        },
        {
            "file": "arch/x86/kvm/vmx/nested.c",
            "function": "load_vmcs12_host_state",
            "expression": "vmx_set_cr0(vcpu, vmcs12->host_cr0);",
            "replacement": """
                vmx_set_cr0(vcpu, (vmcs12->host_cr0 & ~(X86_CR0_CD | X86_CR0_NW)) |
                                  (vcpu->arch.cr0 & (X86_CR0_CD | X86_CR0_NW)));""",
        },
    ),
)

CACHE = Cr0.CD | Cr0.NW


@pytest.mark.sdm("Loading Guest Control Registers, Debug Registers, and MSRs")
def test_cd_and_nw(l1: L1) -> None:
    """VM entry and VM exit never modify CR0.CD and CR0.NW."""
    vmcs = l1.launchable()
    vmcs.set_bits(Field.GUEST_CR0, CACHE)
    before = l1.read_cr(0)
    assert isinstance(before, Succeed)
    assert l1.vmlaunch() == Exit(ExitReason.VMCALL)
    in_l2 = vmcs.read(Field.GUEST_CR0)[0] & CACHE
    vmcs.set_bits(Field.HOST_CR0, CACHE)
    assert l1.vmresume() == Exit(ExitReason.VMCALL)
    after = l1.read_cr(0)
    assert isinstance(after, Succeed)
    assert (in_l2, after.value & CACHE) == (before.value & CACHE, before.value & CACHE)
