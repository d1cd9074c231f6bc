"""PAT written by L2 is not saved at the exit."""

import pytest

from kvmnest.l1 import L1, code
from kvmnest.repro import Bug
from kvmnest.vmx import ExitCtl, Field, Msr, ProcCtl

BUG = Bug(
    subject="KVM: nVMX: Update vmcs12 for MSR_IA32_CR_PAT write",
    fixed="v5.2",
    vulnerable="GUEST_IA32_PAT has the value from before",
    correct="GUEST_IA32_PAT has L2's value",
    edit={
        "file": "arch/x86/kvm/vmx/vmx.c",
        "function": "vmx_set_msr",
        "expression": "get_vmcs12(vcpu)->guest_ia32_pat = data;",
        "replacement": ";",
    },
)

NEW = 0x06060606  # write-back in every byte


@pytest.mark.sdm("Saving Control Registers, Debug Registers, and MSRs")
@pytest.mark.needs(ProcCtl.USE_MSR_BITMAPS, ExitCtl.SAVE_PAT)
def test_pat_of_l2(l1: L1) -> None:
    """With "save IA32_PAT" the exit saves what L2 wrote to it."""
    vmcs = l1.launchable(l2=code.WRMSR)
    vmcs.set_bits(Field.CPU_BASED_VM_EXEC_CONTROL, ProcCtl.USE_MSR_BITMAPS)
    vmcs[Field.MSR_BITMAP] = l1.alloc()  # no MSR access exits
    vmcs.set_bits(Field.VM_EXIT_CONTROLS, ExitCtl.SAVE_PAT)
    l1.vmlaunch(regs={"rcx": Msr.PAT, "rax": NEW, "rdx": NEW})
    assert vmcs[Field.GUEST_IA32_PAT] == NEW << 32 | NEW
