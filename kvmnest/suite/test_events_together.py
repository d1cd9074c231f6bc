"""Events of L1 and L2 that meet each other, an SMI, VMXOFF, or a restore in between."""

from __future__ import annotations

import threading

import pytest

from kvmnest.kvm import Cap, exits
from kvmnest.l1 import L1, VmLost, code
from kvmnest.suite.support.apic import INIT, NMI, TO_APIC_0, Apic, send_in_l2
from kvmnest.suite.support.bitmaps import set_msr_bitmap
from kvmnest.suite.support.guest import NOT_VALID, Guest
from kvmnest.vmx import ExitCtl, ExitReason, Field, IntrType, PinCtl, ProcCtl, Vector, intr_info
from kvmnest.vmx.outcome import Exit, Fault, HostExit, Succeed

pytestmark = [
    pytest.mark.series(20),
    pytest.mark.sdm("Priority Among Concurrent Events"),
    pytest.mark.needs(Cap.SIGNAL_MSI),
]

VECTOR = 0x51
OUT_80 = code.out8(0x80)
#: 20 ms: KVM's APIC timer counts at 1 GHz.
TIMER = 20_000_000
#: Spin until the doubleword at RDI is not 0: CMP DWORD [RDI], 0; JE.
SPIN = b"\x83\x3f\x00\x74\xfb"


def _guest(l1: L1, *flags: PinCtl | ProcCtl | ExitCtl) -> Guest:
    guest = Guest(l1, ProcCtl.USE_MSR_BITMAPS, *flags)
    set_msr_bitmap(l1)
    return guest


def _stop(guest: Guest, behind: bytes = code.NOP, **fields: int) -> None:
    """Run L2 to an OUT that userspace sees and that is done; ``behind`` follows it."""
    seen = guest.run(OUT_80 + behind, {"rdi": guest.l1.sym("l2_data")}, **fields)
    assert isinstance(seen, HostExit)
    assert isinstance(seen.exit, exits.IoExit)
    assert isinstance(guest.l1.vcpu.run(immediate_exit=True), exits.IntrExit)


# --- an interrupt that L2 could not take is L1's after the exit ---


def _window_at_exit(l1: L1, guest: Guest) -> None:
    """Let L1 run with IF=1 right behind each VM exit, before any other exit: STI; NOP; NOP; CLI."""
    stub = l1.alloc()
    jump = b"\xff\x25\0\0\0\0" + l1.sym("vmexit_entry").to_bytes(8, "little")
    l1.write(stub, code.STI + code.NOP * 2 + code.CLI + jump)
    guest.vmcs[Field.HOST_RIP] = stub


@pytest.mark.sdm("External interrupts")
@pytest.mark.parametrize("sender", ["L2", "host"])
def test_interrupt_left_behind_by_l2(l1: L1, sender: str) -> None:
    """Without external-interrupt exiting what L2 with IF=0 leaves is taken by L1 at its IF=1."""
    apic, guest = Apic(l1), _guest(l1)
    _window_at_exit(l1, guest)
    before = apic.interrupts
    if sender == "L2":
        assert guest.run(code.WRMSR + code.NOP, send_in_l2(VECTOR)) == Succeed()
    else:
        _stop(guest)
        assert l1.vm.signal_msi(TO_APIC_0, VECTOR) == 1
        assert guest.resume() == Succeed()
    assert apic.interrupts == before + 1
    assert (apic.requested(), apic.in_service()) == ([], [])


@pytest.mark.sdm("Non-Maskable Interrupts (NMIs)")
@pytest.mark.needs(PinCtl.NMI_EXITING)
def test_nmi_left_behind_by_l2(l1: L1) -> None:
    """An NMI that arrives while an exit of L2 blocks NMIs is taken by L1 after its IRET."""
    apic, guest = Apic(l1), _guest(l1, PinCtl.NMI_EXITING)
    _stop(guest)
    l1.vcpu.nmi()
    seen = guest.resume()
    assert seen == Exit(
        ExitReason.EXCEPTION_NMI,
        qualification=0,
        rip=guest.at(2),
        intr_info=intr_info(Vector.NMI, IntrType.NMI),
        idt_info=NOT_VALID,
    )
    assert apic.nmis == 0
    assert guest.go_on() == Succeed()


# --- SMI together with another event of L2 ---

