"""L2 that sleeps, by HLT or as it was entered, and the event that comes later.

A hypervisor may let the vCPU sleep in its own code; it then decides by itself what wakes L2.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

import pytest

from kvmnest.kvm import Cap, exits
from kvmnest.l1 import L1, code
from kvmnest.suite.support.apic import NMI, TO_APIC_0, Apic
from kvmnest.suite.support.bitmaps import set_msr_bitmap
from kvmnest.suite.support.guest import Guest, copied_idt
from kvmnest.vmx import (
    ActivityState,
    ExitCtl,
    ExitReason,
    Field,
    IntrType,
    Misc,
    PinCtl,
    ProcCtl,
    Vector,
    intr_info,
)
from kvmnest.vmx.outcome import Exit, Fault, HostExit, Succeed

pytestmark = [
    pytest.mark.series(20),
    pytest.mark.sdm("Other Causes of VM Exits"),
    pytest.mark.needs(Cap.SIGNAL_MSI, Misc.ACTIVITY_HLT),
]

VECTOR = 0x51
OUT_80 = code.out8(0x80)
#: Seconds until the event comes: L2 sleeps by then.
LATER = 0.05
#: How L2 falls asleep: its code, the field that differs, and where it goes on.
ASLEEP = pytest.mark.parametrize(
    ("program", "state", "behind"),
    [(code.HLT + code.NOP, ActivityState.ACTIVE, 1), (code.NOP, ActivityState.HLT, 0)],
    ids=["instruction", "entry"],
)
EACH_IF = pytest.mark.parametrize("flags", [0x202, 0x2], ids=["IF", "no-IF"])


def _guest(l1: L1, *flags: PinCtl) -> Guest:
    guest = Guest(l1, ProcCtl.USE_MSR_BITMAPS, *flags)
    set_msr_bitmap(l1)
    guest.off(ProcCtl.HLT_EXITING)
    guest.on(ExitCtl.ACKNOWLEDGE_INTERRUPT_ON_EXIT)
    return guest


@contextlib.contextmanager
def _later(action: Callable[[], object]) -> Iterator[None]:
    """Do it while the vCPU, which this thread runs meanwhile, sleeps."""
    timer = threading.Timer(LATER, action)
    timer.start()
    try:
        yield
    finally:
        timer.join()


def _interrupt(l1: L1) -> None:
    assert l1.vm.signal_msi(TO_APIC_0, VECTOR) == 1


def _nmi(l1: L1) -> None:
    assert l1.vm.signal_msi(TO_APIC_0, NMI) == 1


def _activity(guest: Guest) -> int:
    (state,) = guest.vmcs.read(Field.GUEST_ACTIVITY_STATE)
    return state


@ASLEEP
def test_interrupt_wakes_l2(l1: L1, program: bytes, state: ActivityState, behind: int) -> None:
    """Without external-interrupt exiting L2's handler gets it, and L2 is active from then on."""
    apic, guest = Apic(l1), _guest(l1)
    with _later(lambda: _interrupt(l1)):
        seen = guest.run(program, GUEST_RFLAGS=0x202, GUEST_ACTIVITY_STATE=state)
    assert seen == Fault(VECTOR, error_code=0, rip=behind)
    assert _activity(guest) == ActivityState.ACTIVE
    assert apic.in_service() == [VECTOR]


@ASLEEP
@EACH_IF
@pytest.mark.needs(PinCtl.EXTERNAL_INTERRUPT_EXITING, ExitCtl.ACKNOWLEDGE_INTERRUPT_ON_EXIT)
@pytest.mark.sdm("Saving Non-Register State")
def test_interrupt_exit(
    l1: L1, program: bytes, state: ActivityState, behind: int, flags: int
) -> None:
    """With it the exit comes from the HLT state, which is saved, whatever RFLAGS.IF is."""
    apic, guest = Apic(l1), _guest(l1, PinCtl.EXTERNAL_INTERRUPT_EXITING)
    with _later(lambda: _interrupt(l1)):
        seen = guest.run(program, GUEST_RFLAGS=flags, GUEST_ACTIVITY_STATE=state)
    info = intr_info(VECTOR, IntrType.EXTERNAL_INTERRUPT)
    assert seen == guest.exit(ExitReason.EXTERNAL_INTERRUPT, offset=behind, intr_info=info)
    assert guest.changed(seen) == {}
    assert _activity(guest) == ActivityState.HLT
    apic.end()
    # As saved L2 sleeps on; L1 lets it go on.
    guest.vmcs[Field.GUEST_ACTIVITY_STATE] = ActivityState.ACTIVE
    assert guest.go_on() == Succeed()


@ASLEEP
def test_masked_interrupt_does_not_wake(
    l1: L1, program: bytes, state: ActivityState, behind: int
) -> None:
    """With RFLAGS.IF clear it stays requested and L2 asleep, until an NMI comes."""
    apic, guest = Apic(l1), _guest(l1)

    def events() -> None:
        _interrupt(l1)
        timer = threading.Timer(LATER, lambda: _nmi(l1))
        timer.start()
        timer.join()

    with _later(events):
        seen = guest.run(program, GUEST_RFLAGS=0x2, GUEST_ACTIVITY_STATE=state)
    assert seen == Fault(Vector.NMI, error_code=0, rip=behind)
    assert apic.requested() == [VECTOR]


