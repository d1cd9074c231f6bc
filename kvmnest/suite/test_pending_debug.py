"""Pending debug exceptions in the guest-state area: delivered behind VM entry, or kept."""

from __future__ import annotations

import pytest

from kvmnest.kvm import Cap, exits
from kvmnest.l1 import L1, code
from kvmnest.suite.support.guest import Guest
from kvmnest.vmx import ActivityState, Field, IntrType, Misc, PinCtl, Rflags, Vector, intr_info
from kvmnest.vmx.outcome import Fault, HostExit, Succeed

pytestmark = [
    pytest.mark.series(21),
    pytest.mark.sdm("Delivery of Pending Debug Exceptions after VM Entry"),
]

BS = 1 << 14
#: Breakpoint 0 was met, and a breakpoint that was met is enabled.
B0 = 1 << 0 | 1 << 12


@pytest.mark.parametrize("pending", [BS, B0, BS | B0], ids=["BS", "B0", "BS-B0"])
def test_delivered_at_entry(l1: L1, pending: int) -> None:
    """The debug exception comes before L2's first instruction, with its cause."""
    guest = Guest(l1)
    seen = guest.run(code.NOP, EXCEPTION_BITMAP=1 << 1, GUEST_PENDING_DBG_EXCEPTIONS=pending)
    assert seen == guest.exception(Vector.DB, qualification=pending & ~(1 << 12))
    # It is used up.
    assert guest.vmcs.read(Field.GUEST_PENDING_DBG_EXCEPTIONS) == (0,)
    assert guest.go_on() == Succeed()


@pytest.mark.needs(Misc.ACTIVITY_HLT, PinCtl.ACTIVATE_PREEMPTION_TIMER)
@pytest.mark.parametrize("pending", [BS, B0, BS | B0], ids=["BS", "B0", "BS-B0"])
def test_in_the_hlt_state(l1: L1, pending: int) -> None:
    """The debug exception ends the HLT state; blocking by MOV SS is the only thing against it."""
    guest = Guest(l1, PinCtl.ACTIVATE_PREEMPTION_TIMER)
    seen = guest.run(
        code.NOP,
        # In the HLT state BS has to go with TF.
        GUEST_RFLAGS=0x2 | Rflags.TF if pending & BS else 0x2,
        EXCEPTION_BITMAP=1 << 1,
        GUEST_ACTIVITY_STATE=ActivityState.HLT,
        GUEST_PENDING_DBG_EXCEPTIONS=pending,
        # Ends the HLT state if nothing else does.
        VMX_PREEMPTION_TIMER_VALUE=100_000,
    )
    assert seen == guest.exception(Vector.DB, qualification=pending & ~(1 << 12))


def test_delivered_to_l2(l1: L1) -> None:
    """Without an intercept L2's own handler gets it at its first instruction."""
    guest = Guest(l1)
    seen = guest.run(code.NOP, EXCEPTION_BITMAP=0, GUEST_PENDING_DBG_EXCEPTIONS=BS)
    assert seen == Fault(Vector.DB, error_code=0, rip=0)


def test_each_entry_has_its_own(l1: L1) -> None:
    """What one entry delivered is not delivered by the next, nor by that of another VMCS."""
    guest = Guest(l1)
    for pending in (BS, 0, B0, 0):
        seen = guest.run(code.NOP, EXCEPTION_BITMAP=1 << 1, GUEST_PENDING_DBG_EXCEPTIONS=pending)
        if pending:
            assert seen == guest.exception(Vector.DB, qualification=pending & ~(1 << 12))
        else:
            assert seen == Succeed()


@pytest.mark.parametrize("vector", [Vector.UD, Vector.NMI], ids=["UD", "NMI"])
def test_lost_by_an_injected_event(l1: L1, vector: Vector) -> None:
    """An injected hardware exception or NMI leaves no debug exception pending behind it."""
    guest = Guest(l1)
    kind = IntrType.NMI if vector is Vector.NMI else IntrType.HARDWARE_EXCEPTION
    seen = guest.run(
        code.NOP,
        EXCEPTION_BITMAP=1 << 1,
        GUEST_PENDING_DBG_EXCEPTIONS=BS,
        VM_ENTRY_INTR_INFO_FIELD=intr_info(vector, kind),
    )
    assert seen == Fault(vector, error_code=0, rip=0)


_PAYLOAD = 0x10  # of kvm_vcpu_events.flags
_SHADOWS = {"none": 0, "MOV-SS": 1, "STI": 2}  # of kvm_vcpu_events.interrupt.shadow


@pytest.mark.sdm("Checks on Guest Non-Register State")
@pytest.mark.needs(Cap.EXCEPTION_PAYLOAD)
@pytest.mark.parametrize("moved", [False, True], ids=["", "moved"])
@pytest.mark.parametrize("how", ["pending", "injected"])
@pytest.mark.parametrize("shadow", _SHADOWS)
def test_single_step_from_userspace(l1: L1, shadow: str, how: str, moved: bool) -> None:
    """Userspace restores an L2 with TF set and #DB on its way: its handler gets it once.

    Under blocking by STI or MOV SS with TF set, VM entry needs BS among the pending debug
    exceptions, whatever it injects.
    """
    l1.enable_cap(Cap.EXCEPTION_PAYLOAD)
    guest, out = Guest(l1), code.out8(0x80)
    assert isinstance(guest.run(out + code.NOP * 2), HostExit)
    assert isinstance(l1.vcpu.run(immediate_exit=True), exits.IntrExit)
    regs, events = l1.vcpu.get_regs(), l1.vcpu.get_vcpu_events()
    regs.rflags |= Rflags.IF | Rflags.TF
    l1.vcpu.set_regs(regs)
    setattr(events.exception, how, 1)
    events.exception.nr, events.exception.has_error_code = Vector.DB, 0
    events.exception_has_payload, events.exception_payload = int(how == "pending"), BS
    events.interrupt.shadow, events.flags = _SHADOWS[shadow], events.flags | _PAYLOAD
    l1.vcpu.set_vcpu_events(events)
    if moved:
        l1.round_trip()
    assert guest.resume() == Fault(Vector.DB, error_code=0, rip=len(out))
