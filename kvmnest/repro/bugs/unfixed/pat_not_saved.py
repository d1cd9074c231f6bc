"""A VM exit does not save the PAT that L2 took over from L1."""

import pytest

from kvmnest.l1 import L1
from kvmnest.repro import Bug
from kvmnest.vmx import EntryCtl, ExitCtl, ExitReason, Field, Msr
from kvmnest.vmx.outcome import Exit, Succeed

BUG = Bug(
    vulnerable="GUEST_IA32_PAT is what L1 wrote into the field before",
    correct="GUEST_IA32_PAT is the PAT that L2 had",
    fix=(
        {
            "file": "arch/x86/kvm/vmx/nested.c",
            "function": "sync_vmcs02_to_vmcs12",
            "expression": "if (vmcs12->vm_exit_controls & VM_EXIT_SAVE_IA32_EFER)",
            "replacement": """
                if (vmcs12->vm_exit_controls & VM_EXIT_SAVE_IA32_PAT)
                    vmcs12->guest_ia32_pat = vcpu->arch.pat;
                if (vmcs12->vm_exit_controls & VM_EXIT_SAVE_IA32_EFER)""",
        },
    ),
)


@pytest.mark.sdm("Saving Control Registers, Debug Registers, and MSRs")
@pytest.mark.needs(ExitCtl.SAVE_PAT)
def test_pat_of_l1(l1: L1) -> None:
    """Without "load IA32_PAT" L2 runs with L1's PAT, and "save IA32_PAT" saves that."""
    vmcs = l1.launchable()
    vmcs.clear_bits(Field.VM_ENTRY_CONTROLS, EntryCtl.LOAD_PAT)
    vmcs.set_bits(Field.VM_EXIT_CONTROLS, ExitCtl.SAVE_PAT)
    vmcs[Field.GUEST_IA32_PAT] = 0x0606060606060606
    pat = l1.rdmsr(Msr.PAT)
    assert isinstance(pat, Succeed)
    assert l1.vmlaunch() == Exit(ExitReason.VMCALL)
    assert vmcs.read(Field.GUEST_IA32_PAT) == (pat.value,)
