"""APIC-register virtualization: each register of the page and each x2APIC MSR, read and written."""

from __future__ import annotations

import pytest

from kvmnest.l1 import L1, code
from kvmnest.suite.support.bitmaps import set_msr_bitmap
from kvmnest.suite.support.guest import Guest
from kvmnest.suite.support.virtual_apic import DELIVERY, VICR_LO, VTPR, VirtualApic
from kvmnest.vmx import ApicAccess, ApicAccessType, ExitReason, Field, Msr, Proc2Ctl, ProcCtl
from kvmnest.vmx.outcome import Exit, Fault, Succeed

pytestmark = [
    pytest.mark.series(19),
    pytest.mark.sdm("Virtualizing Reads from the APIC-Access Page"),
    pytest.mark.needs(
        ProcCtl.USE_TPR_SHADOW,
        Proc2Ctl.VIRTUALIZE_APIC_ACCESSES,
        Proc2Ctl.APIC_REGISTER_VIRTUALIZATION,
    ),
]

_LVT = tuple(range(0x320, 0x380, 0x10))
#: Registers that L2 reads from the virtual-APIC page, and those that it may write there.
READ = (
    *(0x20, 0x30, 0x80, 0xB0, 0xD0, 0xE0, 0xF0, *range(0x100, 0x290, 0x10)),
    *(0x300, 0x310, *_LVT, 0x380, 0x3E0),
)
WRITTEN = (0x20, 0x80, 0xB0, 0xD0, 0xE0, 0xF0, 0x280, 0x300, 0x310, *_LVT, 0x380, 0x3E0)
EOI, ICR_LOW, ICR_HIGH = 0xB0, 0x300, 0x310
LOAD = {1: b"\x8a\x07", 2: b"\x66\x8b\x07", 4: b"\x8b\x07", 8: b"\x48\x8b\x07"}  # from [RDI]
STORE = {1: b"\x88\x07", 2: b"\x66\x89\x07", 4: b"\x89\x07", 8: b"\x48\x89\x07"}


def _value(offset: int) -> int:
    """What the page holds at a register: another value at each."""
    return 0xA5000000 | offset << 8 | offset >> 4


class _Apic:
    """A guest whose APIC-access page is virtualized; the page behind it has its pattern."""

    def __init__(self, l1: L1, *flags: ProcCtl | Proc2Ctl) -> None:
        self.l1 = l1
        self.page, self.access = l1.sym("virtual_apic"), l1.sym("apic_access")
        self.guest = Guest(
            l1,
            ProcCtl.USE_TPR_SHADOW,
            Proc2Ctl.VIRTUALIZE_APIC_ACCESSES,
            Proc2Ctl.APIC_REGISTER_VIRTUALIZATION,
            *flags,
        )
        vmcs = self.guest.vmcs
        vmcs[Field.VIRTUAL_APIC_PAGE_ADDR], vmcs[Field.APIC_ACCESS_ADDR] = self.page, self.access
        vmcs[Field.TPR_THRESHOLD] = 0
        self.fill()

    def fill(self) -> None:
        for offset in range(0, 0x400, 0x10):
            self.l1.write_int(self.page + offset, _value(offset), 16)
        self.l1.write(self.access, b"\x77" * 4096)

    def registers(self) -> dict[int, int]:
        """Registers that no longer hold the pattern."""
        seen = {at: self.l1.read_int(self.page + at, 16) for at in range(0, 0x400, 0x10)}
        return {at: value for at, value in seen.items() if value != _value(at)}

    def access_exit(self, offset: int, kind: ApicAccessType) -> Exit:
        return self.guest.exit(
            ExitReason.APIC_ACCESS, qualification=ApicAccess(offset, kind).encode()
        )

    def write_exit(self, offset: int, length: int) -> Exit:
        """The APIC-write exit, behind the instruction."""
        return self.guest.exit(ExitReason.APIC_WRITE, offset=length, qualification=offset)


# --- the APIC-access page ---


