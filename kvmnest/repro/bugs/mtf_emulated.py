"""The monitor trap flag misses an instruction that KVM emulates."""

import pytest

from kvmnest.l1 import L1, code
from kvmnest.repro import Bug
from kvmnest.vmx import ExitReason, Field, Msr, ProcCtl
from kvmnest.vmx.outcome import Exit

BUG = Bug(
    subject="KVM: nVMX: Emulate MTF when performing instruction emulation",
    hash="5ef8acbdd687",
    since="5f3d45e7f282 (v4.3)",
    since_by="message",
    fixed="v5.6-rc4",
    vulnerable="the exit comes one instruction late",
    correct="the exit comes behind the emulated instruction",
    edit={
        "file": "arch/x86/kvm/vmx/vmx.c",
        "function": "vmx_update_emulated_instruction",
        "expression": "vmx->nested.mtf_pending = true;",
        "replacement": "vmx->nested.mtf_pending = false;",
    },
)


@pytest.mark.sdm("Monitor Trap Flag")
@pytest.mark.needs(ProcCtl.MONITOR_TRAP_FLAG, ProcCtl.USE_MSR_BITMAPS)
def test_rdmsr_that_kvm_emulates(l1: L1) -> None:
    """L2 reads an MSR that L1 does not intercept, and KVM does."""
    vmcs = l1.launchable(l2=code.RDMSR + code.NOP * 2)
    vmcs.set_bits(Field.CPU_BASED_VM_EXEC_CONTROL, ProcCtl.MONITOR_TRAP_FLAG)
    vmcs.set_bits(Field.CPU_BASED_VM_EXEC_CONTROL, ProcCtl.USE_MSR_BITMAPS)
    vmcs[Field.MSR_BITMAP] = l1.alloc()
    behind = l1.sym("l2_code") + len(code.RDMSR)
    seen = l1.vmlaunch(regs={"rcx": Msr.TSC_ADJUST})
    assert seen == Exit(ExitReason.MONITOR_TRAP_FLAG, rip=behind)
