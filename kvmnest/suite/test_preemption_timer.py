"""The VMX-preemption timer: when it counts, what its exit leaves behind, what beats it."""

from __future__ import annotations

import pytest

from kvmnest.kvm import Cap
from kvmnest.l1 import L1, code
from kvmnest.suite.support.guest import NOT_VALID, Guest
from kvmnest.vmx import (
    ExitCtl,
    ExitReason,
    Field,
    IntrType,
    Msr,
    PinCtl,
    ProcCtl,
    Vector,
    intr_info,
)
from kvmnest.vmx.outcome import Exit, Fault, HostExit, Succeed

TIMER = PinCtl.ACTIVATE_PREEMPTION_TIMER

pytestmark = [
    pytest.mark.series(19),
    pytest.mark.sdm("VMX-Preemption Timer"),
    pytest.mark.needs(TIMER),
]

#: Longer than L2's few instructions take on the slowest host: minutes.
NEVER = 0xFFFFFFFF
#: Some milliseconds: L2 has reached its HLT or loop by then, and nobody waits for it.
SHORT = 1 << 19
#: Longer than the host takes to save and restore a VM.
LONG = 1 << 21
#: RFLAGS with IF set: Bochs 2.7 ends no loop of L2 for its host's timer while L2 has IF clear.
IF = 0x202
LOOP = b"\xeb\xfe"
OUT_80 = code.out8(0x80)
HLT_STATE = 1


def _deadline(l1: L1) -> tuple[int, int]:
    """Flags and deadline, in units of the timer, in the header of the nested state."""
    header = l1.vcpu.get_nested_state()[:40]
    return int.from_bytes(header[28:32], "little"), int.from_bytes(header[32:40], "little")


def _expired(guest: Guest, offset: int = 0) -> Exit:
    return guest.exit(ExitReason.PREEMPTION_TIMER, offset=offset)


def test_zero_expires_at_once(l1: L1) -> None:
    """With value 0 L2 executes nothing, whatever its RFLAGS.IF is."""
    guest = Guest(l1, TIMER)
    for flags in (0x2, 0x202):
        seen = guest.run(code.CPUID, VMX_PREEMPTION_TIMER_VALUE=0, GUEST_RFLAGS=flags)
        assert seen == _expired(guest)
        assert guest.changed(seen) == {}
        assert guest.vmcs[Field.GUEST_RFLAGS] == flags
        assert guest.vmcs[Field.VMX_PREEMPTION_TIMER_VALUE] == 0


def test_not_active(l1: L1) -> None:
    """Without the control the field means nothing."""
    guest = Guest(l1)
    assert guest.run(code.NOP, VMX_PREEMPTION_TIMER_VALUE=0) == Succeed()
    guest.on(TIMER)
    assert guest.run(code.NOP, VMX_PREEMPTION_TIMER_VALUE=0) == _expired(guest)
    guest.off(TIMER)
    assert guest.run(code.NOP, VMX_PREEMPTION_TIMER_VALUE=0) == Succeed()


def test_loop_is_ended(l1: L1) -> None:
    """A loop without an exit ends when the timer is down."""
    guest = Guest(l1, TIMER)
    seen = guest.run(code.NOP + LOOP, VMX_PREEMPTION_TIMER_VALUE=SHORT, GUEST_RFLAGS=IF)
    assert seen == _expired(guest, 1)
    assert guest.changed(seen) == {}


def test_halted_guest_is_woken(l1: L1) -> None:
    """The timer counts in the HLT state too, and the exit saves that state."""
    guest = Guest(l1, TIMER)
    seen = guest.run(code.HLT + code.INVD, VMX_PREEMPTION_TIMER_VALUE=SHORT)
    assert seen == _expired(guest, 1)
    assert guest.vmcs[Field.GUEST_ACTIVITY_STATE] == HLT_STATE
    # L2 is entered in that state again and halts on.
    seen = guest.run(code.INVD, VMX_PREEMPTION_TIMER_VALUE=SHORT, GUEST_ACTIVITY_STATE=HLT_STATE)
    assert seen == _expired(guest)
    assert guest.vmcs[Field.GUEST_ACTIVITY_STATE] == HLT_STATE


@pytest.mark.needs(ExitCtl.SAVE_PREEMPTION_TIMER)
def test_value_is_saved(l1: L1) -> None:
    """With "save VMX-preemption timer value" the field holds what is left, else what was set."""
    guest = Guest(l1, TIMER)
    guest.off(ExitCtl.SAVE_PREEMPTION_TIMER)
    assert guest.run(code.NOP, VMX_PREEMPTION_TIMER_VALUE=NEVER) == Succeed()
    assert guest.vmcs[Field.VMX_PREEMPTION_TIMER_VALUE] == NEVER
    guest.on(ExitCtl.SAVE_PREEMPTION_TIMER)
    assert guest.run(code.NOP, VMX_PREEMPTION_TIMER_VALUE=NEVER) == Succeed()
    left = guest.vmcs[Field.VMX_PREEMPTION_TIMER_VALUE]
    # It went down, by far less than a half.
    assert NEVER // 2 < left < NEVER
    assert guest.run(
        code.NOP + LOOP, VMX_PREEMPTION_TIMER_VALUE=SHORT, GUEST_RFLAGS=IF
    ) == _expired(guest, 1)
    assert guest.vmcs[Field.VMX_PREEMPTION_TIMER_VALUE] == 0


