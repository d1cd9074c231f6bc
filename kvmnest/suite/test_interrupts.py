"""External interrupts while L2 runs: exits with and without acknowledgement, or L2's own."""

from __future__ import annotations

import pytest

from kvmnest.l1 import L1, code
from kvmnest.suite.support.apic import TO_APIC_0, Apic, send_in_l2
from kvmnest.suite.support.bitmaps import set_msr_bitmap
from kvmnest.suite.support.guest import NOT_VALID, Guest
from kvmnest.vmx import ExitCtl, ExitReason, Field, IntrType, Msr, PinCtl, ProcCtl, intr_info
from kvmnest.vmx.outcome import Exit, Fault, HostExit, Succeed

pytestmark = [pytest.mark.series(20), pytest.mark.sdm("External interrupts")]

VECTOR = 0x51
_LATER = 100_000_000  # the APIC timer of KVM counts at 1 GHz
OUT_80 = code.out8(0x80)
MOV_SS = b"\x8e\xd0"


def _guest(l1: L1, *, exiting: bool, acknowledge: bool = False) -> Guest:
    guest = Guest(l1, ProcCtl.USE_MSR_BITMAPS)
    set_msr_bitmap(l1)
    if exiting:
        guest.on(PinCtl.EXTERNAL_INTERRUPT_EXITING)
    if acknowledge:
        guest.on(ExitCtl.ACKNOWLEDGE_INTERRUPT_ON_EXIT)
    else:
        guest.off(ExitCtl.ACKNOWLEDGE_INTERRUPT_ON_EXIT)
    return guest


def _interrupted(guest: Guest, offset: int = 0, vector: int | None = None) -> Exit:
    """The exit by an external interrupt before the instruction at an offset."""
    info = NOT_VALID if vector is None else intr_info(vector, IntrType.EXTERNAL_INTERRUPT)
    return guest.exit(ExitReason.EXTERNAL_INTERRUPT, offset=offset, intr_info=info)


@pytest.mark.needs(PinCtl.EXTERNAL_INTERRUPT_EXITING, ExitCtl.ACKNOWLEDGE_INTERRUPT_ON_EXIT)
def test_acknowledged(l1: L1) -> None:
    """With "acknowledge interrupt on exit" L1 gets the vector, and the APIC has it in service."""
    apic, guest = Apic(l1), _guest(l1, exiting=True, acknowledge=True)
    for vector in (0x20, VECTOR, 0xE7, 0xFF):
        for flags in (0x2, 0x202):
            apic.send(vector)
            seen = guest.run(code.NOP, GUEST_RFLAGS=flags)
            assert seen == _interrupted(guest, vector=vector), hex(vector)
            assert guest.changed(seen) == {}
            assert guest.vmcs.read(Field.GUEST_RFLAGS) == (flags,)
            assert (apic.requested(), apic.in_service()) == ([], [vector])
            # It was delivered by the exit: L1's own handler does not see it.
            assert apic.open_window() == []
            apic.end()
            assert apic.in_service() == []
            assert guest.go_on() == Succeed()


@pytest.mark.needs(PinCtl.EXTERNAL_INTERRUPT_EXITING)
def test_not_acknowledged(l1: L1) -> None:
    """Without it the interrupt stays requested, and L1 takes it when RFLAGS.IF lets it."""
    apic, guest = Apic(l1), _guest(l1, exiting=True)
    for flags in (0x2, 0x202):
        apic.send(VECTOR)
        assert guest.run(code.NOP, GUEST_RFLAGS=flags) == _interrupted(guest)
        assert (apic.requested(), apic.in_service()) == ([VECTOR], [])
        # As long as it waits, each entry exits again before L2's first instruction.
        seen = guest.go_on()
        assert seen == _interrupted(guest)
        assert guest.changed(seen) == {}
        assert apic.open_window() == [VECTOR]
        assert guest.go_on() == Succeed()


@pytest.mark.needs(PinCtl.EXTERNAL_INTERRUPT_EXITING, ExitCtl.ACKNOWLEDGE_INTERRUPT_ON_EXIT)
def test_highest_priority_first(l1: L1) -> None:
    """Each exit acknowledges the interrupt of the highest priority; lower ones wait for EOI."""
    apic, guest = Apic(l1), _guest(l1, exiting=True, acknowledge=True)
    vectors = (0x31, 0x72, 0xC3)
    for vector in vectors:
        apic.send(vector)
    assert guest.run(code.NOP) == _interrupted(guest, vector=0xC3)
    assert apic.requested() == [0x31, 0x72]
    # An interrupt of lower priority than the one in service is not taken.
    assert guest.run(code.NOP) == Succeed()
    apic.end()
    assert guest.run(code.NOP) == _interrupted(guest, vector=0x72)
    apic.end()
    assert guest.run(code.NOP) == _interrupted(guest, vector=0x31)
    apic.end()
    assert guest.run(code.NOP) == Succeed()


