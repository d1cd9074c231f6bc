"""The VMX-preemption timer of a restored L2 expires hours late if its time was over."""

import pytest

from kvmnest.kvm import Cap
from kvmnest.l1 import L1, code
from kvmnest.repro import Bug
from kvmnest.vmx import ExitReason, Field, Msr, PinCtl
from kvmnest.vmx.outcome import Exit

BUG = Bug(
    vulnerable="L2 runs on without its time limit",
    correct="the exit of the timer comes at once",
    fix=(
        {
            "file": "arch/x86/kvm/vmx/nested.c",
            "function": "vmx_calc_preemption_timer_value",
            "expression": "return vmx->nested.preemption_timer_deadline - l1_scaled_tsc;",
            "replacement": """
                if (vmx->nested.preemption_timer_deadline <= l1_scaled_tsc)
                    return 0;
                return vmx->nested.preemption_timer_deadline - l1_scaled_tsc;""",
        },
    ),
)

DEADLINE = slice(32, 40)  # in the header of the nested state
TICKS = 100_000


@pytest.mark.sdm("VMX-Preemption Timer")
@pytest.mark.needs(Cap.NESTED_STATE, PinCtl.ACTIVATE_PREEMPTION_TIMER)
def test_deadline_that_passed(l1: L1) -> None:
    """The timer runs down while L2 is saved: it expires when L2 is restored."""
    vmcs = l1.launchable(l2=code.out8(0x80))
    vmcs.set_bits(Field.PIN_BASED_VM_EXEC_CONTROL, PinCtl.ACTIVATE_PREEMPTION_TIMER)
    vmcs[Field.VMX_PREEMPTION_TIMER_VALUE] = TICKS
    l1.vmlaunch()  # comes to userspace at the OUT
    l1.vcpu.run(immediate_exit=True)
    deadline = int.from_bytes(l1.vcpu.get_nested_state()[DEADLINE], "little")
    while l1.vcpu.get_msrs([Msr.TSC])[Msr.TSC] >> l1.caps.misc.preemption_timer_rate < deadline:
        pass
    l1.round_trip()
    assert l1.resume() == Exit(ExitReason.PREEMPTION_TIMER)
