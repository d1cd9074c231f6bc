"""The single-step trap behind an emulated instruction is lost at an MTF or INIT exit."""

import pytest

from kvmnest.l1 import L1, code
from kvmnest.repro import Bug
from kvmnest.vmx import ExitReason, Field, PendingDebug, ProcCtl, Rflags, Vector
from kvmnest.vmx.outcome import Exit

BUG = Bug(
    vulnerable="the exit of the monitor trap flag saves no pending debug exception",
    correct="the exit of the monitor trap flag saves BS",
    fix=(
        {
            "file": "arch/x86/kvm/vmx/nested.c",
            "function": "nested_vmx_update_pending_dbg",
            "expression": "pending_dbg = vmx_get_pending_dbg_trap(&vcpu->arch.exception);",
            "replacement": """
                pending_dbg = vmx_get_pending_dbg_trap(&vcpu->arch.exception) |
                              vmx_get_pending_dbg_trap(&vcpu->arch.exception_vmexit);""",
        },
    ),
)


@pytest.mark.sdm("Saving Non-Register State")
@pytest.mark.needs(ProcCtl.MONITOR_TRAP_FLAG)
def test_single_step_behind_out(l1: L1) -> None:
    """A single-step trap that is pending at a VM exit is saved in the field."""
    vmcs = l1.launchable(l2=code.out8(0x80) + code.NOP)
    vmcs.set_bits(Field.CPU_BASED_VM_EXEC_CONTROL, ProcCtl.MONITOR_TRAP_FLAG)
    vmcs[Field.GUEST_RFLAGS] = 0x2 | Rflags.TF
    vmcs[Field.EXCEPTION_BITMAP] = 1 << Vector.DB
    l1.vmlaunch()  # comes to userspace at the OUT
    assert l1.resume() == Exit(ExitReason.MONITOR_TRAP_FLAG)
    assert vmcs.read(Field.GUEST_PENDING_DBG_EXCEPTIONS) == (PendingDebug.BS,)