@pytest.mark.needs(PinCtl.EXTERNAL_INTERRUPT_EXITING)
def test_task_priority(l1: L1) -> None:
    """An interrupt below L1's task priority does not exit before the priority is lowered."""
    apic, guest = Apic(l1), _guest(l1, exiting=True)
    assert l1.wrmsr(Msr.X2APIC_TPR, 0x50) == Succeed()
    apic.send(VECTOR)
    assert guest.run(code.NOP, GUEST_RFLAGS=0x202) == Succeed()
    # L2 lowers it by MOV to CR8, which does not exit and reaches L1's APIC.
    seen = guest.run(code.NOP + code.mov_to_cr(8) + code.NOP, {"rax": 4})
    assert seen == _interrupted(guest, 1 + len(code.mov_to_cr(8)))
    assert apic.open_window() == [VECTOR]
    assert l1.read_cr(8) == Succeed(4)


@pytest.mark.needs(PinCtl.EXTERNAL_INTERRUPT_EXITING, ExitCtl.ACKNOWLEDGE_INTERRUPT_ON_EXIT)
def test_sent_by_l2(l1: L1) -> None:
    """An interrupt that arises in L2 exits at the next instruction boundary, also with IF clear."""
    apic, guest = Apic(l1), _guest(l1, exiting=True, acknowledge=True)
    for flags in (0x2, 0x202):
        seen = guest.run(code.NOP + code.WRMSR + code.NOP, send_in_l2(VECTOR), GUEST_RFLAGS=flags)
        assert seen == _interrupted(guest, 3, VECTOR)
        apic.end()
        assert guest.go_on() == Succeed()


@pytest.mark.needs(PinCtl.EXTERNAL_INTERRUPT_EXITING, ExitCtl.ACKNOWLEDGE_INTERRUPT_ON_EXIT)
def test_from_the_host(l1: L1) -> None:
    """A message-signalled interrupt that comes while L2 runs exits to L1."""
    apic, guest = Apic(l1), _guest(l1, exiting=True, acknowledge=True)
    assert isinstance(guest.run(code.NOP + OUT_80 + code.NOP), HostExit)
    l1.vm.signal_msi(TO_APIC_0, VECTOR)
    assert guest.resume() == _interrupted(guest, 3, VECTOR)
    assert apic.in_service() == [VECTOR]
    apic.end()
    assert guest.go_on() == Succeed()


def test_delivered_in_l2(l1: L1) -> None:
    """Without external-interrupt exiting L2's own IDT gets it, if RFLAGS.IF is set."""
    apic, guest = Apic(l1), _guest(l1, exiting=False)
    for vector in (0x20, VECTOR, 0xFF):
        apic.send(vector)
        assert guest.run(code.NOP, GUEST_RFLAGS=0x2) == Succeed()
        assert apic.requested() == [vector]
        assert guest.run(code.NOP, GUEST_RFLAGS=0x202) == Fault(vector, error_code=0, rip=0)
        frame = l1.l2_frame(7)
        data, wide = l1.sym("SEL_DATA"), l1.sym("SEL_CODE64")
        assert frame[3:] == [wide, 0x202, l1.sym("l2_stack_top"), data]
        # The interrupt gate cleared IF.
        assert guest.vmcs.read(Field.GUEST_RFLAGS) == (0x2,)
        assert (apic.requested(), apic.in_service()) == ([], [vector])
        apic.end()


