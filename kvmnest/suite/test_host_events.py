"""Userspace interferes while L2 runs: events through the KVM interface, kicks, signals."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

import pytest

from kvmnest.kvm import Cap, exits
from kvmnest.l1 import L1, code
from kvmnest.suite.support.guest import NOT_VALID, Guest
from kvmnest.vmx import Cr4, ExitReason, Field, IntrType, ProcCtl, Vector, intr_info
from kvmnest.vmx.outcome import Exit, Fault, HostExit, Succeed

pytestmark = [pytest.mark.series(24), pytest.mark.sdm("VMX Non-Root Operation")]

OUT_80 = code.out8(0x80)
#: kvm_vcpu_events.flags
PAYLOAD, TRIPLE_FAULT = 0x10, 0x20
GUEST_MODE = 1
#: Status of a machine-check bank: valid, overflow, uncorrected, processor context corrupt.
FATAL = 0xE2 << 56
#: Spin until the doubleword at RDI is not 0: CMP [RDI], 0; JE.
SPIN = b"\x83\x3f\x00\x74\xfb"


def _stopped(l1: L1, behind: bytes = code.NOP, **fields: int) -> Guest:
    """L2 stopped in the middle by an OUT that userspace sees; ``behind`` follows it."""
    guest = Guest(l1)
    seen = guest.run(OUT_80 + behind, {"rdi": l1.sym("l2_data")}, **fields)
    assert isinstance(seen, HostExit)
    assert isinstance(seen.exit, exits.IoExit)
    # The OUT is completed by the next KVM_RUN: let it be, without going on.
    assert isinstance(l1.vcpu.run(immediate_exit=True), exits.IntrExit)
    return guest


def _events(l1: L1, **exception: int) -> Any:
    events = l1.vcpu.get_vcpu_events()
    for name, value in exception.items():
        setattr(events.exception, name, value)
    return events


def test_kvm_sees_l2s_registers(l1: L1) -> None:
    """While L2 runs KVM_GET_REGS and KVM_GET_SREGS give L2's, and a change reaches L2."""
    guest = _stopped(l1, b"\x48\x89\xd8", GUEST_RSP=0x123450)  # MOV RAX, RBX
    regs, sregs = l1.vcpu.get_regs(), l1.vcpu.get_sregs()
    assert (regs.rip, regs.rsp, regs.rbx) == (guest.at(2), 0x123450, guest.loaded["rbx"])
    assert (sregs.cr3, sregs.idt.base) == (l1.sym("l2_pml4"), l1.sym("l2_idt"))
    assert int.from_bytes(l1.vcpu.get_nested_state()[:2], "little") & GUEST_MODE
    regs.rbx = 0x5555
    l1.vcpu.set_regs(regs)
    seen = guest.resume()
    assert seen == Succeed()
    assert seen.regs["rax"] == 0x5555


@pytest.mark.parametrize(
    ("vector", "error"), [(Vector.UD, None), (Vector.GP, 0x18), (Vector.SS, 0)]
)
def test_injected_exception(l1: L1, vector: Vector, error: int | None) -> None:
    """An exception that was in delivery when L2's state was saved is delivered, not intercepted."""
    for bitmap in (0, 1 << vector):
        guest = _stopped(l1, EXCEPTION_BITMAP=bitmap)
        events = _events(
            l1,
            injected=1,
            nr=vector,
            has_error_code=int(error is not None),
            error_code=error or 0,
        )
        l1.vcpu.set_vcpu_events(events)
        assert guest.resume() == Fault(vector, error_code=error or 0, rip=2), bitmap
        # VMXOFF, so that the next round starts afresh.
        assert l1.vmxoff() == Succeed()


def test_pending_exception(l1: L1) -> None:
    """An exception that is pending and not yet delivered is intercepted by L1's bitmap."""
    l1.enable_cap(Cap.EXCEPTION_PAYLOAD)
    for bitmap in (0, 1 << Vector.GP):
        guest = _stopped(l1, EXCEPTION_BITMAP=bitmap)
        events = _events(l1, pending=1, nr=Vector.GP, has_error_code=1, error_code=0x28)
        events.flags |= PAYLOAD
        l1.vcpu.set_vcpu_events(events)
        seen = guest.resume()
        if bitmap:
            assert seen == guest.exception(Vector.GP, 0x28, offset=2)
        else:
            assert seen == Fault(Vector.GP, error_code=0x28, rip=2)
        assert l1.vmxoff() == Succeed()


