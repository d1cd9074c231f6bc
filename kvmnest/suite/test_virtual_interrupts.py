"""Virtual-interrupt delivery: which virtual interrupt L2 gets, when, and what its EOI does."""

from __future__ import annotations

import pytest

from kvmnest.kvm.exits import IO_OUT, IoExit
from kvmnest.l1 import L1, code
from kvmnest.suite.support.virtual_apic import DELIVERY, VPPR, VTPR, VirtualApic
from kvmnest.vmx import (
    ActivityState,
    ExitReason,
    Field,
    Interruptibility,
    Msr,
    PinCtl,
    ProcCtl,
    Vector,
)
from kvmnest.vmx.outcome import Fault, HostExit, Outcome, Succeed

pytestmark = [
    pytest.mark.series(19),
    pytest.mark.sdm("Evaluation and Delivery of Virtual Interrupts"),
    pytest.mark.needs(*DELIVERY),
]

IF = 0x202
VECTOR = 0x51
EOI = {"rcx": Msr.X2APIC_EOI, "rax": 0, "rdx": 0}
MOV_SS = b"\x8e\xd0"  # MOV SS, EAX


def _self_ipi(vector: int) -> dict[str, int]:
    return {"rcx": Msr.X2APIC_SELF_IPI, "rax": vector, "rdx": 0}


def _delivered(vector: int, offset: int = 0) -> Fault:
    """L2's own handler of the vector ran before the instruction at an offset."""
    return Fault(vector, error_code=0, rip=offset)


def _run(apic: VirtualApic, instructions: bytes, flags: int = IF, **regs: int) -> Outcome:
    return apic.guest.run(instructions, regs, GUEST_RFLAGS=flags)


# --- delivery at VM entry ---


@pytest.mark.parametrize("vector", [0x10, 0x20, VECTOR, 0x5F, 0x80, 0xEF, 0xFF])
def test_delivery_by_priority(l1: L1, vector: int) -> None:
    """RVI is delivered if its class is above that of VPPR; VISR, SVI, VPPR and VIRR follow."""
    apic = VirtualApic(l1)
    for tpr in sorted({0, 0x0F, vector - 16 & 0xFF, vector & 0xF0, vector | 0xF, 0xFF}):
        apic.set(requested=[vector], tpr=tpr)
        seen = _run(apic, code.NOP)
        if vector >> 4 > tpr >> 4:
            assert seen == _delivered(vector), hex(tpr)
            assert apic.state() == ([], [vector], 0, vector), hex(tpr)
            assert apic.register(VPPR) == vector & 0xF0, hex(tpr)
        else:
            assert seen == Succeed(), hex(tpr)
            assert apic.state() == ([vector], [], vector, 0), hex(tpr)
            assert apic.register(VPPR) == tpr, hex(tpr)
        assert apic.register(VTPR) == tpr


@pytest.mark.sdm("PPR Virtualization")
def test_processor_priority(l1: L1) -> None:
    """VM entry sets VPPR from VTPR and SVI; one in service holds back those of its class."""
    apic = VirtualApic(l1)
    for service, tpr, vppr in ((0x41, 0x30, 0x40), (0x41, 0x45, 0x45), (0x41, 0x52, 0x52)):
        apic.set(in_service=[service], tpr=tpr)
        l1.write_int(apic.page + VPPR, 0x99, 4)
        assert _run(apic, code.NOP) == Succeed()
        assert apic.register(VPPR) == vppr, hex(tpr)
    for vector, delivered in ((0x3F, False), (0x4F, False), (0x50, True)):
        apic.set(in_service=[0x41], requested=[vector])
        if delivered:
            assert _run(apic, code.NOP) == _delivered(vector)
            assert apic.state() == ([], [0x41, vector], 0, vector)
        else:
            assert _run(apic, code.NOP) == Succeed()
            assert apic.state() == ([vector], [0x41], vector, 0x41)


def test_next_in_line(l1: L1) -> None:
    """After a delivery RVI is the highest vector that is left in VIRR."""
    apic = VirtualApic(l1)
    apic.set(requested=[0x33, 0x71, 0xB2])
    for vector, rest in ((0xB2, [0x33, 0x71]), (0x71, [0x33]), (0x33, [])):
        assert _run(apic, code.NOP) == _delivered(vector)
        assert apic.state() == (rest, [vector], max(rest, default=0), vector)
        apic.set(requested=rest)