@pytest.mark.needs(ExitCtl.SAVE_PREEMPTION_TIMER)
def test_rate_is_the_tscs(l1: L1) -> None:
    """The timer counts down by 1 each time the TSC bit named by IA32_VMX_MISC[4:0] changes."""
    guest = Guest(l1, TIMER, ProcCtl.USE_TSC_OFFSETTING)
    guest.off(ProcCtl.RDTSC_EXITING)
    guest.on(ExitCtl.SAVE_PREEMPTION_TIMER)
    shift = l1.caps.misc.preemption_timer_rate
    before = l1.rdtsc().value
    # Two readings of L2 with a loop of 20,000 between them: the timer saw at least that time.
    spin = b"\xb9\x20\x4e\x00\x00\xff\xc9\x75\xfc"
    read = b"\x0f\x31\x48\xc1\xe2\x20\x48\x09\xd0"
    seen = guest.run(
        read + b"\x49\x89\xc0" + spin + read, VMX_PREEMPTION_TIMER_VALUE=NEVER, TSC_OFFSET=0
    )
    assert seen == Succeed()
    after = l1.rdtsc().value
    inside = seen.regs["rax"] - seen.regs["r8"]
    counted = NEVER - guest.vmcs[Field.VMX_PREEMPTION_TIMER_VALUE]
    assert inside >> shift <= counted + 1
    assert counted <= ((after - before) >> shift) + 1


@pytest.mark.needs(Cap.NESTED_STATE)
@pytest.mark.series(24)
def test_deadline_moves_with_l2(l1: L1) -> None:
    """The nested state holds the deadline; restored, the timer counts on and does not start anew.

    Kernel documentation, "KVM_SET_NESTED_STATE": KVM_STATE_VMX_PREEMPTION_TIMER_DEADLINE.
    """
    guest = Guest(l1, TIMER)
    seen = guest.run(OUT_80, VMX_PREEMPTION_TIMER_VALUE=NEVER)
    assert isinstance(seen, HostExit)
    flags, deadline = _deadline(l1)
    assert flags & 1
    l1.round_trip()
    assert _deadline(l1) == (flags, deadline)
    assert guest.resume() == Succeed()


@pytest.mark.needs(Cap.NESTED_STATE)
@pytest.mark.series(24)
def test_deadline_that_passed_meanwhile(l1: L1) -> None:
    """A timer that ran down while L2 was saved expires at once when L2 is restored."""
    guest = Guest(l1, TIMER)
    seen = guest.run(OUT_80 + code.NOP, VMX_PREEMPTION_TIMER_VALUE=LONG)
    assert isinstance(seen, HostExit)
    l1.vcpu.run(immediate_exit=True)
    _, deadline = _deadline(l1)
    while l1.vcpu.get_msrs([Msr.TSC])[Msr.TSC] >> l1.caps.misc.preemption_timer_rate < deadline:
        pass
    l1.round_trip()
    assert guest.resume() == _expired(guest, 2)


@pytest.mark.sdm("VM Exits Induced by the VMX-Preemption Timer")
def test_injected_event_goes_first(l1: L1) -> None:
    """An injected event is delivered before the timer's exit: RIP is the handler's."""
    guest = Guest(l1, TIMER)
    seen = guest.run(
        code.NOP,
        VMX_PREEMPTION_TIMER_VALUE=0,
        VM_ENTRY_INTR_INFO_FIELD=intr_info(Vector.UD, IntrType.HARDWARE_EXCEPTION),
    )
    assert isinstance(seen, Exit)
    assert seen.reason == ExitReason.PREEMPTION_TIMER
    assert seen == Exit(ExitReason.PREEMPTION_TIMER, intr_info=NOT_VALID, idt_info=NOT_VALID)
    # Nothing of the handler ran: it reports when it is resumed without the timer.
    guest.off(TIMER)
    assert guest.go_on() == Fault(Vector.UD, error_code=0, rip=0)


@pytest.mark.sdm("VM Exits Induced by the VMX-Preemption Timer")
def test_comes_before_an_nmi_window(l1: L1) -> None:
    """The timer's exit has priority over NMI-window and interrupt-window exits."""
    guest = Guest(l1, TIMER, ProcCtl.INTERRUPT_WINDOW_EXITING)
    seen = guest.run(code.NOP, VMX_PREEMPTION_TIMER_VALUE=0, GUEST_RFLAGS=0x202)
    assert seen == _expired(guest)
    guest.off(TIMER)
    assert guest.go_on() == Exit(ExitReason.INTERRUPT_WINDOW, qualification=0, rip=guest.at())


