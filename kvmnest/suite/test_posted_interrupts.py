"""Posted interrupts: what the notification vector does in L2, in HLT and in L1."""

from __future__ import annotations

import pytest

from kvmnest.kvm.exits import IO_OUT, IoExit
from kvmnest.l1 import L1, code
from kvmnest.suite.support.apic import TO_APIC_0
from kvmnest.suite.support.virtual_apic import NOTIFICATION, POSTED, PostedInterrupts
from kvmnest.vmx import ExitReason, IntrType, Msr, intr_info
from kvmnest.vmx.outcome import Exit, Fault, HostExit, Succeed

pytestmark = [
    pytest.mark.series(20),
    pytest.mark.sdm("Posted-Interrupt Processing"),
    pytest.mark.needs(*POSTED),
]

VECTOR = 0x51
IF = 0x202
_LATER = 20_000_000  # the APIC timer of KVM counts at 1 GHz
OUT_80 = code.out8(0x80)


def _interrupted(posted: PostedInterrupts, vector: int, offset: int = 0) -> Exit:
    return posted.guest.exit(
        ExitReason.EXTERNAL_INTERRUPT,
        offset=offset,
        intr_info=intr_info(vector, IntrType.EXTERNAL_INTERRUPT),
    )


@pytest.mark.parametrize("outstanding", [True, False], ids=["ON", "no-ON"])
def test_notification_at_the_entry(l1: L1, outstanding: bool) -> None:
    """It waits in L1's APIC; L2 gets the posted vector without an exit, and the rest is clear."""
    posted = PostedInterrupts(l1)
    for vectors in ([VECTOR], [0x20, VECTOR], [0x10, 0x41, 0xFF]):
        posted.virtual.set()
        posted.post(vectors, outstanding)
        posted.apic.send(NOTIFICATION)
        seen = posted.guest.run(code.NOP, GUEST_RFLAGS=IF)
        assert seen == Fault(vectors[-1], error_code=0, rip=0)
        rest = vectors[:-1]
        assert posted.virtual.state() == (rest, vectors[-1:], max(rest, default=0), vectors[-1])
        assert posted.left() == ([], False)
        assert posted.dismissed()


def test_added_to_what_waits(l1: L1) -> None:
    """Posted vectors join VIRR; RVI becomes the highest of all."""
    posted = PostedInterrupts(l1)
    posted.virtual.set(requested=[0x60], in_service=[0x75])
    posted.post([0x45, 0x72])
    posted.apic.send(NOTIFICATION)
    assert posted.guest.run(code.NOP, GUEST_RFLAGS=IF) == Succeed()
    assert posted.virtual.state() == ([0x45, 0x60, 0x72], [0x75], 0x72, 0x75)
    assert posted.left() == ([], False)
    # A lower one leaves RVI.
    posted.post([0x30])
    posted.apic.send(NOTIFICATION)
    assert posted.guest.run(code.NOP, GUEST_RFLAGS=IF) == Succeed()
    assert posted.virtual.state() == ([0x30, 0x45, 0x60, 0x72], [0x75], 0x72, 0x75)


def test_lower_than_rvi(l1: L1) -> None:
    """RVI becomes the higher of itself and the highest that was posted, whatever VIRR holds."""
    posted = PostedInterrupts(l1)
    posted.virtual.set(requested=[], in_service=[0x75], rvi=0x71)
    posted.post([0x51])
    posted.apic.send(NOTIFICATION)
    assert posted.guest.run(code.NOP, GUEST_RFLAGS=IF) == Succeed()
    assert posted.virtual.state() == ([0x51], [0x75], 0x71, 0x75)


def test_with_interrupts_disabled(l1: L1) -> None:
    """RFLAGS.IF does not hold the notification off; it holds the virtual interrupt off."""
    posted = PostedInterrupts(l1)
    posted.post([VECTOR])
    posted.apic.send(NOTIFICATION)
    assert posted.guest.run(code.NOP, GUEST_RFLAGS=2) == Succeed()
    assert posted.virtual.state() == ([VECTOR], [], VECTOR, 0)
    assert posted.left() == ([], False)
    assert posted.dismissed()
    seen = posted.guest.run(code.NOP, GUEST_RFLAGS=IF)
    assert seen == Fault(VECTOR, error_code=0, rip=0)


def test_without_notification(l1: L1) -> None:
    """Nobody looks at the descriptor before a notification comes."""
    posted = PostedInterrupts(l1)
    posted.post([VECTOR])
    assert posted.guest.run(code.NOP, GUEST_RFLAGS=IF) == Succeed()
    assert posted.virtual.state() == ([], [], 0, 0)
    assert posted.left() == ([VECTOR], True)


