"""Preemption timer starts anew after save and restore."""

import pytest

from kvmnest.kvm import Cap
from kvmnest.l1 import L1, code
from kvmnest.repro import Bug
from kvmnest.vmx import Field, PinCtl

BUG = Bug(
    subject="KVM: nVMX: Fix VMX preemption timer migration",
    hash="850448f35aaf",
    since="v4.19",
    since_by="source",
    fixed="v5.8-rc1",
    vulnerable="the restored deadline is another one",
    correct="the deadline is the same after the restore",
    edit={
        "file": "arch/x86/kvm/vmx/nested.c",
        "function": "vmx_set_nested_state",
        "expression": "vmx->nested.has_preemption_timer_deadline = true;",
        "replacement": "vmx->nested.has_preemption_timer_deadline = false;",
    },
)

DEADLINE = slice(32, 40)  # in the header of the nested state


@pytest.mark.sdm("VMX-Preemption Timer")
@pytest.mark.needs(Cap.NESTED_STATE, PinCtl.ACTIVATE_PREEMPTION_TIMER)
def test_deadline_moves_with_l2(l1: L1) -> None:
    """L2 is saved, its VM destroyed, and L2 restored in a new one: its timer counts on."""
    vmcs = l1.launchable(l2=code.out8(0x80))
    vmcs.set_bits(Field.PIN_BASED_VM_EXEC_CONTROL, PinCtl.ACTIVATE_PREEMPTION_TIMER)
    vmcs[Field.VMX_PREEMPTION_TIMER_VALUE] = 0xFFFFFFFF
    l1.vmlaunch()  # comes to userspace at the OUT
    saved = l1.vcpu.get_nested_state()[DEADLINE]
    l1.round_trip()
    assert l1.vcpu.get_nested_state()[DEADLINE] == saved
