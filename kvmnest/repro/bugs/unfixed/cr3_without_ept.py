"""Without EPT the CR3 that L2 loaded itself is not in GUEST_CR3."""

import pytest

from kvmnest.l1 import L1, code
from kvmnest.repro import Bug
from kvmnest.vmx import ExitReason, Field, ProcCtl
from kvmnest.vmx.outcome import Exit

BUG = Bug(
    vulnerable="GUEST_CR3 is the CR3 that L2 had at entry",
    correct="GUEST_CR3 is the CR3 that L2 loaded",
    params={"ept": "0"},
    fix=(
        {
            "file": "arch/x86/kvm/vmx/nested.c",
            "function": "sync_vmcs02_to_vmcs12",
            "expression": "vmcs12->guest_linear_address = vmcs_readl(GUEST_LINEAR_ADDRESS);",
            "replacement": """
                if (!enable_ept)
                    vmcs12->guest_cr3 = kvm_read_cr3(vcpu);
                vmcs12->guest_linear_address = vmcs_readl(GUEST_LINEAR_ADDRESS);""",
        },
    ),
)


@pytest.mark.sdm("Saving Control Registers, Debug Registers, and MSRs")
def test_cr3_that_l2_loaded(l1: L1) -> None:
    """A VM exit saves the CR3 that L2 has, also if L1 did not see it change."""
    vmcs = l1.launchable(l2=code.mov_to_cr(3, "rcx"), ept=False)
    exiting = ProcCtl.CR3_LOAD_EXITING
    if l1.caps.missing(exiting) or l1.caps.clamp(ProcCtl(0)) & exiting:
        pytest.skip("needs CR3-load exiting that can be 0")
    vmcs.clear_bits(Field.CPU_BASED_VM_EXEC_CONTROL, exiting)
    copy = l1.alloc()
    l1.write(copy, l1.read(vmcs[Field.GUEST_CR3], 4096))
    assert l1.vmlaunch(regs={"rcx": copy}) == Exit(ExitReason.VMCALL)
    assert vmcs.read(Field.GUEST_CR3) == (copy,)
