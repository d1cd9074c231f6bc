"""NMIs: exits, delivery in L2, injection, blocking and unblocking, NMI-window exiting."""

from __future__ import annotations

import pytest

from kvmnest.l1 import L1, code
from kvmnest.suite.support.apic import TO_APIC_0, Apic, send_nmi_in_l2
from kvmnest.suite.support.bitmaps import set_msr_bitmap
from kvmnest.suite.support.guest import NOT_VALID, Guest
from kvmnest.vmx import (
    ExitReason,
    Field,
    IntrType,
    PinCtl,
    Proc2Ctl,
    ProcCtl,
    Vector,
    intr_info,
)
from kvmnest.vmx.outcome import Exit, Fault, HostExit, Succeed

pytestmark = [pytest.mark.series(20), pytest.mark.sdm("Non-maskable interrupts (NMIs)")]

NMI_INFO = intr_info(Vector.NMI, IntrType.NMI)
#: Bit 3 of the guest interruptibility state: blocking by NMI, or virtual-NMI blocking.
BLOCKED = 8
MOV_SS = b"\x8e\xd0"
IRETQ = b"\x48\xcf"
OUT_80 = code.out8(0x80)
VIRTUAL = pytest.mark.needs(PinCtl.NMI_EXITING, PinCtl.VIRTUAL_NMIS)
WINDOW = pytest.mark.needs(PinCtl.VIRTUAL_NMIS, ProcCtl.NMI_WINDOW_EXITING)


def _guest(l1: L1, *flags: PinCtl | ProcCtl) -> Guest:
    guest = Guest(l1, ProcCtl.USE_MSR_BITMAPS, *flags)
    set_msr_bitmap(l1)
    return guest


def _nmi_exit(guest: Guest, offset: int = 0) -> Exit:
    return guest.exit(ExitReason.EXCEPTION_NMI, offset=offset, intr_info=NMI_INFO)


def _window(guest: Guest, offset: int = 0) -> Exit:
    return guest.exit(ExitReason.NMI_WINDOW, offset=offset)


def _blocking(guest: Guest) -> int:
    (value,) = guest.vmcs.read(Field.GUEST_INTERRUPTIBILITY_INFO)
    return value


def _iret_frame(guest: Guest, behind: int = 2) -> int:
    """Write a frame for an IRETQ that goes on at this offset of L2's code; its address."""
    l1 = guest.l1
    stack = l1.sym("l2_stack_top") - 64
    frame = (l1.sym("l2_code") + behind, l1.sym("SEL_CODE64"), 0x2, stack, l1.sym("SEL_DATA"))
    l1.write(stack, b"".join(word.to_bytes(8, "little") for word in frame))
    return stack


@pytest.mark.needs(PinCtl.NMI_EXITING)
def test_nmi_exit(l1: L1) -> None:
    """With NMI exiting an NMI leaves L2 at the next boundary; L1 does not get it once more."""
    apic, guest = Apic(l1), _guest(l1, PinCtl.NMI_EXITING)
    for flags in (0x2, 0x202):
        seen = guest.run(code.NOP + code.WRMSR + code.NOP, send_nmi_in_l2(), GUEST_RFLAGS=flags)
        assert seen == _nmi_exit(guest, 3)
        assert _blocking(guest) == 0
        # L1's IRETs unblock NMIs: none is left over.
        assert l1.call(code.NOP) == Succeed()
        assert apic.nmis == 0
        assert guest.go_on() == Succeed()


@pytest.mark.sdm("Architectural State Before a VM Exit")
def test_exit_while_an_nmi_is_delivered(l1: L1) -> None:
    """A fault in the delivery of an injected NMI exits with NMIs blocked already."""
    guest = _guest(l1)
    fields = {"GUEST_IDTR_LIMIT": 0, "EXCEPTION_BITMAP": 1 << Vector.GP}
    seen = guest.run(code.NOP, VM_ENTRY_INTR_INFO_FIELD=NMI_INFO, **fields)
    error = Vector.NMI << 3 | 0b11  # a gate of the IDT, an event from outside
    assert seen == guest.exception(Vector.GP, error, idt_info=NMI_INFO)
    assert _blocking(guest) == BLOCKED


