"""A VM exit does not save the IA32_DEBUGCTL that L2 took over from L1."""

import pytest

from kvmnest.l1 import L1
from kvmnest.repro import Bug
from kvmnest.vmx import EntryCtl, ExitCtl, ExitReason, Field
from kvmnest.vmx.outcome import Exit

BUG = Bug(
    vulnerable="GUEST_IA32_DEBUGCTL is what L1 wrote into the field before",
    correct="GUEST_IA32_DEBUGCTL is 0, as in L1",
    fix=(
        {
            "file": "arch/x86/kvm/vmx/nested.c",
            "function": "sync_vmcs02_to_vmcs12",
            "expression": "vmcs12->guest_dr7 = vcpu->arch.dr7;",
            "replacement": """
                {
                    vmcs12->guest_dr7 = vcpu->arch.dr7;
                    if (!(vmcs12->vm_entry_controls & VM_ENTRY_LOAD_DEBUG_CONTROLS))
                        vmcs12->guest_ia32_debugctl = vmx_guest_debugctl_read();
                }""",
        },
    ),
)


@pytest.mark.sdm("Saving Control Registers, Debug Registers, and MSRs")
@pytest.mark.needs(ExitCtl.SAVE_DEBUG_CONTROLS)
def test_debugctl_of_l1(l1: L1) -> None:
    """Without "load debug controls" L2 has L1's IA32_DEBUGCTL; "save debug controls" saves it."""
    vmcs = l1.launchable()
    if l1.caps.clamp(EntryCtl(0)) & EntryCtl.LOAD_DEBUG_CONTROLS:
        pytest.skip("needs EntryCtl.LOAD_DEBUG_CONTROLS that can be 0")
    vmcs.clear_bits(Field.VM_ENTRY_CONTROLS, EntryCtl.LOAD_DEBUG_CONTROLS)
    vmcs.set_bits(Field.VM_EXIT_CONTROLS, ExitCtl.SAVE_DEBUG_CONTROLS)
    vmcs[Field.GUEST_IA32_DEBUGCTL] = 1
    assert l1.vmlaunch() == Exit(ExitReason.VMCALL)
    assert vmcs.read(Field.GUEST_IA32_DEBUGCTL) == (0,)