def test_rvi_decides(l1: L1) -> None:
    """Hardware takes RVI as the vector; VIRR alone requests nothing."""
    apic = VirtualApic(l1)
    apic.set(requested=[0x80], rvi=0)
    assert _run(apic, code.NOP) == Succeed()
    assert apic.state() == ([0x80], [], 0, 0)
    apic.set(requested=[0x80], rvi=0x60)
    assert _run(apic, code.NOP) == _delivered(0x60)
    assert apic.state() == ([0x80], [0x60], 0x80, 0x60)


# --- what blocks it ---


def test_blocked_by_if(l1: L1) -> None:
    """With RFLAGS.IF clear it waits; behind STI it comes after one more instruction."""
    apic = VirtualApic(l1)
    apic.set(requested=[VECTOR])
    assert _run(apic, code.NOP, 0x2) == Succeed()
    assert apic.state() == ([VECTOR], [], VECTOR, 0)
    assert _run(apic, code.STI + code.NOP + code.NOP, 0x2) == _delivered(VECTOR, 2)


@pytest.mark.parametrize("blocking", [Interruptibility.STI, Interruptibility.MOV_SS])
def test_blocked_at_entry(l1: L1, blocking: Interruptibility) -> None:
    """Blocking by STI or MOV SS holds for the first instruction."""
    apic = VirtualApic(l1)
    apic.set(requested=[VECTOR])
    seen = apic.guest.run(
        code.NOP + code.NOP, GUEST_RFLAGS=IF, GUEST_INTERRUPTIBILITY_INFO=int(blocking)
    )
    assert seen == _delivered(VECTOR, 1)


def test_interrupt_window_exiting(l1: L1) -> None:
    """With interrupt-window exiting nothing is recognized: the window exits in its place."""
    apic = VirtualApic(l1)
    apic.guest.on(ProcCtl.INTERRUPT_WINDOW_EXITING)
    apic.set(requested=[VECTOR])
    assert _run(apic, code.NOP) == apic.guest.exit(ExitReason.INTERRUPT_WINDOW)
    assert apic.state() == ([VECTOR], [], VECTOR, 0)
    apic.guest.off(ProcCtl.INTERRUPT_WINDOW_EXITING)
    assert apic.guest.go_on() == _delivered(VECTOR)


# --- HLT ---


@pytest.mark.sdm("Virtual-Interrupt Delivery")
def test_hlt_is_woken(l1: L1) -> None:
    """A pending virtual interrupt ends an HLT at once."""
    apic = VirtualApic(l1)
    apic.set(requested=[VECTOR])
    assert _run(apic, code.STI + code.HLT + code.NOP, 0x2) == _delivered(VECTOR, 2)
    assert apic.state() == ([], [VECTOR], 0, VECTOR)


@pytest.mark.sdm("Virtual-Interrupt Delivery")
@pytest.mark.parametrize("vppr", [0, 0xF0], ids=["VPPR-right", "VPPR-old"])
def test_hlt_state_is_woken(l1: L1, vppr: int) -> None:
    """One that is pending at the entry ends the HLT state; the entry itself sets VPPR first."""
    apic = VirtualApic(l1)
    apic.set(requested=[VECTOR])
    l1.write_int(apic.page + VPPR, vppr, 4)
    seen = apic.guest.run(code.NOP, GUEST_RFLAGS=IF, GUEST_ACTIVITY_STATE=int(ActivityState.HLT))
    assert seen == _delivered(VECTOR)
    assert apic.guest.vmcs.read(Field.GUEST_ACTIVITY_STATE) == (ActivityState.ACTIVE,)
    assert apic.state() == ([], [VECTOR], 0, VECTOR)


@pytest.mark.sdm("Self-IPI Virtualization")
def test_hlt_after_a_self_ipi(l1: L1) -> None:
    """L2 requests an interrupt while IF is clear, and HLT behind STI takes it."""
    apic = VirtualApic(l1)
    program = code.WRMSR + code.STI + code.HLT + code.NOP
    assert apic.guest.run(program, _self_ipi(VECTOR), GUEST_RFLAGS=2) == _delivered(VECTOR, 4)
    assert apic.state() == ([], [VECTOR], 0, VECTOR)