@VIRTUAL
@pytest.mark.sdm("Virtual NMIs")
def test_nmi_exit_with_virtual_nmis(l1: L1) -> None:
    """Virtual-NMI blocking holds back no NMI exit, and stays as it was."""
    apic, guest = Apic(l1), _guest(l1, PinCtl.NMI_EXITING, PinCtl.VIRTUAL_NMIS)
    for blocking in (0, BLOCKED):
        seen = guest.run(
            code.WRMSR + code.NOP, send_nmi_in_l2(), GUEST_INTERRUPTIBILITY_INFO=blocking
        )
        assert seen == _nmi_exit(guest, 2)
        assert _blocking(guest) == blocking
        assert guest.go_on() == Succeed()
    assert l1.call(code.NOP) == Succeed()
    assert apic.nmis == 0


@pytest.mark.needs(PinCtl.NMI_EXITING)
def test_nmi_from_the_host(l1: L1) -> None:
    """KVM_NMI while L2 runs becomes an NMI exit, ahead of L2's next instruction."""
    guest = _guest(l1, PinCtl.NMI_EXITING)
    assert isinstance(guest.run(code.NOP + OUT_80 + code.NOP), HostExit)
    l1.vcpu.nmi()
    assert guest.resume() == _nmi_exit(guest, 3)
    assert guest.go_on() == Succeed()


@pytest.mark.needs(PinCtl.NMI_EXITING)
def test_nmi_exit_comes_before_an_interrupt_exit(l1: L1) -> None:
    """NMI and external interrupt at one boundary: the NMI first, then the interrupt."""
    apic, guest = Apic(l1), _guest(l1, PinCtl.NMI_EXITING, PinCtl.EXTERNAL_INTERRUPT_EXITING)
    assert isinstance(guest.run(OUT_80 + code.NOP), HostExit)
    l1.vcpu.nmi()
    l1.vm.signal_msi(TO_APIC_0, 0x61)
    assert guest.resume() == _nmi_exit(guest, 2)
    seen = guest.go_on()
    assert (seen.reason, seen.rip) == (ExitReason.EXTERNAL_INTERRUPT, guest.at(2))
    assert apic.open_window() == [0x61]


def test_nmi_in_l2(l1: L1) -> None:
    """Without NMI exiting L2's handler gets it, and NMIs are then blocked for L2."""
    guest = _guest(l1)
    seen = guest.run(code.out8(0x80) + code.NOP)
    assert isinstance(seen, HostExit)
    l1.vcpu.nmi()
    assert guest.resume() == Fault(Vector.NMI, error_code=0, rip=2)
    assert _blocking(guest) == BLOCKED
    # A second NMI waits until L2's IRET.
    stack = _iret_frame(guest, behind=4)
    seen = guest.run(
        code.out8(0x80) + IRETQ + code.NOP * 2,
        GUEST_INTERRUPTIBILITY_INFO=BLOCKED,
        GUEST_RSP=stack,
    )
    assert isinstance(seen, HostExit)
    l1.vcpu.nmi()
    assert guest.resume() == Fault(Vector.NMI, error_code=0, rip=4)


@pytest.mark.sdm("VM Entries: Event Injection")
def test_injected_nmi(l1: L1) -> None:
    """An injected NMI arrives at L2's handler, with NMIs blocked from then on."""
    guest = _guest(l1)
    for flags in (0x2, 0x202):
        seen = guest.run(code.NOP, VM_ENTRY_INTR_INFO_FIELD=NMI_INFO, GUEST_RFLAGS=flags)
        assert seen == Fault(Vector.NMI, error_code=0, rip=0)
        assert _blocking(guest) == BLOCKED
        assert guest.vmcs.read(Field.VM_ENTRY_INTR_INFO_FIELD) == (NMI_INFO & ~(1 << 31),)


@VIRTUAL
@pytest.mark.sdm("Virtual NMIs")
def test_injected_virtual_nmi(l1: L1) -> None:
    """With virtual NMIs the injection sets virtual-NMI blocking, and L2's IRET removes it."""
    guest = _guest(l1, PinCtl.NMI_EXITING, PinCtl.VIRTUAL_NMIS)
    for _ in range(2):
        seen = guest.run(code.NOP, VM_ENTRY_INTR_INFO_FIELD=NMI_INFO)
        assert seen == Fault(Vector.NMI, error_code=0, rip=0)
        assert _blocking(guest) == BLOCKED
        # The field keeps its value over entries without an IRET.
        assert guest.run(code.NOP, GUEST_INTERRUPTIBILITY_INFO=BLOCKED) == Succeed()
        assert _blocking(guest) == BLOCKED
        stack = _iret_frame(guest)
        seen = guest.run(IRETQ, GUEST_RSP=stack, GUEST_INTERRUPTIBILITY_INFO=BLOCKED)
        assert seen == Succeed()
        assert _blocking(guest) == 0