@pytest.mark.parametrize(
    ("vector", "error", "qualification"),
    [(Vector.PF, 6, 0x123456789000), (Vector.DB, None, 1 << 14 | 1), (Vector.GP, 0x18, 0)],
    ids=["PF", "DB", "GP"],
)
@pytest.mark.sdm("Basic VM-Exit Information")
@pytest.mark.needs(Cap.EXCEPTION_PAYLOAD)
def test_pending_exception_whose_registers_are_written(
    l1: L1, vector: Vector, error: int | None, qualification: int
) -> None:
    """An exception without payload: CR2 and DR6 have it already, and the exit tells it."""
    l1.enable_cap(Cap.EXCEPTION_PAYLOAD)
    guest = _stopped(l1, EXCEPTION_BITMAP=1 << vector)
    if vector == Vector.PF:
        sregs = l1.vcpu.get_sregs()
        sregs.cr2 = qualification
        l1.vcpu.set_sregs(sregs)
    elif vector == Vector.DB:
        debug = l1.vcpu.get_debugregs()
        debug.dr6 = 0xFFFF0FF0 | qualification
        l1.vcpu.set_debugregs(debug)
    events = _events(
        l1, pending=1, nr=vector, has_error_code=int(error is not None), error_code=error or 0
    )
    events.flags |= PAYLOAD
    l1.vcpu.set_vcpu_events(events)
    expected = guest.exception(vector, error, offset=2, qualification=qualification)
    assert guest.resume() == expected


#: Error code of the #GP for a gate beyond the IDT's limit: the vector of #SS, IDT, EXT.
_GP_OF_SS = Vector.SS << 3 | 2 | 1


@pytest.mark.sdm("Information for VM Exits That Occur During Event Delivery")
@pytest.mark.needs(Cap.EXCEPTION_PAYLOAD)
@pytest.mark.parametrize("moved", [False, True], ids=["", "moved"])
@pytest.mark.parametrize("stage", ["SS", "GP", "DF", "triple-fault"])
def test_exception_that_meets_no_idt(l1: L1, stage: str, moved: bool) -> None:
    """#SS from userspace and an empty IDT: #GP, #DF, triple fault; L1 gets the first it wants.

    Up to the entry the exception stays pending, in another VM too, and nothing is delivered.
    """
    l1.enable_cap(Cap.EXCEPTION_PAYLOAD)
    wanted = {name: 1 << Vector[name] for name in ("SS", "GP", "DF")}
    bitmap = wanted.get(stage, 0)
    guest = _stopped(l1, EXCEPTION_BITMAP=bitmap, GUEST_IDTR_LIMIT=0)
    events = _events(l1, pending=1, nr=Vector.SS, has_error_code=1, error_code=0x1F8)
    events.flags |= PAYLOAD
    l1.vcpu.set_vcpu_events(events)
    for _ in range(2):
        assert isinstance(l1.vcpu.run(immediate_exit=True), exits.IntrExit)
        if moved:
            l1.round_trip()
        now = l1.vcpu.get_vcpu_events().exception
        assert (now.pending, now.injected, now.nr, now.error_code) == (1, 0, Vector.SS, 0x1F8)
    seen = guest.resume()
    ss = intr_info(Vector.SS, IntrType.HARDWARE_EXCEPTION, True)
    if stage == "SS":
        assert seen == guest.exception(Vector.SS, 0x1F8, offset=2)
    elif stage == "GP":
        assert seen == guest.exception(Vector.GP, _GP_OF_SS, offset=2, idt_info=ss, idt_error=0x1F8)
    elif stage == "DF":
        assert seen == guest.exception(Vector.DF, 0, offset=2)
    else:
        assert seen == guest.exit(ExitReason.TRIPLE_FAULT, offset=2)
    assert guest.run(code.NOP, GUEST_IDTR_LIMIT=guest.vmcs.baseline[Field.GUEST_IDTR_LIMIT]) == (
        Succeed()
    )


def test_triple_fault(l1: L1) -> None:
    """A triple fault that userspace reports for L2 is an exit to L1, without event in flight."""
    l1.enable_cap(Cap.X86_TRIPLE_FAULT_EVENT)
    for injected in (0, 1):
        guest = _stopped(l1)
        events = _events(l1, injected=injected, nr=Vector.UD)
        events.flags |= TRIPLE_FAULT
        events.triple_fault.pending = 1
        l1.vcpu.set_vcpu_events(events)
        seen = guest.resume()
        assert seen == Exit(
            ExitReason.TRIPLE_FAULT, qualification=0, intr_info=NOT_VALID, idt_info=0
        ), injected
        # L1 goes on, and L2 too.
        assert guest.run(code.NOP) == Succeed()
        assert l1.vmxoff() == Succeed()


@pytest.mark.needs(Cap.X86_TRIPLE_FAULT_EVENT, Cap.MCE)
@pytest.mark.sdm("Machine-Check Architecture")
@pytest.mark.parametrize("moved", [False, True], ids=["", "moved"])
def test_machine_check_that_shuts_down(l1: L1, moved: bool) -> None:
    """An uncorrected machine check of an L2 without CR4.MCE: a triple fault, moved or not."""
    l1.enable_cap(Cap.X86_TRIPLE_FAULT_EVENT)
    l1.vcpu.setup_mce(1)
    guest = _stopped(l1)
    assert not l1.vcpu.get_sregs().cr4 & Cr4.MCE
    l1.vcpu.set_mce(0, FATAL)
    assert l1.vcpu.get_vcpu_events().triple_fault.pending == 1
    if moved:
        l1.round_trip()
    assert guest.resume() == Exit(ExitReason.TRIPLE_FAULT, qualification=0)
    assert guest.run(code.NOP) == Succeed()


