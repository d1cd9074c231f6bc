"""A single step that is restored behind STI makes VM entry fail."""

import pytest

from kvmnest.l1 import L1, code
from kvmnest.repro import Bug
from kvmnest.vmx import ExitReason, Rflags, Vector
from kvmnest.vmx.outcome import Exit

BUG = Bug(
    subject="KVM: VMX: Refresh GUEST_PENDING_DBG_EXCEPTIONS.BS on all injected #DBs",
    hash="c5bad4fa2d5d",
    fixed="v6.1.180, v6.12.96",
    vulnerable="KVM's own entry of L2 fails, which L1 sees as an exit that it did not ask for",
    correct="L2's handler gets #DB",
    edit={
        "file": "arch/x86/kvm/vmx/vmx.c",
        "function": "vmx_inject_exception",
        "expression": "if (ex->vector == DB_VECTOR &&",
        "replacement": "if (0 &&",
    },
)

BY_STI = 2  # interrupt shadow of struct kvm_vcpu_events


@pytest.mark.sdm("Checks on Guest Non-Register State")
def test_single_step_behind_sti(l1: L1) -> None:
    """Userspace restores an L2 that single-steps, with #DB to be injected behind STI."""
    l1.launchable(l2=code.out8(0x80) + code.NOP)
    l1.vmlaunch()  # comes to userspace at the OUT
    l1.vcpu.run(immediate_exit=True)
    regs = l1.vcpu.get_regs()
    regs.rflags |= Rflags.IF | Rflags.TF
    l1.vcpu.set_regs(regs)
    events = l1.vcpu.get_vcpu_events()
    events.exception.injected, events.exception.nr = 1, Vector.DB
    events.exception.has_error_code = 0
    events.interrupt.shadow = BY_STI
    l1.vcpu.set_vcpu_events(events)
    seen = l1.resume()
    assert seen == Exit(ExitReason.VMCALL)
    assert l1.l2_frame(1) == [Vector.DB]