@VIRTUAL
@pytest.mark.sdm("Information for VM Exits Due to Vectored Events")
def test_fault_on_iret(l1: L1) -> None:
    """An IRET that removes virtual-NMI blocking and then faults says so: bit 12."""
    guest = _guest(l1, PinCtl.NMI_EXITING, PinCtl.VIRTUAL_NMIS)
    unblocking = 1 << 12
    for blocking in (BLOCKED, 0):
        seen = guest.run(
            IRETQ,
            GUEST_RSP=0x50000000,
            EXCEPTION_BITMAP=1 << Vector.PF,
            GUEST_INTERRUPTIBILITY_INFO=blocking,
        )
        info = intr_info(Vector.PF, IntrType.HARDWARE_EXCEPTION, True)
        assert seen == Exit(
            ExitReason.EXCEPTION_NMI,
            rip=guest.at(),
            intr_info=info | (unblocking if blocking else 0),
            intr_error=0,
            idt_info=NOT_VALID,
        ), blocking
    # An instruction other than IRET does not have the bit.
    seen = guest.run(
        b"\x58",  # POP RAX
        GUEST_RSP=0x50000000,
        EXCEPTION_BITMAP=1 << Vector.PF,
        GUEST_INTERRUPTIBILITY_INFO=BLOCKED,
    )
    assert (seen.intr_info, _blocking(guest)) == (info, BLOCKED)


@VIRTUAL
@pytest.mark.sdm("Resuming Guest Software after Handling an Exception")
def test_fault_on_iret_leaves_nmis_unblocked(l1: L1) -> None:
    """The blocking that bit 12 tells of is gone: it is L1 that has to set it again."""
    guest = _guest(l1, PinCtl.NMI_EXITING, PinCtl.VIRTUAL_NMIS)
    seen = guest.run(
        IRETQ,
        GUEST_RSP=0x50000000,
        EXCEPTION_BITMAP=1 << Vector.PF,
        GUEST_INTERRUPTIBILITY_INFO=BLOCKED,
    )
    assert seen.intr_info >> 12 & 1 == 1
    assert _blocking(guest) == 0


@WINDOW
@pytest.mark.sdm("Non-Maskable Interrupt-Window Exiting")
def test_nmi_window_at_entry(l1: L1) -> None:
    """No virtual-NMI blocking: the exit comes first, after one instruction behind MOV SS."""
    guest = _guest(l1, PinCtl.NMI_EXITING, PinCtl.VIRTUAL_NMIS, ProcCtl.NMI_WINDOW_EXITING)
    for flags in (0x2, 0x202):
        seen = guest.run(code.NOP * 3, GUEST_RFLAGS=flags)
        assert seen == _window(guest)
        assert guest.changed(seen) == {}
        seen = guest.run(code.NOP * 3, GUEST_RFLAGS=flags, GUEST_INTERRUPTIBILITY_INFO=2)
        assert seen == _window(guest, 1)
        assert _blocking(guest) == 0
    # Whether blocking by STI holds it back is the processor's choice.
    seen = guest.run(code.NOP * 3, GUEST_RFLAGS=0x202, GUEST_INTERRUPTIBILITY_INFO=1)
    assert seen in (_window(guest), _window(guest, 1))
    guest.off(ProcCtl.NMI_WINDOW_EXITING)
    assert guest.go_on() == Succeed()


@WINDOW
@pytest.mark.sdm("Non-Maskable Interrupt-Window Exiting")
def test_nmi_window_opened_by_iret(l1: L1) -> None:
    """With virtual-NMI blocking L2 runs until its IRET."""
    guest = _guest(l1, PinCtl.NMI_EXITING, PinCtl.VIRTUAL_NMIS, ProcCtl.NMI_WINDOW_EXITING)
    assert guest.run(code.NOP * 3, GUEST_INTERRUPTIBILITY_INFO=BLOCKED) == Succeed()
    stack = _iret_frame(guest)
    seen = guest.run(IRETQ + code.NOP * 2, GUEST_RSP=stack, GUEST_INTERRUPTIBILITY_INFO=BLOCKED)
    assert seen == _window(guest, 2)
    assert _blocking(guest) == 0


@WINDOW
@pytest.mark.sdm("Non-Maskable Interrupt-Window Exiting")
def test_nmi_window_wakes_from_hlt(l1: L1) -> None:
    """In the activity state HLT, too, the exit comes at once, with IF set or clear."""
    guest = _guest(l1, PinCtl.NMI_EXITING, PinCtl.VIRTUAL_NMIS, ProcCtl.NMI_WINDOW_EXITING)
    for flags in (0x2, 0x202):
        seen = guest.run(code.NOP, GUEST_RFLAGS=flags, GUEST_ACTIVITY_STATE=1)
        assert seen == _window(guest)