@pytest.mark.parametrize("size", [1, 2, 4])
def test_read(l1: L1, size: int) -> None:
    """Listed registers are read from the virtual-APIC page, the others exit."""
    apic = _Apic(l1)
    for offset in range(0, 0x400, 0x10):
        seen = apic.guest.run(LOAD[size], {"rdi": apic.access + offset, "rax": 0})
        if offset in READ:
            assert seen == Succeed(), hex(offset)
            assert seen.regs["rax"] == _value(offset) & (1 << 8 * size) - 1, hex(offset)
        else:
            assert seen == apic.access_exit(offset, ApicAccessType.LINEAR_READ), hex(offset)
    assert apic.registers() == {}


def test_read_beside_a_register(l1: L1) -> None:
    """Only the low 32 bits of a register are virtualized: wider, beside and across exits."""
    apic = _Apic(l1)
    for offset in READ:
        for size, at in ((8, 0), (4, 4), (2, 3), (4, 1), (1, 4), (4, 12)):
            seen = apic.guest.run(LOAD[size], {"rdi": apic.access + offset + at})
            text = f"{size} bytes at {offset + at:#x}"
            assert seen == apic.access_exit(offset + at, ApicAccessType.LINEAR_READ), text
    for at, size in ((1, 1), (2, 2), (3, 1)):
        seen = apic.guest.run(LOAD[size], {"rdi": apic.access + 0xF0 + at, "rax": 0})
        assert seen == Succeed()
        assert seen.regs["rax"] == _value(0xF0) >> 8 * at & (1 << 8 * size) - 1


@pytest.mark.sdm("Virtualizing Writes to the APIC-Access Page")
def test_write(l1: L1) -> None:
    """A write to a listed register is done and then exits; to any other it exits before."""
    apic = _Apic(l1)
    for offset in range(0, 0x400, 0x10):
        if offset in (VTPR, ICR_HIGH):
            continue
        seen = apic.guest.run(STORE[4] + code.NOP, {"rdi": apic.access + offset, "rax": 0x12345678})
        if offset in WRITTEN:
            assert seen == apic.write_exit(offset, 2), hex(offset)
            assert set(apic.registers()) == {offset}, hex(offset)
            assert l1.read_int(apic.page + offset, 4) == 0x12345678, hex(offset)
            assert apic.guest.go_on() == Succeed(), hex(offset)
        else:
            assert seen == apic.access_exit(offset, ApicAccessType.LINEAR_WRITE), hex(offset)
            assert apic.registers() == {}, hex(offset)
        apic.fill()
    assert l1.read(apic.access, 4096) == b"\x77" * 4096


@pytest.mark.sdm("APIC-Write Emulation")
def test_write_without_exit(l1: L1) -> None:
    """The task priority and the high half of the interrupt command are written, and that is all."""
    apic = _Apic(l1)
    regs = {"rdi": apic.access + VTPR, "rax": 0x12345678}
    assert apic.guest.run(STORE[4], regs) == Succeed()
    assert l1.read_int(apic.page + VTPR, 4) == 0x78
    apic.fill()
    regs = {"rdi": apic.access + ICR_HIGH, "rax": 0x12345678}
    assert apic.guest.run(STORE[4], regs) == Succeed()
    assert l1.read_int(apic.page + ICR_HIGH, 4) == 0x12000000
    assert set(apic.registers()) == {ICR_HIGH}


@pytest.mark.sdm("Virtualizing Writes to the APIC-Access Page")
def test_write_beside_a_register(l1: L1) -> None:
    """Wider than 32 bits, beside and across: an APIC-access exit, and nothing is written."""
    apic = _Apic(l1)
    for offset in WRITTEN:
        for size, at in ((8, 0), (4, 4), (2, 3), (4, 1), (1, 4), (4, 12)):
            seen = apic.guest.run(STORE[size], {"rdi": apic.access + offset + at})
            text = f"{size} bytes at {offset + at:#x}"
            assert seen == apic.access_exit(offset + at, ApicAccessType.LINEAR_WRITE), text
    assert apic.registers() == {}