_SMM_CODE = 0x38000
_SMM_COUNT = 0x38100
#: INC WORD CS:[8100h]; RSM
_SMM_HANDLER = b"\x2e\xff\x06\x00\x81\x0f\xaa"


def _interrupt_exit(guest: Guest) -> Exit:
    return Exit(
        ExitReason.EXTERNAL_INTERRUPT,
        qualification=0,
        rip=guest.at(2),
        intr_info=intr_info(VECTOR, IntrType.EXTERNAL_INTERRUPT),
        idt_info=NOT_VALID,
    )


def _send(l1: L1, event: str) -> None:
    if event == "interrupt":
        assert l1.vm.signal_msi(TO_APIC_0, VECTOR) == 1
    elif event == "NMI":
        # Not KVM_NMI, which waits for the end of KVM_RUN in another thread.
        assert l1.vm.signal_msi(TO_APIC_0, NMI) == 1
    elif event == "INIT":
        assert l1.vm.signal_msi(TO_APIC_0, INIT) == 1


def _exit_of(guest: Guest, event: str) -> Exit:
    if event == "interrupt":
        return _interrupt_exit(guest)
    if event == "NMI":
        return Exit(
            ExitReason.EXCEPTION_NMI,
            rip=guest.at(2),
            intr_info=intr_info(Vector.NMI, IntrType.NMI),
            idt_info=NOT_VALID,
        )
    return Exit(ExitReason.INIT_SIGNAL, qualification=0, rip=guest.at(2), idt_info=NOT_VALID)


@pytest.mark.needs(
    Cap.X86_SMM,
    Cap.MULTI_ADDRESS_SPACE,
    PinCtl.NMI_EXITING,
    ExitCtl.ACKNOWLEDGE_INTERRUPT_ON_EXIT,
)
@pytest.mark.sdm("Default Treatment of RSM")
@pytest.mark.parametrize("moved", [False, True], ids=["", "moved"])
@pytest.mark.parametrize("event", ["none", "interrupt", "NMI", "INIT"])
def test_smi_with(l1: L1, event: str, moved: bool) -> None:
    """An SMI in L2 with another event pending: the handler runs once, RSM ends, then the exit."""
    l1.enable_smm()
    l1.write(_SMM_CODE, _SMM_HANDLER)
    l1.write_int(_SMM_COUNT, 0, 2)
    flags = (PinCtl.EXTERNAL_INTERRUPT_EXITING, ExitCtl.ACKNOWLEDGE_INTERRUPT_ON_EXIT)
    apic, guest = Apic(l1), _guest(l1, PinCtl.NMI_EXITING, *flags)
    _stop(guest)
    l1.vcpu.smi()
    _send(l1, event)
    if moved:
        l1.round_trip()
    seen = guest.resume()
    if event == "none":
        assert seen == Succeed()
    else:
        assert seen == _exit_of(guest, event)
        assert guest.changed(seen, "rdi") == {}
    assert l1.read_int(_SMM_COUNT, 2) == 1
    if event == "interrupt":
        assert apic.in_service() == [VECTOR]
        apic.end()
    if event != "none":
        assert guest.go_on() == Succeed()
    assert l1.read_int(_SMM_COUNT, 2) == 1


# --- two events of L2: which exit comes first, and that the other one is not lost ---

_PAIRS = [("NMI", "interrupt"), ("INIT", "interrupt"), ("INIT", "NMI")]


@pytest.mark.needs(PinCtl.NMI_EXITING, ExitCtl.ACKNOWLEDGE_INTERRUPT_ON_EXIT)
@pytest.mark.parametrize("moved", [False, True], ids=["", "moved"])
@pytest.mark.parametrize(("first", "second"), _PAIRS, ids=["-".join(each) for each in _PAIRS])
@pytest.mark.parametrize("turned", [False, True], ids=["", "turned"])
def test_two_events(l1: L1, first: str, second: str, turned: bool, moved: bool) -> None:
    """Of two events that wait the one of higher priority exits first, then the other one."""
    flags = (PinCtl.EXTERNAL_INTERRUPT_EXITING, ExitCtl.ACKNOWLEDGE_INTERRUPT_ON_EXIT)
    apic, guest = Apic(l1), _guest(l1, PinCtl.NMI_EXITING, *flags)
    _stop(guest)
    for event in (second, first) if turned else (first, second):
        _send(l1, event)
    if moved:
        l1.round_trip()
    assert guest.resume() == _exit_of(guest, first)
    if moved:
        l1.round_trip()
    if second == "NMI":
        # L1, in which NMIs are not blocked, takes it itself.
        assert l1.cpuid(0) == Succeed()
        assert apic.nmis == 1
    else:
        assert guest.go_on() == _exit_of(guest, second)
    assert guest.go_on() == Succeed()