@WINDOW
@pytest.mark.sdm("Non-Maskable Interrupt-Window Exiting")
def test_nmi_window_and_injected_nmi(l1: L1) -> None:
    """An NMI injected together with the window request: the window opens at its IRET only."""
    guest = _guest(l1, PinCtl.NMI_EXITING, PinCtl.VIRTUAL_NMIS, ProcCtl.NMI_WINDOW_EXITING)
    seen = guest.run(code.NOP, VM_ENTRY_INTR_INFO_FIELD=NMI_INFO)
    assert seen == Fault(Vector.NMI, error_code=0, rip=0)
    # An exception instead does not block: the exit is at its handler's first instruction.
    info = intr_info(Vector.UD, IntrType.HARDWARE_EXCEPTION)
    seen = guest.run(code.NOP, VM_ENTRY_INTR_INFO_FIELD=info)
    assert seen == _window(guest, guest.handler(Vector.UD))


@WINDOW
@pytest.mark.sdm("Non-Maskable Interrupt-Window Exiting")
def test_nmi_window_before_interrupt_window(l1: L1) -> None:
    """Both windows open: the NMI window has the higher priority."""
    guest = _guest(l1, PinCtl.NMI_EXITING, PinCtl.VIRTUAL_NMIS, ProcCtl.NMI_WINDOW_EXITING,
                   ProcCtl.INTERRUPT_WINDOW_EXITING)  # fmt: skip
    assert guest.run(code.NOP, GUEST_RFLAGS=0x202) == _window(guest)
    guest.off(ProcCtl.NMI_WINDOW_EXITING)
    seen = guest.go_on()
    assert (seen.reason, seen.rip) == (ExitReason.INTERRUPT_WINDOW, guest.at())


@VIRTUAL
@pytest.mark.sdm("Information for VM Exits Due to Vectored Events")
@pytest.mark.parametrize("name", ["RDMSR", "WRMSR", "MOV-to-CR4"])
def test_no_unblocking_without_iret(l1: L1, name: str) -> None:
    """A fault that is not IRET's has bit 12 clear, also where a hypervisor below raises it."""
    program = {
        "RDMSR": code.RDMSR,
        "WRMSR": code.WRMSR,
        "MOV-to-CR4": code.mov_to_cr(4, "rcx"),
    }[name]
    guest = _guest(l1, PinCtl.NMI_EXITING, PinCtl.VIRTUAL_NMIS)
    # No such MSR; and no such bits of CR4.
    regs = {"rcx": 0x1FFF if "MSR" in name else 1 << 63, "rax": 0, "rdx": 0}
    for blocking in (0, BLOCKED):
        seen = guest.run(
            program,
            regs,
            EXCEPTION_BITMAP=1 << Vector.GP,
            GUEST_INTERRUPTIBILITY_INFO=blocking,
        )
        assert seen == guest.exception(Vector.GP, 0), blocking
        assert _blocking(guest) == blocking


@VIRTUAL
@pytest.mark.needs(Proc2Ctl.ENABLE_EPT)
@pytest.mark.sdm("Exit Qualification for EPT Violations")
def test_ept_violation_of_iret(l1: L1) -> None:
    """An EPT violation on IRET's stack: bit 12 tells that NMIs were blocked, and are no more."""
    guest = _guest(l1, PinCtl.NMI_EXITING, PinCtl.VIRTUAL_NMIS)
    stack = l1.alloc()
    l1.write_int(l1.sym("ept_pml4_pt") + stack // 4096 * 8, 0)
    for program, blocking, told in ((b"\x58", 0, 0), (b"\x58", BLOCKED, 0), (IRETQ, 0, 0)):
        seen = guest.run(program, GUEST_RSP=stack, GUEST_INTERRUPTIBILITY_INFO=blocking)
        assert (seen.reason, seen.physical & ~0xFFF) == (ExitReason.EPT_VIOLATION, stack)
        assert (seen.qualification >> 12 & 1, _blocking(guest)) == (told, blocking)
    seen = guest.run(IRETQ, GUEST_RSP=stack, GUEST_INTERRUPTIBILITY_INFO=BLOCKED)
    assert (seen.reason, seen.physical & ~0xFFF) == (ExitReason.EPT_VIOLATION, stack)
    assert (seen.qualification >> 12 & 1, _blocking(guest)) == (1, 0)
