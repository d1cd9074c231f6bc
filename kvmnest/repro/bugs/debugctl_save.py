"""DEBUGCTL written by L2 is not saved at the exit."""

import pytest

from kvmnest.l1 import L1, code
from kvmnest.repro import Bug
from kvmnest.vmx import EntryCtl, ExitCtl, Field, Msr, ProcCtl

BUG = Bug(
    subject="KVM: nVMX: Update vmcs12 for MSR_IA32_DEBUGCTLMSR write",
    fixed="v5.2",
    vulnerable="GUEST_IA32_DEBUGCTL has the value from before",
    correct="GUEST_IA32_DEBUGCTL has L2's value",
    edit={
        "file": "arch/x86/kvm/vmx/vmx.c",
        "function": "vmx_set_msr",
        "expression": "get_vmcs12(vcpu)->guest_ia32_debugctl = data;",
        "replacement": ";",
    },
)

BTF = 2


@pytest.mark.sdm("Saving Control Registers, Debug Registers, and MSRs")
@pytest.mark.needs(
    ProcCtl.USE_MSR_BITMAPS, ExitCtl.SAVE_DEBUG_CONTROLS, EntryCtl.LOAD_DEBUG_CONTROLS
)
def test_debugctl_of_l2(l1: L1) -> None:
    """With "save debug controls" the exit saves what L2 wrote to IA32_DEBUGCTL."""
    vmcs = l1.launchable(l2=code.WRMSR)
    vmcs.set_bits(Field.CPU_BASED_VM_EXEC_CONTROL, ProcCtl.USE_MSR_BITMAPS)
    vmcs[Field.MSR_BITMAP] = l1.alloc()  # no MSR access exits
    vmcs.set_bits(Field.VM_EXIT_CONTROLS, ExitCtl.SAVE_DEBUG_CONTROLS)
    vmcs.set_bits(Field.VM_ENTRY_CONTROLS, EntryCtl.LOAD_DEBUG_CONTROLS)
    vmcs[Field.GUEST_IA32_DEBUGCTL] = BTF
    l1.vmlaunch(regs={"rcx": Msr.DEBUGCTL, "rax": 0, "rdx": 0})
    assert vmcs[Field.GUEST_IA32_DEBUGCTL] == 0
