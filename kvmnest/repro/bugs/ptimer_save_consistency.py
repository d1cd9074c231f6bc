"""Saving the preemption timer is accepted without the timer."""

import pytest

from kvmnest.l1 import L1
from kvmnest.repro import Bug
from kvmnest.vmx import ExitCtl, Field, VmxError
from kvmnest.vmx.outcome import VMfailValid

BUG = Bug(
    subject="KVM: nVMX: Restore a preemption timer consistency check",
    since="461b4ba4c7ad (v5.0-rc1)",
    since_by="Fixes",
    fixed="v5.0",
    vulnerable='L2 runs with "save VMX-preemption timer value" and no timer',
    correct="VM entry fails with error 7, an invalid control field",
    edit={
        "file": "arch/x86/kvm/vmx/nested.c",
        "function": "nested_check_vm_execution_controls",
        "expression": (
            "if (!nested_cpu_has_preemption_timer(vmcs12) && "
            "nested_cpu_has_save_preemption_timer(vmcs12))"
        ),
        "replacement": "if (0)",
    },
)


@pytest.mark.sdm("VM-Exit Control Fields")
@pytest.mark.needs(ExitCtl.SAVE_PREEMPTION_TIMER)
def test_saving_a_timer_that_is_off(l1: L1) -> None:
    """ "Save VMX-preemption timer value" needs "activate VMX-preemption timer"."""
    vmcs = l1.launchable()
    vmcs.set_bits(Field.VM_EXIT_CONTROLS, ExitCtl.SAVE_PREEMPTION_TIMER)
    assert l1.vmlaunch() == VMfailValid(VmxError.ENTRY_INVALID_CONTROL_FIELD)