@pytest.mark.sdm("VM Exits Induced by the VMX-Preemption Timer")
@pytest.mark.parametrize("pending", [1 << 14, 1 | 1 << 12], ids=["BS", "B0"])
def test_pending_debug_exception_goes_first(l1: L1, pending: int) -> None:
    """It comes before the exit of a timer that is 0 at entry: as an exit, or to L2's handler."""
    guest = Guest(l1, TIMER)
    seen = guest.run(
        code.NOP,
        VMX_PREEMPTION_TIMER_VALUE=0,
        GUEST_PENDING_DBG_EXCEPTIONS=pending,
        EXCEPTION_BITMAP=1 << Vector.DB,
    )
    assert seen == guest.exception(Vector.DB, qualification=pending & ~(1 << 12))
    seen = guest.run(
        code.NOP,
        VMX_PREEMPTION_TIMER_VALUE=0,
        GUEST_PENDING_DBG_EXCEPTIONS=pending,
        EXCEPTION_BITMAP=0,
    )
    assert seen == _expired(guest, guest.handler(Vector.DB))
    guest.off(TIMER)
    assert guest.go_on() == Fault(Vector.DB, error_code=0, rip=0)


@pytest.mark.sdm("VM Exits Induced by the VMX-Preemption Timer")
def test_injected_exception_is_not_intercepted(l1: L1) -> None:
    """An injected #DB that the bitmap names is delivered, and the timer exits at its handler."""
    guest = Guest(l1, TIMER)
    seen = guest.run(
        code.NOP,
        VMX_PREEMPTION_TIMER_VALUE=0,
        EXCEPTION_BITMAP=1 << Vector.DB,
        VM_ENTRY_INTR_INFO_FIELD=intr_info(Vector.DB, IntrType.HARDWARE_EXCEPTION),
    )
    assert seen == _expired(guest, guest.handler(Vector.DB))
    guest.off(TIMER)
    assert guest.go_on() == Fault(Vector.DB, error_code=0, rip=0)


@pytest.mark.sdm("VM Exits Induced by the VMX-Preemption Timer")
@pytest.mark.needs(ExitCtl.SAVE_PREEMPTION_TIMER)
def test_single_steps_are_not_lost(l1: L1) -> None:
    """The timer expires while L2 single-steps: a trap that waits is saved, and comes later.

    Each instruction of L2 traps once, whether a timer exit comes between it and its trap or not.
    """
    guest = Guest(l1, TIMER)
    guest.on(ExitCtl.SAVE_PREEMPTION_TIMER)
    count = 40
    fields = {"GUEST_RFLAGS": 0x102, "EXCEPTION_BITMAP": 1 << Vector.DB}
    expired, trapped, offset = 0, [], 0
    seen = guest.run(code.NOP * count, VMX_PREEMPTION_TIMER_VALUE=0, **fields)
    while seen.reason in (ExitReason.PREEMPTION_TIMER, ExitReason.EXCEPTION_NMI):
        if seen.reason == ExitReason.PREEMPTION_TIMER:
            expired += 1
            # The exit leaves no trap behind: it waits in the field, or has come already.
            (pending,) = guest.vmcs.read(Field.GUEST_PENDING_DBG_EXCEPTIONS)
            assert pending == (1 << 14 if seen.rip != guest.at(offset) else 0)
        else:
            offset += 1
            assert seen == guest.exception(Vector.DB, offset=offset, qualification=1 << 14)
            trapped.append(offset)
            if offset == count:
                break
        # Every other round the timer expires before L2's next instruction.
        guest.vmcs[Field.VMX_PREEMPTION_TIMER_VALUE] = 0 if expired <= len(trapped) else NEVER
        seen = guest.go_on()
        assert isinstance(seen, Exit)
    assert trapped == list(range(1, count + 1))
    assert expired >= count // 2


@pytest.mark.parametrize("ticks", [1 << 10, 1 << 14], ids=["short", "long"])
def test_is_never_late(l1: L1, ticks: int) -> None:
    """The last time that L2 reads lies before the end of the timer, which began with the entry."""
    guest = Guest(l1, TIMER)
    guest.off(ProcCtl.RDTSC_EXITING)
    guest.off(ProcCtl.USE_TSC_OFFSETTING)
    data, rate = l1.sym("l2_data"), l1.caps.misc.preemption_timer_rate
    # RDTSC; SHL RDX, 32; OR RAX, RDX: the time in RAX.
    now = code.RDTSC + b"\x48\xc1\xe2\x20\x48\x09\xd0"
    first = now + b"\x48\x89\x07"  # MOV [RDI], RAX
    loop = now + b"\x48\x89\x47\x08"  # MOV [RDI+8], RAX
    program = first + loop + b"\xeb" + bytes([256 - len(loop) - 2])
    for _ in range(3):
        l1.write(data, bytes(16))
        seen = guest.run(program, {"rdi": data}, VMX_PREEMPTION_TIMER_VALUE=ticks, GUEST_RFLAGS=IF)
        assert seen.reason == ExitReason.PREEMPTION_TIMER
        began, last = l1.read_int(data), l1.read_int(data + 8)
        assert last < began + (ticks << rate)