@pytest.mark.sdm("EOI Virtualization")
@pytest.mark.parametrize("taken_by", ["L1", "L2"])
def test_l2_acknowledges(l1: L1, taken_by: str) -> None:
    """L2, which has L1's APIC, writes its EOI: L1 and L2 get the next interrupt of that class."""
    apic, guest = Apic(l1), _guest(l1, exiting=False)
    l1.write_int(l1.cpu.block + l1.sym("CPU_EOI"), 0)  # L1's handler leaves it in service
    eoi = {"rcx": Msr.X2APIC_EOI, "rax": 0, "rdx": 0}
    for _ in range(2):
        for vector in (VECTOR, VECTOR - 1):
            apic.send(vector)
            if taken_by == "L1":
                assert apic.open_window() == [vector]
            else:
                seen = guest.run(code.NOP, GUEST_RFLAGS=0x202)
                assert seen == Fault(vector, error_code=0, rip=0)
            assert apic.in_service() == [vector]
            assert guest.run(code.WRMSR, eoi, GUEST_RFLAGS=0x2) == Succeed()
            assert (apic.requested(), apic.in_service()) == ([], [])


def test_l2_opens_its_window(l1: L1) -> None:
    """STI lets an interrupt in after the following instruction, POPF and MOV SS as usual."""
    apic, guest = Apic(l1), _guest(l1, exiting=False)
    data = l1.sym("SEL_DATA")
    for program, regs, rip in (
        (code.STI + code.NOP * 3, {}, 2),
        (code.NOP + code.STI + code.STI + code.NOP, {}, 3),
        (b"\x50\x9d" + code.NOP, {"rax": 0x202}, 2),
        (code.STI + MOV_SS + code.NOP * 2, {"rax": data}, 4),
        (code.STI + code.HLT + code.NOP, {}, 2),
    ):
        apic.send(VECTOR)
        assert guest.run(program, regs) == Fault(VECTOR, error_code=0, rip=rip), program.hex()
        apic.end()
    # STI; CLI opens nothing.
    apic.send(VECTOR)
    assert guest.run(code.STI + code.CLI + code.NOP) == Succeed()
    assert apic.requested() == [VECTOR]


def test_blocking_from_the_guest_state(l1: L1) -> None:
    """Blocking by STI or MOV SS in the VMCS holds an interrupt off for one instruction."""
    apic, guest = Apic(l1), _guest(l1, exiting=False)
    for blocking in (0, 1, 2):
        apic.send(VECTOR)
        seen = guest.run(code.NOP * 3, GUEST_RFLAGS=0x202, GUEST_INTERRUPTIBILITY_INFO=blocking)
        assert seen == Fault(VECTOR, error_code=0, rip=bool(blocking)), blocking
        apic.end()


def test_hlt_is_woken(l1: L1) -> None:
    """L2 in HLT (by the instruction or the activity state) wakes for an interrupt of its own."""
    apic, guest = Apic(l1), _guest(l1, exiting=False)
    apic.send(VECTOR)
    seen = guest.run(code.NOP, GUEST_RFLAGS=0x202, GUEST_ACTIVITY_STATE=1)
    assert seen == Fault(VECTOR, error_code=0, rip=0)
    assert guest.vmcs.read(Field.GUEST_ACTIVITY_STATE) == (0,)
    apic.end()
    seen = guest.run(code.WRMSR + code.STI + code.HLT + code.NOP, send_in_l2(VECTOR))
    assert seen == Fault(VECTOR, error_code=0, rip=4)
    apic.end()


@pytest.mark.needs(PinCtl.EXTERNAL_INTERRUPT_EXITING, ExitCtl.ACKNOWLEDGE_INTERRUPT_ON_EXIT)
@pytest.mark.sdm("Architectural State Before a VM Exit")
def test_exit_from_hlt(l1: L1) -> None:
    """An interrupt exits from HLT too; the activity state saved is HLT, the rest the entry's."""
    apic, guest = Apic(l1), _guest(l1, exiting=True, acknowledge=True)
    assert guest.run(code.NOP) == Succeed()
    table = l1.alloc()
    l1.write(table, l1.read(l1.sym("l2_pml4"), 4096))
    for flags, root in ((0x202, table), (0x2, l1.sym("l2_pml4"))):
        apic.send(VECTOR)
        seen = guest.run(code.NOP, GUEST_RFLAGS=flags, GUEST_ACTIVITY_STATE=1, GUEST_CR3=root)
        assert seen == _interrupted(guest, vector=VECTOR)
        saved = guest.vmcs.read(Field.GUEST_ACTIVITY_STATE, Field.GUEST_RFLAGS, Field.GUEST_CR3)
        assert saved == (1, flags, root)
        apic.end()
        # L1 lets L2 go on behind the HLT.
        guest.vmcs[Field.GUEST_ACTIVITY_STATE] = 0
        assert guest.go_on() == Succeed()


