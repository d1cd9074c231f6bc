"""Level-triggered interrupts of an I/O APIC: their EOI has to reach it, whoever runs."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from kvmnest.kvm import Cap, Kvm
from kvmnest.l1 import L1, code
from kvmnest.suite.support.apic import Apic, IoApic
from kvmnest.suite.support.bitmaps import set_msr_bitmap
from kvmnest.suite.support.guest import Guest
from kvmnest.suite.support.virtual_apic import DELIVERY, VirtualApic
from kvmnest.vmx import (
    ActivityState,
    ExitCtl,
    ExitReason,
    IntrType,
    Misc,
    Msr,
    PinCtl,
    ProcCtl,
    intr_info,
)
from kvmnest.vmx.outcome import Fault, HostExit, Succeed

pytestmark = [
    pytest.mark.series(20),
    pytest.mark.sdm("Signaling Interrupt Servicing Completion"),
    pytest.mark.needs(Cap.IRQCHIP),
]

PIN, VECTOR = 20, 0x51
IF = 0x202
EOI = {"rcx": Msr.X2APIC_EOI, "rax": 0, "rdx": 0}
OUT_80 = code.out8(0x80)
#: The line after the interrupt was taken: lowered, as by a driver, or still high.
LINES = pytest.mark.parametrize("high", [False, True], ids=["lowered", "still-high"])


@pytest.fixture
def full(kvm: Kvm) -> Iterator[L1]:
    """An L1 in a VM with an I/O APIC; a new one, since a reset does not reach that."""
    l1 = L1(kvm, irqchip="full")
    yield l1
    l1.close()


class _Lines:
    """The I/O APIC, L1's local APIC, and an L2 that may use the latter's registers."""

    def __init__(self, l1: L1, *flags: PinCtl | ExitCtl) -> None:
        self.l1, self.apic, self.chip = l1, Apic(l1), IoApic(l1)
        self.guest = Guest(l1, ProcCtl.USE_MSR_BITMAPS, *flags)
        set_msr_bitmap(l1)

    def __repr__(self) -> str:
        return f"<pin {PIN} of the I/O APIC>"

    def set(self, level: int) -> None:
        self.l1.vm.irq_line(PIN, level)

    def state(self) -> tuple[list[int], list[int], bool]:
        """Vectors requested and in service in L1's local APIC, and the pin's remote IRR."""
        return self.apic.requested(), self.apic.in_service(), self.chip.remote_irr(PIN)


def _delivered(rip: int = 0) -> Fault:
    return Fault(VECTOR, error_code=0, rip=rip)


@LINES
def test_eoi_of_l2(full: L1, high: bool) -> None:
    """L2 takes it by its own IDT, and its EOI reaches the I/O APIC, which sends again if high."""
    lines = _Lines(full)
    lines.chip.redirect(PIN, VECTOR)
    lines.set(1)
    assert lines.state() == ([VECTOR], [], True)
    assert lines.guest.run(code.NOP, GUEST_RFLAGS=IF) == _delivered()
    assert lines.state() == ([], [VECTOR], True)
    if not high:
        lines.set(0)
    assert lines.guest.run(code.WRMSR, EOI) == Succeed()
    assert lines.state() == (([VECTOR], [], True) if high else ([], [], False))


@LINES
@pytest.mark.needs(PinCtl.EXTERNAL_INTERRUPT_EXITING, ExitCtl.ACKNOWLEDGE_INTERRUPT_ON_EXIT)
def test_eoi_of_l1(full: L1, high: bool) -> None:
    """It exits to L1, acknowledged; L1's EOI reaches the I/O APIC."""
    lines = _Lines(full, PinCtl.EXTERNAL_INTERRUPT_EXITING, ExitCtl.ACKNOWLEDGE_INTERRUPT_ON_EXIT)
    lines.chip.redirect(PIN, VECTOR)
    assert isinstance(lines.guest.run(OUT_80 + code.NOP), HostExit)
    lines.set(1)
    info = intr_info(VECTOR, IntrType.EXTERNAL_INTERRUPT)
    exit = lines.guest.exit(ExitReason.EXTERNAL_INTERRUPT, offset=len(OUT_80), intr_info=info)
    assert lines.guest.resume() == exit
    assert lines.state() == ([], [VECTOR], True)
    if not high:
        lines.set(0)
    lines.apic.end()
    assert lines.state() == (([VECTOR], [], True) if high else ([], [], False))


