"""Interrupt-window exiting in every blocking state."""

from __future__ import annotations

import pytest

from kvmnest.l1 import L1, code
from kvmnest.suite.support.apic import Apic
from kvmnest.suite.support.guest import NOT_VALID, Guest, copied_idt
from kvmnest.vmx import (
    ExitCtl,
    ExitReason,
    Field,
    IntrType,
    PinCtl,
    ProcCtl,
    Vector,
    intr_info,
)
from kvmnest.vmx.outcome import Exit, Fault, Succeed

pytestmark = [
    pytest.mark.series(20),
    pytest.mark.needs(ProcCtl.INTERRUPT_WINDOW_EXITING),
    pytest.mark.sdm("Interrupt-Window Exiting and Virtual-Interrupt Delivery"),
]

MOV_SS = b"\x8e\xd0"
POPFQ = b"\x50\x9d"  # PUSH RAX; POPFQ


def _window(guest: Guest, offset: int = 0) -> Exit:
    return guest.exit(ExitReason.INTERRUPT_WINDOW, offset=offset)


@pytest.mark.parametrize(
    ("blocking", "offset"), [(0, 0), (1, 1), (2, 1)], ids=["none", "sti", "mov-ss"]
)
def test_window_at_entry(l1: L1, blocking: int, offset: int) -> None:
    """With IF set the exit comes before the first instruction, blocked by STI or MOV SS after."""
    guest = Guest(l1, ProcCtl.INTERRUPT_WINDOW_EXITING)
    for _ in range(3):
        seen = guest.run(code.NOP * 3, GUEST_RFLAGS=0x202, GUEST_INTERRUPTIBILITY_INFO=blocking)
        assert seen == _window(guest, offset)
        assert guest.changed(seen) == {}
        saved = guest.vmcs.read(Field.GUEST_RFLAGS, Field.GUEST_INTERRUPTIBILITY_INFO)
        assert saved == (0x202, 0)
    guest.off(ProcCtl.INTERRUPT_WINDOW_EXITING)
    assert guest.go_on() == Succeed()


def test_window_opened_by_l2(l1: L1) -> None:
    """With IF clear L2 runs on until it opens the window itself."""
    guest = Guest(l1, ProcCtl.INTERRUPT_WINDOW_EXITING)
    data = l1.sym("SEL_DATA")
    for program, regs, offset in (
        (code.NOP * 3, {}, None),
        (code.NOP + code.STI + code.NOP * 2, {}, 3),
        (POPFQ + code.NOP, {"rax": 0x202}, 2),
        (POPFQ + code.NOP, {"rax": 0x2}, None),
        (code.STI + MOV_SS + code.NOP * 2, {"rax": data}, 4),
        (code.STI + code.CLI + code.NOP, {}, None),
    ):
        seen = guest.run(program, regs)
        expected = Succeed() if offset is None else _window(guest, offset)
        assert seen == expected, program.hex()


def test_window_after_iret(l1: L1) -> None:
    """IRET that sets IF opens the window at once."""
    guest = Guest(l1, ProcCtl.INTERRUPT_WINDOW_EXITING)
    stack = l1.sym("l2_stack_top") - 64
    target = l1.sym("l2_code") + 2
    frame = (target, l1.sym("SEL_CODE64"), 0x202, stack, l1.sym("SEL_DATA"))
    l1.write(stack, b"".join(word.to_bytes(8, "little") for word in frame))
    assert guest.run(b"\x48\xcf" + code.NOP, GUEST_RSP=stack) == _window(guest, 2)
    assert guest.vmcs.read(Field.GUEST_RFLAGS) == (0x202,)


def test_window_wakes_from_hlt(l1: L1) -> None:
    """In the activity state HLT, too, the exit comes at once when IF is set."""
    guest = Guest(l1, ProcCtl.INTERRUPT_WINDOW_EXITING)
    for _ in range(2):
        seen = guest.run(code.NOP, GUEST_RFLAGS=0x202, GUEST_ACTIVITY_STATE=1)
        assert seen == _window(guest)
        guest.vmcs[Field.GUEST_ACTIVITY_STATE] = 0