# --- an event that comes while L2 executes ---


@pytest.mark.sdm("External interrupts")
@pytest.mark.needs(PinCtl.NMI_EXITING, ExitCtl.ACKNOWLEDGE_INTERRUPT_ON_EXIT)
@pytest.mark.parametrize("event", ["interrupt", "NMI", "INIT", "own-interrupt"])
def test_event_while_l2_spins(l1: L1, event: str) -> None:
    """An event that arrives in a spinning L2 takes effect now, not at the next other exit."""
    own = event == "own-interrupt"
    flags = (PinCtl.EXTERNAL_INTERRUPT_EXITING, ExitCtl.ACKNOWLEDGE_INTERRUPT_ON_EXIT)
    Apic(l1)
    guest = _guest(l1, PinCtl.NMI_EXITING, *(() if own else flags))
    _stop(guest, SPIN, GUEST_RFLAGS=0x202 if own else 0x2)
    sender = threading.Timer(0.02, _send, (l1, "interrupt" if own else event))
    sender.start()
    seen = guest.resume()
    sender.join()
    if own:
        assert isinstance(seen, Fault)
        assert seen.vector == VECTOR
        return
    expected = {
        "interrupt": ExitReason.EXTERNAL_INTERRUPT,
        "NMI": ExitReason.EXCEPTION_NMI,
        "INIT": ExitReason.INIT_SIGNAL,
    }
    assert seen == Exit(expected[event])
    assert guest.at(2) <= seen.rip < guest.at(7)
    l1.write_int(l1.sym("l2_data"), 1)
    assert guest.go_on() == Succeed()


# --- the timer of L1's APIC ---


@pytest.mark.sdm("External interrupts")
@pytest.mark.needs(ExitCtl.ACKNOWLEDGE_INTERRUPT_ON_EXIT)
@pytest.mark.parametrize("moved", [False, True], ids=["", "moved"])
@pytest.mark.parametrize("l2", ["spins", "halts"])
def test_timer_of_l1(l1: L1, l2: str, moved: bool) -> None:
    """The timer of L1's APIC exits an L2 that spins or halts, once and with its vector."""
    flags = (PinCtl.EXTERNAL_INTERRUPT_EXITING, ExitCtl.ACKNOWLEDGE_INTERRUPT_ON_EXIT)
    apic, guest = Apic(l1), _guest(l1, *flags)
    apic.start_timer(VECTOR, TIMER)
    _stop(guest, SPIN if l2 == "spins" else code.HLT)
    if moved:
        l1.round_trip()
    seen = guest.resume()
    assert seen == Exit(
        ExitReason.EXTERNAL_INTERRUPT,
        intr_info=intr_info(VECTOR, IntrType.EXTERNAL_INTERRUPT),
        idt_info=NOT_VALID,
    )
    apic.end()
    assert (apic.requested(), apic.in_service()) == ([], [])


# --- INIT that waited in VMX root operation ---


@pytest.mark.sdm("Restrictions on VMX Operation")
@pytest.mark.parametrize("moved", [False, True], ids=["", "moved"])
def test_init_waits_for_vmxoff(l1: L1, moved: bool) -> None:
    """INIT in VMX root operation takes effect at VMXOFF, after that instruction."""
    Apic(l1)
    guest = _guest(l1)
    assert guest.run(code.NOP) == Succeed()
    assert l1.vm.signal_msi(TO_APIC_0, INIT) == 1
    if moved:
        l1.round_trip()
    assert l1.read_cr(3) == Succeed(l1.sym("l1_pml4"))
    # VMXOFF; then a loop that INIT leaves for the reset vector, where there is no memory.
    with pytest.raises(VmLost):
        l1.call(code.VMXOFF + code.JMP_SELF)
    assert l1.vcpu.get_sregs().cs.selector == 0xF000
    assert l1.vcpu.get_nested_state()[8:16] == b"\xff" * 8