@pytest.mark.sdm("Evaluation and Delivery of Virtual Interrupts")
@pytest.mark.needs(PinCtl.ACTIVATE_PREEMPTION_TIMER)
@pytest.mark.parametrize("tpr", [VECTOR & 0xF0, VECTOR | 0xF, 0xFF], ids=hex)
def test_hlt_is_not_woken_by_what_waits(l1: L1, tpr: int) -> None:
    """A virtual interrupt whose class is not above that of VPPR leaves L2 halted."""
    apic = VirtualApic(l1, PinCtl.ACTIVATE_PREEMPTION_TIMER)
    apic.guest.vmcs[Field.VMX_PREEMPTION_TIMER_VALUE] = 0x2000
    apic.set(requested=[VECTOR], tpr=tpr)
    seen = _run(apic, code.HLT + code.NOP)
    assert seen == apic.guest.exit(ExitReason.PREEMPTION_TIMER, offset=len(code.HLT))
    assert apic.guest.vmcs.read(Field.GUEST_ACTIVITY_STATE) == (ActivityState.HLT,)
    assert apic.state() == ([VECTOR], [], VECTOR, 0)


@pytest.mark.sdm("Evaluation and Delivery of Virtual Interrupts")
@pytest.mark.needs(PinCtl.ACTIVATE_PREEMPTION_TIMER)
def test_hlt_with_a_blocked_request(l1: L1) -> None:
    """With RFLAGS.IF clear a virtual interrupt of any priority leaves L2 halted."""
    apic = VirtualApic(l1, PinCtl.ACTIVATE_PREEMPTION_TIMER)
    for vector in (0x20, VECTOR, 0xFF):
        apic.guest.vmcs[Field.VMX_PREEMPTION_TIMER_VALUE] = 0x2000
        apic.set(requested=[vector])
        seen = _run(apic, code.HLT + code.NOP, 2)
        assert seen == apic.guest.exit(ExitReason.PREEMPTION_TIMER, offset=len(code.HLT)), vector
        assert apic.state() == ([vector], [], vector, 0)


# --- what L2 does to its local APIC ---


@pytest.mark.sdm("TPR Virtualization")
@pytest.mark.parametrize("way", ["CR8", "MSR"])
def test_lower_tpr_delivers(l1: L1, way: str) -> None:
    """L2 lowers its task priority, and what it held back comes behind that instruction."""
    apic = VirtualApic(l1)
    instruction = code.mov_to_cr(8) if way == "CR8" else code.WRMSR
    for value, delivered in ((6, False), (5, False), (4, True)):
        apic.set(requested=[VECTOR], tpr=0x70)
        rax = value if way == "CR8" else value << 4
        seen = _run(apic, instruction + code.NOP, rax=rax, rcx=Msr.X2APIC_TPR, rdx=0)
        assert seen == (_delivered(VECTOR, len(instruction)) if delivered else Succeed()), value
        assert apic.register(VTPR) == value << 4


@pytest.mark.sdm("Self-IPI Virtualization")
def test_self_ipi(l1: L1) -> None:
    """WRMSR to the self-IPI register requests the vector and delivers it, without an exit."""
    apic = VirtualApic(l1)
    for vector in (0x10, 0x20, VECTOR, 0xFF):
        apic.set()
        seen = apic.guest.run(code.WRMSR + code.NOP, _self_ipi(vector), GUEST_RFLAGS=IF)
        assert seen == _delivered(vector, 2)
        assert apic.state() == ([], [vector], 0, vector)
    # A lower one than RVI leaves RVI; both wait as long as IF is clear.
    apic.set(requested=[0x80])
    assert apic.guest.run(code.WRMSR, _self_ipi(0x40), GUEST_RFLAGS=2) == Succeed()
    assert apic.state() == ([0x40, 0x80], [], 0x80, 0)
    assert apic.guest.run(code.WRMSR, _self_ipi(0x90), GUEST_RFLAGS=2) == Succeed()
    assert apic.state() == ([0x40, 0x80, 0x90], [], 0x90, 0)


@pytest.mark.sdm("Virtualizing MSR-Based APIC Accesses")
@pytest.mark.parametrize("msr", [Msr.X2APIC_EOI, Msr.X2APIC_SELF_IPI])
def test_reserved_bits(l1: L1, msr: Msr) -> None:
    """Reserved bits of the EOI and the self-IPI register are #GP(0), and nothing happens."""
    apic = VirtualApic(l1)
    apic.set(in_service=[0x60], requested=[0x40])
    first = 0 if msr is Msr.X2APIC_EOI else 8
    for bit in (*range(first, 64, 7), 63):
        regs = {"rcx": msr, "rax": 1 << bit & 0xFFFFFFFF, "rdx": 1 << bit >> 32}
        assert apic.guest.run(code.WRMSR, regs) == Fault(Vector.GP, error_code=0, rip=0), bit
    assert apic.state() == ([0x40], [0x60], 0x40, 0x60)