def test_window_and_injection(l1: L1) -> None:
    """An injected event is delivered first; its gate decides whether the window is open."""
    guest = Guest(l1, ProcCtl.INTERRUPT_WINDOW_EXITING)
    # An IDT whose gate 31H is a trap gate, which leaves IF alone.
    guest.vmcs[Field.GUEST_IDTR_BASE] = copied_idt(l1, {0x31: 0x8F})
    for vector in (0x30, 0x31):
        info = intr_info(vector, IntrType.EXTERNAL_INTERRUPT)
        seen = guest.run(code.NOP, GUEST_RFLAGS=0x202, VM_ENTRY_INTR_INFO_FIELD=info)
        if vector == 0x31:
            assert seen == _window(guest, guest.handler(vector))
            # RIP of what was interrupted is on the stack.
            stack = guest.vmcs[Field.GUEST_RSP]
            assert l1.read_int(stack) == guest.start
            guest.off(ProcCtl.INTERRUPT_WINDOW_EXITING)
            seen = guest.go_on()
        assert seen == Fault(vector, error_code=0, rip=0)


def test_window_of_a_hypervisor(l1: L1) -> None:
    """L1 waits for the window, then injects, and L2 goes on behind its handler."""
    guest = Guest(l1)
    # L2: CLI part, STI, then the interrupt; its handler would IRET, here it reports.
    guest.on(ProcCtl.INTERRUPT_WINDOW_EXITING)
    assert guest.run(code.NOP * 4 + code.STI + code.NOP * 4) == _window(guest, 6)
    guest.off(ProcCtl.INTERRUPT_WINDOW_EXITING)
    guest.vmcs[Field.VM_ENTRY_INTR_INFO_FIELD] = intr_info(0x44, IntrType.EXTERNAL_INTERRUPT)
    assert guest.go_on() == Fault(0x44, error_code=0, rip=6)


def test_exception_before_the_window(l1: L1) -> None:
    """A pending debug exception is delivered before the window exit."""
    guest = Guest(l1, ProcCtl.INTERRUPT_WINDOW_EXITING)
    seen = guest.run(
        code.NOP * 2,
        GUEST_RFLAGS=0x302,
        GUEST_PENDING_DBG_EXCEPTIONS=1 << 14,
        EXCEPTION_BITMAP=1 << Vector.DB,
    )
    assert seen == guest.exception(Vector.DB, qualification=1 << 14)


@pytest.mark.sdm("Other Causes of VM Exits")
@pytest.mark.parametrize(
    ("window", "reason"),
    [
        pytest.param(
            ProcCtl.INTERRUPT_WINDOW_EXITING, ExitReason.INTERRUPT_WINDOW, id="interrupt-window"
        ),
        pytest.param(
            ProcCtl.NMI_WINDOW_EXITING,
            ExitReason.NMI_WINDOW,
            marks=pytest.mark.needs(ProcCtl.NMI_WINDOW_EXITING, PinCtl.VIRTUAL_NMIS),
            id="NMI-window",
        ),
    ],
)
@pytest.mark.needs(PinCtl.EXTERNAL_INTERRUPT_EXITING)
def test_window_comes_before_an_interrupt(l1: L1, window: ProcCtl, reason: ExitReason) -> None:
    """VM exits for an open window take priority over external interrupts, which come next."""
    apic, guest = Apic(l1), Guest(l1, PinCtl.EXTERNAL_INTERRUPT_EXITING)
    if window is ProcCtl.NMI_WINDOW_EXITING:
        guest.on(PinCtl.NMI_EXITING | PinCtl.VIRTUAL_NMIS)
    guest.on(window)
    guest.off(ExitCtl.ACKNOWLEDGE_INTERRUPT_ON_EXIT)
    apic.send(0x51)
    assert guest.run(code.NOP, GUEST_RFLAGS=0x202) == guest.exit(reason)
    guest.off(window)
    assert guest.go_on() == guest.exit(ExitReason.EXTERNAL_INTERRUPT, intr_info=NOT_VALID)