@pytest.mark.needs(*DELIVERY)
@pytest.mark.sdm("APIC-Write Emulation")
def test_write_with_interrupt_delivery(l1: L1) -> None:
    """With virtual-interrupt delivery EOI and a self-IPI by the command register do not exit."""
    apic = VirtualApic(
        l1, Proc2Ctl.VIRTUALIZE_APIC_ACCESSES, without=[Proc2Ctl.VIRTUALIZE_X2APIC_MODE]
    )
    guest, access = apic.guest, l1.sym("apic_access")
    guest.vmcs[Field.APIC_ACCESS_ADDR] = access
    apic.exit_on_eoi({0x71})
    apic.set(in_service=[0x31, 0x52, 0x71])
    store = STORE[4] + code.NOP
    eoi = {"rdi": access + EOI, "rax": 0xFF}
    assert guest.run(store, eoi) == apic.eoi_exit(0x71, 2)
    assert guest.run(store, eoi) == Succeed()
    assert apic.state() == ([], [0x31], 0, 0x31)
    assert apic.register(EOI) == 0
    # Destination shorthand "self", fixed, edge: the vector is requested and delivered.
    command = {"rdi": access + ICR_LOW, "rax": 0x40051}
    assert guest.run(store, command, GUEST_RFLAGS=0x202) == Fault(0x51, error_code=0, rip=2)
    assert apic.state() == ([], [0x31, 0x51], 0, 0x51)
    # Each of these says something else, and exits: no shorthand, to all, NMI, level, a low vector.
    for value in (0x00051, 0x80051, 0xC0051, 0x40451, 0x48051, 0x4000F):
        seen = guest.run(store, command | {"rax": value})
        written = guest.exit(ExitReason.APIC_WRITE, offset=2, qualification=ICR_LOW)
        assert seen == written, hex(value)
        assert apic.register(VICR_LO) == value
    assert apic.state() == ([], [0x31, 0x51], 0, 0x51)


# --- x2APIC MSRs ---


def _x2apic(l1: L1) -> Guest:
    """A guest whose x2APIC MSRs are those of the virtual-APIC page."""
    guest = Guest(
        l1,
        ProcCtl.USE_TPR_SHADOW,
        ProcCtl.USE_MSR_BITMAPS,
        Proc2Ctl.VIRTUALIZE_X2APIC_MODE,
        Proc2Ctl.APIC_REGISTER_VIRTUALIZATION,
    )
    guest.vmcs[Field.VIRTUAL_APIC_PAGE_ADDR] = l1.sym("virtual_apic")
    guest.vmcs[Field.TPR_THRESHOLD] = 0
    return guest


@pytest.mark.needs(Proc2Ctl.VIRTUALIZE_X2APIC_MODE, ProcCtl.USE_MSR_BITMAPS)
@pytest.mark.sdm("Virtualizing MSR-Based APIC Accesses")
def test_rdmsr(l1: L1) -> None:
    """RDMSR of 800H to 8FFH reads 64 bits of the virtual-APIC page, also where there is no MSR."""
    guest = _x2apic(l1)
    set_msr_bitmap(l1)
    page = l1.sym("virtual_apic")
    for msr in range(0x800, 0x900):
        l1.write_int(page + 16 * (msr & 0xFF), 0xB00 << 32 | msr, 16)
    l1.write_int(page + VTPR, 0xB00 << 32 | Msr.X2APIC_TPR, 16)
    for msr in range(0x800, 0x900):
        seen = guest.run(code.RDMSR, {"rcx": msr})
        assert seen == Succeed(), hex(msr)
        assert (seen.regs["rdx"], seen.regs["rax"]) == (0xB00, msr), hex(msr)


@pytest.mark.needs(Proc2Ctl.VIRTUALIZE_X2APIC_MODE, ProcCtl.USE_MSR_BITMAPS)
@pytest.mark.sdm("Virtualizing MSR-Based APIC Accesses")
def test_msr_bitmap_comes_first(l1: L1) -> None:
    """An access whose bit is set in the MSR bitmap exits, whatever would be virtualized."""
    guest = _x2apic(l1)
    msrs = (*range(0x800, 0x840), 0x87F, 0x8FF)
    both = [(part, msr) for part in ("read-low", "write-low") for msr in msrs]
    set_msr_bitmap(l1, both)
    for msr in msrs:
        regs = {"rcx": msr, "rax": 0, "rdx": 0}
        assert guest.run(code.RDMSR, regs) == guest.exit(ExitReason.RDMSR, 2), hex(msr)
        assert guest.run(code.WRMSR, regs) == guest.exit(ExitReason.WRMSR, 2), hex(msr)