def test_injected_interrupt_and_nmi(l1: L1) -> None:
    """An interrupt or NMI in delivery arrives at L2's handler with its own vector."""
    for kind in ("interrupt", "nmi"):
        guest = _stopped(l1, GUEST_RFLAGS=0x202)
        events = l1.vcpu.get_vcpu_events()
        if kind == "interrupt":
            events.interrupt.injected, events.interrupt.nr = 1, 0x66
        else:
            events.nmi.injected = 1
        l1.vcpu.set_vcpu_events(events)
        vector = 0x66 if kind == "interrupt" else Vector.NMI
        assert guest.resume() == Fault(vector, error_code=0, rip=2)
        assert l1.vmxoff() == Succeed()


@pytest.mark.sdm("Information for VM Exits That Occur During Event Delivery")
def test_event_in_delivery_at_an_exit(l1: L1) -> None:
    """An injected event whose delivery faults is in the IDT-vectoring information."""
    guest = _stopped(l1, EXCEPTION_BITMAP=1 << Vector.PF, GUEST_RSP=0x50000800)
    l1.vcpu.set_vcpu_events(
        _events(l1, injected=1, nr=Vector.NP, has_error_code=1, error_code=0x30)
    )
    hardware = IntrType.HARDWARE_EXCEPTION
    assert guest.resume() == Exit(
        ExitReason.EXCEPTION_NMI,
        qualification=0x500007F8,
        rip=guest.at(2),
        intr_info=intr_info(Vector.PF, hardware, True),
        intr_error=2,
        idt_info=intr_info(Vector.NP, hardware, True),
        idt_error=0x30,
    )


def test_immediate_exit(l1: L1) -> None:
    """KVM_RUN with immediate_exit leaves L2 where it is, as often as one likes."""
    guest = _stopped(l1)
    before = l1.vcpu.get_regs().rip
    for _ in range(5):
        assert isinstance(l1.vcpu.run(immediate_exit=True), exits.IntrExit)
        assert l1.vcpu.get_regs().rip == before == guest.at(2)
        assert int.from_bytes(l1.vcpu.get_nested_state()[:2], "little") & GUEST_MODE
    assert guest.resume() == Succeed()


def test_kick_while_l2_runs(l1: L1) -> None:
    """A kick takes the vCPU out of a spinning L2 without an exit to L1; L2 then goes on."""
    data = l1.sym("l2_data")
    guest = _stopped(l1, SPIN)
    vcpu = l1.vcpu
    for _ in range(5):
        kicker = threading.Thread(target=vcpu.kick)
        kicker.start()
        assert isinstance(vcpu.run(), exits.IntrExit)
        kicker.join()
        assert guest.at(2) <= vcpu.get_regs().rip < guest.at(7)
        assert int.from_bytes(vcpu.get_nested_state()[:2], "little") & GUEST_MODE
    l1.write_int(data, 1)
    seen = guest.resume()
    assert seen == Succeed()
    assert guest.changed(seen, "rdi") == {}


def test_signal_while_l2_runs(l1: L1) -> None:
    """A signal that Python handles interrupts KVM_RUN in L2 the same way."""
    guest = _stopped(l1, SPIN)
    seen: list[int] = []
    before = signal.signal(signal.SIGUSR2, lambda number, _: seen.append(number))
    try:
        # It is pending before KVM_RUN starts: KVM finds it on its way into L2.
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
        os.kill(os.getpid(), signal.SIGUSR2)
        vcpu = l1.vcpu
        vcpu.set_signal_mask([])
        assert isinstance(vcpu.run(), exits.IntrExit)
    finally:
        vcpu.set_signal_mask(None)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR2])
        signal.signal(signal.SIGUSR2, before)
    assert seen == [signal.SIGUSR2]
    l1.write_int(l1.sym("l2_data"), 1)
    assert guest.resume() == Succeed()


@pytest.mark.needs(ProcCtl.HLT_EXITING)
def test_state_of_l1_survives_an_interrupted_l2(l1: L1) -> None:
    """After all of that an exit gives L1 its own state back."""
    guest = _stopped(l1, code.HLT)
    guest.resume  # noqa: B018 - bound for the reader: L2 is suspended here
    assert int.from_bytes(l1.vcpu.get_nested_state()[:2], "little") & GUEST_MODE
    regs = l1.vcpu.get_regs()
    regs.rip = guest.at(3)
    l1.vcpu.set_regs(regs)
    assert guest.resume() == Succeed()
    assert l1.read_cr(3) == Succeed(l1.sym("l1_pml4"))
    assert guest.vmcs.read(Field.HOST_RIP) == (l1.sym("vmexit_entry"),)