@pytest.mark.needs(PinCtl.EXTERNAL_INTERRUPT_EXITING, ExitCtl.ACKNOWLEDGE_INTERRUPT_ON_EXIT)
@pytest.mark.sdm("Architectural State Before a VM Exit")
def test_exit_from_hlt_after_a_while(l1: L1) -> None:
    """An interrupt that comes when L2 has halted: HLT is saved, and the CR3 that entry loaded.

    A hypervisor may halt L2 by itself, without ever running it.
    """
    apic, guest = Apic(l1), _guest(l1, exiting=True, acknowledge=True)
    assert guest.run(code.NOP) == Succeed()
    table = l1.alloc()
    l1.write(table, l1.read(l1.sym("l2_pml4"), 4096))
    for flags, root in ((0x202, table), (0x2, l1.sym("l2_pml4"))):
        apic.start_timer(VECTOR, _LATER)
        seen = guest.run(code.NOP, GUEST_RFLAGS=flags, GUEST_ACTIVITY_STATE=1, GUEST_CR3=root)
        assert seen == _interrupted(guest, vector=VECTOR)
        saved = guest.vmcs.read(Field.GUEST_ACTIVITY_STATE, Field.GUEST_RFLAGS, Field.GUEST_CR3)
        assert saved == (1, flags, root)
        apic.end()
        guest.vmcs[Field.GUEST_ACTIVITY_STATE] = 0
        assert guest.go_on() == Succeed()


@pytest.mark.needs(PinCtl.EXTERNAL_INTERRUPT_EXITING, ExitCtl.ACKNOWLEDGE_INTERRUPT_ON_EXIT)
@pytest.mark.sdm("VM Entries: Event Injection")
def test_injection_comes_before_a_pending_interrupt(l1: L1) -> None:
    """What VM entry injects is delivered first; the interrupt exits before the handler runs."""
    apic, guest = Apic(l1), _guest(l1, exiting=True, acknowledge=True)
    apic.send(VECTOR)
    seen = guest.run(
        code.NOP,
        VM_ENTRY_INTR_INFO_FIELD=intr_info(6, IntrType.HARDWARE_EXCEPTION),
        EXCEPTION_BITMAP=0,
    )
    assert seen == _interrupted(guest, guest.handler(6), VECTOR)
    apic.end()
    assert guest.go_on() == Fault(6, error_code=0, rip=0)


@pytest.mark.needs(PinCtl.EXTERNAL_INTERRUPT_EXITING, ExitCtl.ACKNOWLEDGE_INTERRUPT_ON_EXIT)
def test_l1_passes_an_interrupt_on(l1: L1) -> None:
    """The way of a hypervisor: an interrupt exits, and L1 injects it with another vector."""
    apic, guest = Apic(l1), _guest(l1, exiting=True, acknowledge=True)
    for number in range(5):
        apic.send(VECTOR + number)
        seen = guest.run(code.NOP, GUEST_RFLAGS=0x202)
        assert seen == _interrupted(guest, vector=VECTOR + number)
        apic.end()
        info = intr_info(0x30 + number, IntrType.EXTERNAL_INTERRUPT)
        guest.vmcs[Field.VM_ENTRY_INTR_INFO_FIELD] = info
        assert guest.go_on() == Fault(0x30 + number, error_code=0, rip=0)
        assert apic.in_service() == []


@pytest.mark.sdm("Task-Priority Register")
@pytest.mark.parametrize("way", ["MOV-to-CR8", "WRMSR"])
def test_task_priority_that_l2_lowers(l1: L1, way: str) -> None:
    """L2 shares L1's APIC: it lowers the priority, and L1 takes the interrupt that waited, once.

    L2 itself has interrupts disabled.
    """
    apic, guest = Apic(l1), _guest(l1, exiting=False)
    assert l1.wrmsr(Msr.X2APIC_TPR, 0x60) == Succeed()
    apic.send(VECTOR)
    assert apic.open_window() == []
    if way == "WRMSR":
        program, regs = code.WRMSR, {"rcx": int(Msr.X2APIC_TPR), "rax": 0, "rdx": 0}
    else:
        program, regs = code.mov_to_cr(8), {"rax": 0}
    assert guest.run(program + code.NOP * 2, regs, GUEST_RFLAGS=0x2) == Succeed()
    assert apic.requested() == [VECTOR]
    assert apic.open_window() == [VECTOR]
    assert apic.open_window() == []
    assert apic.requested() == []
