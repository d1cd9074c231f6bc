"""VM entry clears IA32_EFER.LME of an L2 without paging."""

import pytest

from kvmnest.l1 import L1, L2Mode
from kvmnest.repro import Bug
from kvmnest.vmx import Efer, EntryCtl, ExitCtl, ExitReason, Field, Proc2Ctl
from kvmnest.vmx.outcome import Exit

BUG = Bug(
    vulnerable="IA32_EFER.LME is 0 in L2",
    correct="IA32_EFER.LME is 1 in L2, as in L1",
    fix=(
        {
            "file": "arch/x86/kvm/vmx/nested.c",
            "function": "nested_vmx_calc_efer",
            "expression": "return vmx->vcpu.arch.efer & ~(EFER_LMA | EFER_LME);",
            "replacement": """
                return vmx->vcpu.arch.efer &
                       ~(EFER_LMA | (vmcs12->guest_cr0 & X86_CR0_PG ? EFER_LME : 0));""",
        },
    ),
)


@pytest.mark.sdm("Loading Guest Control Registers, Debug Registers, and MSRs")
@pytest.mark.needs(Proc2Ctl.ENABLE_EPT, Proc2Ctl.UNRESTRICTED_GUEST, ExitCtl.SAVE_EFER)
def test_lme_of_l1(l1: L1) -> None:
    """Without "load IA32_EFER" LME is loaded only if CR0.PG is; else it stays as it was."""
    vmcs = l1.launchable(mode=L2Mode.UNPAGED)
    vmcs.clear_bits(Field.VM_ENTRY_CONTROLS, EntryCtl.LOAD_EFER)
    vmcs.set_bits(Field.VM_EXIT_CONTROLS, ExitCtl.SAVE_EFER)
    assert l1.vmlaunch() == Exit(ExitReason.VMCALL)
    (efer,) = vmcs.read(Field.GUEST_IA32_EFER)
    assert efer & (Efer.LME | Efer.LMA) == Efer.LME
