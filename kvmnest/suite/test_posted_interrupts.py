"""Posted interrupts: what the notification vector does in L2, in HLT and in L1."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from kvmnest.kvm.exits import IO_OUT, IoExit
from kvmnest.l1 import L1, code
from kvmnest.suite.support.apic import Apic
from kvmnest.suite.support.guest import NOT_VALID
from kvmnest.suite.support.virtual_apic import DELIVERY, VirtualApic
from kvmnest.vmx import ExitCtl, ExitReason, Field, IntrType, Msr, PinCtl, intr_info
from kvmnest.vmx.outcome import Exit, Fault, HostExit, Succeed

_NEEDS = (
    *DELIVERY,
    PinCtl.PROCESS_POSTED_INTERRUPTS,
    ExitCtl.ACKNOWLEDGE_INTERRUPT_ON_EXIT,
)
pytestmark = [
    pytest.mark.series(20),
    pytest.mark.sdm("Posted-Interrupt Processing"),
    pytest.mark.needs(*_NEEDS),
]

NOTIFICATION = 0xF2
VECTOR = 0x51
IF = 0x202
_LATER = 20_000_000  # the APIC timer of KVM counts at 1 GHz
_OUTSTANDING = 256  # the bit behind the 256 of the posted-interrupt requests
OUT_80 = code.out8(0x80)


class _Posted:
    """L2 with virtual-interrupt delivery and a posted-interrupt descriptor, and L1's APIC."""

    def __init__(self, l1: L1) -> None:
        self.l1, self.apic = l1, Apic(l1)
        self.virtual = VirtualApic(
            l1, PinCtl.PROCESS_POSTED_INTERRUPTS, ExitCtl.ACKNOWLEDGE_INTERRUPT_ON_EXIT
        )
        self.guest = self.virtual.guest
        self.descriptor = l1.alloc() + 64
        self.guest.vmcs[Field.POSTED_INTR_NV] = NOTIFICATION
        self.guest.vmcs[Field.POSTED_INTR_DESC_ADDR] = self.descriptor

    def post(self, vectors: Iterable[int], outstanding: bool = True) -> None:
        """Fill in the descriptor; the rest of it belongs to software."""
        bits = sum(1 << vector for vector in vectors) | outstanding << _OUTSTANDING
        self.l1.write_int(self.descriptor, bits | 0x5A << 504, 64)

    def left(self) -> tuple[list[int], bool]:
        """Vectors that are still posted, and whether a notification is outstanding."""
        bits = self.l1.read_int(self.descriptor, 64)
        assert bits >> 504 == 0x5A
        return [n for n in range(256) if bits >> n & 1], bool(bits >> _OUTSTANDING & 1)

    def dismissed(self) -> bool:
        """Whether the notification is gone from L1's local APIC."""
        return (self.apic.requested(), self.apic.in_service()) == ([], [])


def _interrupted(posted: _Posted, vector: int, offset: int = 0) -> Exit:
    return Exit(
        ExitReason.EXTERNAL_INTERRUPT,
        qualification=0,
        rip=posted.guest.at(offset),
        intr_info=intr_info(vector, IntrType.EXTERNAL_INTERRUPT),
        idt_info=NOT_VALID,
    )


@pytest.mark.parametrize("outstanding", [True, False], ids=["ON", "no-ON"])
def test_notification_at_the_entry(l1: L1, outstanding: bool) -> None:
    """It waits in L1's APIC; L2 gets the posted vector without an exit, and the rest is clear."""
    posted = _Posted(l1)
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
    posted = _Posted(l1)
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


def test_with_interrupts_disabled(l1: L1) -> None:
    """RFLAGS.IF does not hold the notification off; it holds the virtual interrupt off."""
    posted = _Posted(l1)
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
    posted = _Posted(l1)
    posted.post([VECTOR])
    assert posted.guest.run(code.NOP, GUEST_RFLAGS=IF) == Succeed()
    assert posted.virtual.state() == ([], [], 0, 0)
    assert posted.left() == ([VECTOR], True)


def test_another_vector_exits(l1: L1) -> None:
    """Any other vector is an external interrupt that exits, acknowledged."""
    posted = _Posted(l1)
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
    posted = _Posted(l1)
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
    posted = _Posted(l1)
    posted.post([VECTOR])
    seen = posted.guest.run(OUT_80 + code.NOP, {"rax": 0}, GUEST_RFLAGS=IF)
    assert seen == HostExit(IoExit(IO_OUT, 1, 0x80, 1, b"\0"))
    if restored:
        l1.round_trip()
    l1.vm.signal_msi(0xFEE00000, NOTIFICATION)
    assert posted.guest.resume() == Fault(VECTOR, error_code=0, rip=len(OUT_80))
    assert posted.left() == ([], False)
    assert posted.dismissed()


@pytest.mark.series(24)
def test_save_and_restore_with_a_notification_pending(l1: L1) -> None:
    """A notification that waits when the VM is saved is processed in the new one."""
    posted = _Posted(l1)
    posted.post([VECTOR])
    seen = posted.guest.run(OUT_80 + code.NOP, {"rax": 0}, GUEST_RFLAGS=IF)
    assert seen == HostExit(IoExit(IO_OUT, 1, 0x80, 1, b"\0"))
    l1.vm.signal_msi(0xFEE00000, NOTIFICATION)
    l1.round_trip()
    assert posted.guest.resume() == Fault(VECTOR, error_code=0, rip=len(OUT_80))
    assert posted.left() == ([], False)
    assert posted.dismissed()


@pytest.mark.parametrize("state", [0, 1], ids=["instruction", "activity-state"])
def test_hlt_is_woken(l1: L1, state: int) -> None:
    """The notification comes from L1's timer while L2 sleeps: L2 wakes for the posted vector."""
    posted = _Posted(l1)
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
    posted = _Posted(l1)
    posted.post([VECTOR])
    posted.apic.send(NOTIFICATION)
    assert posted.apic.open_window() == [NOTIFICATION]
    assert posted.left() == ([VECTOR], True)
    assert posted.guest.run(code.NOP, GUEST_RFLAGS=IF) == Succeed()
    assert posted.left() == ([VECTOR], True)


def test_too_low_for_l2(l1: L1) -> None:
    """A posted vector below L2's task priority is requested and waits for CR8."""
    posted = _Posted(l1)
    posted.virtual.set(tpr=0x60)
    posted.post([VECTOR])
    posted.apic.send(NOTIFICATION)
    program = code.NOP + code.mov_to_cr(8) + code.NOP
    seen = posted.guest.run(program, {"rax": 4}, GUEST_RFLAGS=IF)
    assert seen == Fault(VECTOR, error_code=0, rip=len(program) - 1)
    assert posted.left() == ([], False)
