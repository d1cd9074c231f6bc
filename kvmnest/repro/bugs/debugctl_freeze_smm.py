"""VM entry refuses FREEZE_IN_SMM in the guest's IA32_DEBUGCTL."""

import pytest

from kvmnest.l1 import L1
from kvmnest.repro import Bug
from kvmnest.vmx import EntryCtl, ExitReason, Field
from kvmnest.vmx.outcome import Exit

BUG = Bug(
    subject="KVM: x86: Introduce KVM_X86_QUIRK_VMCS12_ALLOW_FREEZE_IN_SMM",
    since="095686e6fcb4 (v6.17)",
    since_by="Fixes",
    fixed="v7.0, v6.12.85",
    vulnerable="VM entry fails for bit 14 of IA32_DEBUGCTL",
    correct="L2 runs",
    edit_since="7.0",
    edit={
        "file": "arch/x86/kvm/vmx/nested.c",
        "function": "nested_vmx_check_guest_state",
        "expression": """if (kvm_check_has_quirk(vcpu->kvm,
            KVM_X86_QUIRK_VMCS12_ALLOW_FREEZE_IN_SMM))""",
        "replacement": "if (0)",
    },
)

FREEZE_IN_SMM = 1 << 14


@pytest.mark.sdm("Checks on Guest Control Registers, Debug Registers, and MSRs")
@pytest.mark.needs(EntryCtl.LOAD_DEBUG_CONTROLS)
def test_freeze_in_smm(l1: L1) -> None:
    """Hypervisors that copy their own IA32_DEBUGCTL set the bit, which KVM let pass before 2025."""
    vmcs = l1.launchable()
    vmcs.set_bits(Field.VM_ENTRY_CONTROLS, EntryCtl.LOAD_DEBUG_CONTROLS)
    vmcs[Field.GUEST_IA32_DEBUGCTL] = FREEZE_IN_SMM
    assert l1.vmlaunch() == Exit(ExitReason.VMCALL)