def test_another_vector_exits(l1: L1) -> None:
    """Any other vector is an external interrupt that exits, acknowledged."""
    posted = PostedInterrupts(l1)
    for vector in (NOTIFICATION - 1, NOTIFICATION + 1, VECTOR):
        posted.post([VECTOR])
        posted.apic.send(vector)
        seen = posted.guest.run(code.NOP, GUEST_RFLAGS=IF)
        assert seen == _interrupted(posted, vector)
        assert posted.left() == ([VECTOR], True)
        assert posted.apic.in_service() == [vector]
        posted.apic.end()


def test_sent_by_l2(l1: L1) -> None:
    """The notification comes while L2 runs: L2 sends it through L1's interrupt-command register."""
    posted = PostedInterrupts(l1)
    posted.post([VECTOR])
    self_shorthand = 1 << 18 | NOTIFICATION
    regs = {"rcx": Msr.X2APIC_ICR, "rax": self_shorthand, "rdx": 0}
    seen = posted.guest.run(code.WRMSR + code.NOP * 3, regs, GUEST_RFLAGS=IF)
    assert seen == Fault(VECTOR, error_code=0, rip=2)
    assert posted.virtual.state() == ([], [VECTOR], 0, VECTOR)
    assert posted.left() == ([], False)
    assert posted.dismissed()


@pytest.mark.parametrize("restored", [False, True], ids=["", "restored"])
def test_from_the_host(l1: L1, restored: bool) -> None:
    """The notification is a message that comes while userspace has the vCPU, in L2."""
    posted = PostedInterrupts(l1)
    posted.post([VECTOR])
    seen = posted.guest.run(OUT_80 + code.NOP, {"rax": 0}, GUEST_RFLAGS=IF)
    assert seen == HostExit(IoExit(IO_OUT, 1, 0x80, 1, b"\0"))
    if restored:
        l1.round_trip()
    l1.vm.signal_msi(TO_APIC_0, NOTIFICATION)
    assert posted.guest.resume() == Fault(VECTOR, error_code=0, rip=len(OUT_80))
    assert posted.left() == ([], False)
    assert posted.dismissed()


@pytest.mark.series(24)
def test_save_and_restore_with_a_notification_pending(l1: L1) -> None:
    """A notification that waits when the VM is saved is processed in the new one."""
    posted = PostedInterrupts(l1)
    posted.post([VECTOR])
    seen = posted.guest.run(OUT_80 + code.NOP, {"rax": 0}, GUEST_RFLAGS=IF)
    assert seen == HostExit(IoExit(IO_OUT, 1, 0x80, 1, b"\0"))
    l1.vm.signal_msi(TO_APIC_0, NOTIFICATION)
    l1.round_trip()
    assert posted.guest.resume() == Fault(VECTOR, error_code=0, rip=len(OUT_80))
    assert posted.left() == ([], False)
    assert posted.dismissed()


@pytest.mark.parametrize("state", [0, 1], ids=["instruction", "activity-state"])
def test_hlt_is_woken(l1: L1, state: int) -> None:
    """The notification comes from L1's timer while L2 sleeps: L2 wakes for the posted vector."""
    posted = PostedInterrupts(l1)
    posted.post([VECTOR])
    posted.apic.start_timer(NOTIFICATION, _LATER)
    if state:
        seen = posted.guest.run(code.NOP, GUEST_RFLAGS=IF, GUEST_ACTIVITY_STATE=1)
        assert seen == Fault(VECTOR, error_code=0, rip=0)
    else:
        seen = posted.guest.run(code.HLT + code.NOP, GUEST_RFLAGS=IF)
        assert seen == Fault(VECTOR, error_code=0, rip=1)
    assert posted.virtual.state() == ([], [VECTOR], 0, VECTOR)
    assert posted.left() == ([], False)
    assert posted.dismissed()


def test_in_l1(l1: L1) -> None:
    """Outside VMX non-root operation it is an interrupt like any other."""
    posted = PostedInterrupts(l1)
    posted.post([VECTOR])
    posted.apic.send(NOTIFICATION)
    assert posted.apic.open_window() == [NOTIFICATION]
    assert posted.left() == ([VECTOR], True)
    assert posted.guest.run(code.NOP, GUEST_RFLAGS=IF) == Succeed()
    assert posted.left() == ([VECTOR], True)


def test_too_low_for_l2(l1: L1) -> None:
    """A posted vector below L2's task priority is requested and waits for CR8."""
    posted = PostedInterrupts(l1)
    posted.virtual.set(tpr=0x60)
    posted.post([VECTOR])
    posted.apic.send(NOTIFICATION)
    program = code.NOP + code.mov_to_cr(8) + code.NOP
    seen = posted.guest.run(program, {"rax": 4}, GUEST_RFLAGS=IF)
    assert seen == Fault(VECTOR, error_code=0, rip=len(program) - 1)
    assert posted.left() == ([], False)