# --- EOI ---


@pytest.mark.sdm("EOI Virtualization")
def test_eoi(l1: L1) -> None:
    """EOI takes the highest vector out of service; SVI and VPPR follow."""
    apic = VirtualApic(l1)
    apic.set(in_service=[0x31, 0x75, 0xC9], tpr=0x20)
    for rest, vppr in (([0x31, 0x75], 0x70), ([0x31], 0x30), ([], 0x20)):
        assert apic.guest.run(code.WRMSR, EOI) == Succeed()
        assert apic.state() == ([], rest, 0, max(rest, default=0))
        assert apic.register(VPPR) == vppr


@pytest.mark.sdm("EOI Virtualization")
def test_eoi_delivers_the_next(l1: L1) -> None:
    """What the one in service held back is delivered behind the EOI."""
    apic = VirtualApic(l1)
    apic.set(in_service=[0x65], requested=[0x61])
    seen = apic.guest.run(code.NOP + code.WRMSR + code.NOP, EOI, GUEST_RFLAGS=IF)
    assert seen == _delivered(0x61, 3)
    assert apic.state() == ([], [0x61], 0, 0x61)


@pytest.mark.sdm("EOI Virtualization")
@pytest.mark.parametrize("vector", [0x10, 0x3F, 0x40, 0x7F, 0x80, 0xBF, 0xC0, 0xFF])
def test_eoi_exit_bitmap(l1: L1, vector: int) -> None:
    """Only a vector whose bit is set exits, behind the instruction and after the EOI's effect."""
    apic = VirtualApic(l1)
    for others in (False, True):
        apic.exit_on_eoi(set(range(256)) - {vector} if others else {vector})
        apic.set(in_service={0x10, vector})
        seen = apic.guest.run(code.WRMSR + code.NOP, EOI)
        assert seen == (Succeed() if others else apic.eoi_exit(vector, 2))
        rest = [] if vector == 0x10 else [0x10]
        assert apic.state() == ([], rest, 0, max(rest, default=0))
        if not others:
            assert apic.guest.go_on() == Succeed()


@pytest.mark.sdm("EOI Virtualization")
def test_eoi_exit_comes_before_the_next(l1: L1) -> None:
    """The exit comes first; the next virtual interrupt is delivered when L1 enters again."""
    apic = VirtualApic(l1)
    apic.exit_on_eoi({0x65})
    apic.set(in_service=[0x65], requested=[0x61])
    seen = apic.guest.run(code.WRMSR + code.NOP, EOI, GUEST_RFLAGS=IF)
    assert seen == apic.eoi_exit(0x65, 2)
    assert apic.state() == ([0x61], [], 0x61, 0)
    assert apic.guest.go_on() == _delivered(0x61, 2)


# --- L1's own interrupts, and save and restore ---


def test_status_survives_exits(l1: L1) -> None:
    """RVI and SVI are guest state: an exit saves them, an entry without changes goes on."""
    apic = VirtualApic(l1)
    apic.set(requested=[0x40], in_service=[0x45])
    seen = apic.guest.run(code.CPUID + code.WRMSR + code.NOP, EOI, GUEST_RFLAGS=IF)
    assert seen == apic.guest.exit(ExitReason.CPUID, 2)
    assert apic.state() == ([0x40], [0x45], 0x40, 0x45)
    regs = EOI | {"rbx": 0}
    assert apic.guest.go_on(regs, skip=2) == _delivered(0x40, 4)


@pytest.mark.series(24)
@pytest.mark.parametrize("restored", [False, True], ids=["", "restored"])
def test_host_exit_in_the_middle(l1: L1, restored: bool) -> None:
    """An exit to userspace, with a new VM or without, loses no virtual interrupt."""
    apic = VirtualApic(l1)
    apic.set(requested=[0x40, VECTOR], in_service=[0x31], tpr=0x60)
    # OUT, then MOV to CR8 lets VECTOR in.
    program = code.out8(0x80) + code.mov_to_cr(8) + code.NOP
    seen = _run(apic, program, rax=0)
    assert seen == HostExit(IoExit(IO_OUT, 1, 0x80, 1, b"\0"))
    if restored:
        l1.round_trip()
    assert apic.guest.resume() == _delivered(VECTOR, len(program) - 1)
    assert apic.state() == ([0x40], [0x31, VECTOR], 0x40, VECTOR)