def test_edge_triggered(full: L1) -> None:
    """Each edge is one interrupt; there is nothing for an EOI to tell the I/O APIC."""
    lines = _Lines(full)
    lines.chip.redirect(PIN, VECTOR, level=False)
    for _ in range(2):
        lines.set(1)
        assert lines.state() == ([VECTOR], [], False)
        assert lines.guest.run(code.NOP, GUEST_RFLAGS=IF) == _delivered()
        assert lines.guest.run(code.WRMSR, EOI) == Succeed()
        assert lines.state() == ([], [], False)
        lines.set(0)
        assert lines.state() == ([], [], False)


def test_masked_pin(full: L1) -> None:
    """A masked pin sends nothing; unmasked while L2 is stopped it sends at once."""
    lines = _Lines(full)
    lines.chip.redirect(PIN, VECTOR, masked=True)
    lines.set(1)
    assert lines.guest.run(code.NOP, GUEST_RFLAGS=IF) == Succeed()
    assert lines.state() == ([], [], False)
    second = full.add_cpu()
    assert isinstance(lines.guest.run(OUT_80 + code.NOP, GUEST_RFLAGS=IF), HostExit)
    lines.chip.redirect(PIN, VECTOR, cpu=second)
    assert lines.guest.resume() == _delivered(len(OUT_80))


@pytest.mark.needs(Misc.ACTIVITY_HLT)
def test_line_wakes_from_hlt(full: L1) -> None:
    """A line that is raised while L2 halts wakes it, and the EOI of L2 ends it."""
    lines = _Lines(full)
    lines.chip.redirect(PIN, VECTOR)
    assert lines.guest.run(code.NOP) == Succeed()
    later = threading.Timer(0.02, lines.set, [1])
    later.start()
    try:
        seen = lines.guest.run(code.NOP, GUEST_RFLAGS=IF, GUEST_ACTIVITY_STATE=ActivityState.HLT)
    finally:
        later.join()
    assert seen == _delivered()
    lines.set(0)
    assert lines.guest.run(code.WRMSR, EOI) == Succeed()
    assert lines.state() == ([], [], False)


@pytest.mark.needs(Cap.NESTED_STATE)
def test_moved_between_delivery_and_eoi(full: L1) -> None:
    """In service in L2 when the VM is replaced: the EOI reaches the I/O APIC of the new one."""
    lines = _Lines(full)
    lines.chip.redirect(PIN, VECTOR)
    lines.set(1)
    assert lines.guest.run(code.NOP, GUEST_RFLAGS=IF) == _delivered()
    lines.set(0)
    assert isinstance(lines.guest.run(OUT_80 + code.WRMSR, EOI), HostExit)
    full.round_trip()
    assert lines.guest.resume() == Succeed()
    assert lines.state() == ([], [], False)


@pytest.mark.needs(*DELIVERY)
@pytest.mark.sdm("EOI Virtualization")
@pytest.mark.parametrize("running", [False, True], ids=["in-L1", "in-L2"])
def test_pin_redirected_while_l2_has_a_virtual_apic(full: L1, running: bool) -> None:
    """An entry that another vCPU writes is L1's: L2's EOI-exit bitmap stays, L1's EOI works."""
    apic, chip = Apic(full), IoApic(full)
    virtual = VirtualApic(full)
    second = full.add_cpu()
    virtual.exit_on_eoi({0x33})
    virtual.set(in_service={VECTOR})
    wrmsr = OUT_80 + code.WRMSR + code.NOP
    if running:
        assert isinstance(virtual.guest.run(wrmsr, EOI), HostExit)
        chip.redirect(PIN, VECTOR, cpu=second)
        seen = virtual.guest.resume()
    else:
        chip.redirect(PIN, VECTOR, cpu=second)
        seen = virtual.guest.run(wrmsr[len(OUT_80) :], EOI)
    assert seen == Succeed()  # the vector is L1's to be told of, not L2's
    virtual.set(in_service={0x33})
    assert virtual.guest.run(code.WRMSR, EOI) == virtual.eoi_exit(0x33, 2)
    full.vm.irq_line(PIN, 1)
    assert chip.remote_irr(PIN)
    full.vm.irq_line(PIN, 0)
    assert apic.open_window() == [VECTOR]
    assert (apic.requested(), apic.in_service(), chip.remote_irr(PIN)) == ([], [], False)