@ASLEEP
def test_nmi_wakes_l2(l1: L1, program: bytes, state: ActivityState, behind: int) -> None:
    """Without NMI exiting L2's handler gets it, with NMIs blocked from then on."""
    Apic(l1)
    guest = _guest(l1)
    with _later(lambda: _nmi(l1)):
        seen = guest.run(program, GUEST_ACTIVITY_STATE=state)
    assert seen == Fault(Vector.NMI, error_code=0, rip=behind)
    saved = guest.vmcs.read(Field.GUEST_ACTIVITY_STATE, Field.GUEST_INTERRUPTIBILITY_INFO)
    assert saved == (ActivityState.ACTIVE, 8)


@ASLEEP
@pytest.mark.needs(PinCtl.NMI_EXITING)
@pytest.mark.sdm("Saving Non-Register State")
def test_nmi_exit(l1: L1, program: bytes, state: ActivityState, behind: int) -> None:
    """With NMI exiting the exit comes from the HLT state; L1 does not get the NMI once more."""
    apic, guest = Apic(l1), _guest(l1, PinCtl.NMI_EXITING)
    with _later(lambda: _nmi(l1)):
        seen = guest.run(program, GUEST_ACTIVITY_STATE=state)
    info = intr_info(Vector.NMI, IntrType.NMI)
    assert seen == guest.exit(ExitReason.EXCEPTION_NMI, offset=behind, intr_info=info)
    assert _activity(guest) == ActivityState.HLT
    assert l1.call(code.NOP) == Succeed()
    assert apic.nmis == 0


@pytest.mark.needs(PinCtl.EXTERNAL_INTERRUPT_EXITING, ExitCtl.ACKNOWLEDGE_INTERRUPT_ON_EXIT)
@pytest.mark.series(24)
def test_host_takes_the_vcpu_meanwhile(l1: L1) -> None:
    """A signal to the host's thread ends KVM_RUN, not L2's sleep."""
    apic, guest = Apic(l1), _guest(l1, PinCtl.EXTERNAL_INTERRUPT_EXITING)
    assert isinstance(guest.run(OUT_80 + code.HLT + code.NOP, GUEST_RFLAGS=0x202), HostExit)
    for _ in range(3):
        with _later(l1.vcpu.kick):
            assert isinstance(l1.vcpu.run(), exits.IntrExit)
        assert l1.vcpu.get_regs().rip == guest.at(3)
    _interrupt(l1)
    info = intr_info(VECTOR, IntrType.EXTERNAL_INTERRUPT)
    seen = guest.resume()
    assert seen == guest.exit(ExitReason.EXTERNAL_INTERRUPT, offset=3, intr_info=info)
    assert apic.in_service() == [VECTOR]
    assert _activity(guest) == ActivityState.HLT


# --- an injected #DB ends the HLT state before its handler's first instruction ---


def _debug_exception(guest: Guest, gate: int, **fields: int) -> Exit | Fault:
    """Enter L2 in the HLT state with #DB injected, through a gate of this type."""
    seen = guest.run(
        code.NOP,
        GUEST_IDTR_BASE=copied_idt(guest.l1, {Vector.DB: gate}),
        GUEST_ACTIVITY_STATE=ActivityState.HLT,
        GUEST_RFLAGS=0x202,
        VM_ENTRY_INTR_INFO_FIELD=intr_info(Vector.DB, IntrType.HARDWARE_EXCEPTION),
    )
    assert isinstance(seen, Exit | Fault)
    return seen


INTERRUPT_GATE, TRAP_GATE = 0x8E, 0x8F


@pytest.mark.needs(PinCtl.NMI_EXITING, PinCtl.VIRTUAL_NMIS, ProcCtl.NMI_WINDOW_EXITING)
@pytest.mark.sdm("Special Features of VM Entry")
@pytest.mark.parametrize("gate", [INTERRUPT_GATE, TRAP_GATE], ids=["interrupt-gate", "trap-gate"])
def test_nmi_window_behind_an_injected_exception(l1: L1, gate: int) -> None:
    """The NMI window is open at the handler's first instruction; L2 is active there."""
    guest = _guest(l1, PinCtl.NMI_EXITING, PinCtl.VIRTUAL_NMIS)
    guest.on(ProcCtl.NMI_WINDOW_EXITING)
    seen = _debug_exception(guest, gate)
    assert seen == guest.exit(ExitReason.NMI_WINDOW, offset=guest.handler(Vector.DB))
    assert _activity(guest) == ActivityState.ACTIVE
    guest.off(ProcCtl.NMI_WINDOW_EXITING)
    assert guest.go_on() == Fault(Vector.DB, error_code=0, rip=0)


@pytest.mark.needs(ProcCtl.INTERRUPT_WINDOW_EXITING)
@pytest.mark.sdm("Special Features of VM Entry")
@pytest.mark.parametrize("gate", [INTERRUPT_GATE, TRAP_GATE], ids=["interrupt-gate", "trap-gate"])
def test_interrupt_window_behind_an_injected_exception(l1: L1, gate: int) -> None:
    """The gate decides whether the window is open at the handler's first instruction."""
    guest = _guest(l1)
    guest.on(ProcCtl.INTERRUPT_WINDOW_EXITING)
    seen = _debug_exception(guest, gate)
    if gate == TRAP_GATE:
        assert seen == guest.exit(ExitReason.INTERRUPT_WINDOW, offset=guest.handler(Vector.DB))
        assert _activity(guest) == ActivityState.ACTIVE
        guest.off(ProcCtl.INTERRUPT_WINDOW_EXITING)
        seen = guest.go_on()  # type: ignore[assignment]
    assert seen == Fault(Vector.DB, error_code=0, rip=0)
