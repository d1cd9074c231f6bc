"""The local APIC of L1 while L2 runs: its mode changes, KVM drops its virtualization, L2 reads it.

Without the controls that virtualize an APIC for L2, L2's accesses go to L1's.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kvmnest.kvm import Cap
from kvmnest.kvm.exits import IoExit, MmioExit
from kvmnest.l1 import L1, code
from kvmnest.suite.support.apic import Apic
from kvmnest.suite.support.bitmaps import set_msr_bitmap
from kvmnest.suite.support.ept import invalidate, poke
from kvmnest.suite.support.guest import NOT_VALID, Guest
from kvmnest.vmx import EptQualification, ExitReason, Msr, Proc2Ctl, ProcCtl, Vector
from kvmnest.vmx.outcome import Exit, Fault, HostExit, Outcome, Succeed

pytestmark = [pytest.mark.series(15), pytest.mark.sdm("Local x2APIC Architecture")]

GP = Fault(Vector.GP, error_code=0, rip=0)
#: Bits 11:10 of IA32_APIC_BASE.
_MODE, _DISABLED, _XAPIC, _X2APIC = 0xC00, 0, 0x800, 0xC00
_ENABLED = 0x1FF
#: x2APIC registers that can be read.
_READABLE = (0x802, 0x803, 0x808, 0x80A, 0x80D, 0x80F, 0x810, 0x818, 0x820, 0x828, 0x830, 0x832)
_VERSION = 0xFEE00030
_LOAD = b"\x8b\x07"  # MOV EAX, [RDI]
_DEBUG_ENABLE, _DEBUG_BLOCK_INTERRUPTS = 1, 1 << 20
_VECTORS = (0xF0, 0xF1, 0xF2)


def _guest(l1: L1) -> Guest:
    guest = Guest(l1, ProcCtl.USE_MSR_BITMAPS)
    set_msr_bitmap(l1)
    return guest


def _set_mode_in_l2(l1: L1, guest: Guest, *modes: int) -> None:
    base = l1.rdmsr(Msr.APIC_BASE).value & ~_MODE
    for mode in modes:
        assert _write_in_l2(guest, Msr.APIC_BASE, base | mode) == Succeed(), hex(mode)


def _check_interrupts(apic: Apic) -> None:
    for vector in _VECTORS:
        apic.send(vector)
        assert apic.open_window() == [vector]
        assert (apic.requested(), apic.in_service()) == ([], [])


#: x2APIC registers that software writes, and a value that each keeps.
_WRITABLE = {
    Msr.X2APIC_TPR: 0x50,
    Msr.X2APIC_SIVR: 0x1EF,
    Msr.X2APIC_LVT_TIMER: 0x20045,  # periodic, with no count
    Msr.X2APIC_LVT_THERMAL: 0x10061,
    Msr.X2APIC_LVT_PMI: 0x10062,
    Msr.X2APIC_LVT_LINT0: 0x18063,
    Msr.X2APIC_LVT_LINT1: 0x10064,
    Msr.X2APIC_LVT_ERROR: 0x10065,
    Msr.X2APIC_INIT_COUNT: 0,
    Msr.X2APIC_DIV_CONF: 0xB,
}
_READ_ONLY = (
    *(Msr.X2APIC_APICID, Msr.X2APIC_VERSION, Msr.X2APIC_PPR, Msr.X2APIC_LDR),
    *(Msr.X2APIC_ISR0, Msr.X2APIC_TMR0, Msr.X2APIC_IRR0, Msr.X2APIC_CUR_COUNT),
)


def _write_in_l2(guest: Guest, msr: int, value: int) -> Outcome:
    regs = {"rcx": msr, "rax": value & 0xFFFFFFFF, "rdx": value >> 32}
    return guest.run(code.WRMSR, regs)


@pytest.mark.needs(ProcCtl.USE_MSR_BITMAPS)
@pytest.mark.sdm("x2APIC Register Address Space")
def test_l2_writes_registers(l1: L1) -> None:
    """WRMSR of L2 that does not exit reaches L1's APIC, register by register."""
    Apic(l1)
    guest = _guest(l1)
    for msr, value in _WRITABLE.items():
        assert _write_in_l2(guest, msr, value) == Succeed(), msr
        assert l1.rdmsr(msr) == Succeed(value), msr
    for msr in _WRITABLE:
        assert guest.run(code.RDMSR, {"rcx": msr}).regs["rax"] == l1.rdmsr(msr).value, msr


@pytest.mark.needs(ProcCtl.USE_MSR_BITMAPS)
@pytest.mark.sdm("Reserved Bit Checking")
def test_writes_that_fault_in_l2(l1: L1) -> None:
    """Reserved bits, read-only registers and those that x2APIC mode lacks give #GP in L2."""
    Apic(l1)
    guest = _guest(l1)
    for msr in _WRITABLE:
        before = l1.rdmsr(msr)
        assert _write_in_l2(guest, msr, before.value | 1 << 32) == GP, msr
        assert l1.rdmsr(msr) == before, msr
    for msr in _READ_ONLY:
        assert _write_in_l2(guest, msr, 0) == GP, msr
    # Destination format, upper half of the interrupt command.
    for absent in (0x80E, 0x831):
        assert _write_in_l2(guest, absent, 0) == GP, hex(absent)


@pytest.mark.needs(ProcCtl.USE_MSR_BITMAPS)
@pytest.mark.sdm("Reserved Bit Checking")
@pytest.mark.parametrize("msr", [Msr.X2APIC_EOI, Msr.X2APIC_ESR], ids=["EOI", "ESR"])
def test_register_that_takes_only_0(l1: L1, msr: int) -> None:
    """WRMSR of any other value gives #GP in L2."""
    Apic(l1)
    guest = _guest(l1)
    for value in (1, 1 << 31, 1 << 32):
        assert _write_in_l2(guest, msr, value) == GP, hex(value)
    assert _write_in_l2(guest, msr, 0) == Succeed()


@pytest.mark.needs(ProcCtl.USE_MSR_BITMAPS)
def test_l2_leaves_x2apic_mode(l1: L1) -> None:
    """L2 takes the APIC out of x2APIC mode: L1 has no x2APIC registers, but those in memory."""
    Apic(l1)
    guest = _guest(l1)
    version = l1.rdmsr(Msr.X2APIC_VERSION).value
    _set_mode_in_l2(l1, guest, _DISABLED, _XAPIC)
    assert l1.rdmsr(Msr.APIC_BASE).value & _MODE == _XAPIC
    for msr in _READABLE:
        assert l1.rdmsr(msr) == GP, hex(msr)
        assert guest.run(code.RDMSR, {"rcx": msr}) == GP, hex(msr)
    assert l1.wrmsr(Msr.X2APIC_TPR, 0) == GP
    assert l1.wrmsr(Msr.X2APIC_SELF_IPI, 0xF0) == GP
    seen = l1.call(_LOAD, regs={"rdi": _VERSION})
    assert seen == Succeed()
    assert seen.regs["rax"] == version & 0xFFFFFFFF


@pytest.mark.needs(ProcCtl.USE_MSR_BITMAPS)
@pytest.mark.parametrize("times", [1, 3])
def test_l2_enters_x2apic_mode(l1: L1, times: int) -> None:
    """L2 puts the APIC into x2APIC mode, also after leaving it: L1 uses it as ever."""
    guest = _guest(l1)
    base = l1.rdmsr(Msr.APIC_BASE).value
    assert base & _MODE == _XAPIC
    for number in range(times):
        if number:
            _set_mode_in_l2(l1, guest, _DISABLED, _XAPIC)
            assert l1.rdmsr(Msr.X2APIC_VERSION) == GP
        _set_mode_in_l2(l1, guest, _X2APIC)
        assert l1.rdmsr(Msr.APIC_BASE) == Succeed(base & ~_MODE | _X2APIC)
        for msr in _READABLE:
            assert l1.rdmsr(msr) == Succeed(), hex(msr)
            assert guest.run(code.RDMSR, {"rcx": msr}) == Succeed(), hex(msr)
        _check_interrupts(Apic(l1))
        _set_mode_in_l2(l1, guest, _X2APIC)


@pytest.mark.needs(ProcCtl.USE_MSR_BITMAPS)
def test_l2_turns_the_apic_off(l1: L1) -> None:
    """L2 disables the APIC: x2APIC registers are gone for L1, CPUID.APIC too; L1 enables it."""
    apic = Apic(l1)
    guest = _guest(l1)
    _set_mode_in_l2(l1, guest, _DISABLED)
    base = l1.rdmsr(Msr.APIC_BASE).value
    assert base & _MODE == _DISABLED
    assert not l1.cpuid(1).value[3] >> 9 & 1
    for msr in _READABLE:
        assert l1.rdmsr(msr) == GP, hex(msr)
    for mode in (_XAPIC, _X2APIC):
        assert l1.wrmsr(Msr.APIC_BASE, base | mode) == Succeed()
    assert l1.cpuid(1).value[3] >> 9 & 1
    assert l1.wrmsr(Msr.X2APIC_SIVR, _ENABLED) == Succeed()
    _check_interrupts(apic)


# --- KVM stops using the processor's APIC virtualization while L2 runs ---


def _stop(guest: Guest) -> None:
    seen = guest.run(code.out8(0x80) + code.NOP, GUEST_RFLAGS=0x202)
    assert isinstance(seen, HostExit)
    assert isinstance(seen.exit, IoExit)


def _block(l1: L1, block: bool) -> None:
    l1.vcpu.set_guest_debug(_DEBUG_ENABLE | _DEBUG_BLOCK_INTERRUPTS if block else 0)


@pytest.mark.needs(Cap.SET_GUEST_DEBUG2)
@pytest.mark.sdm("APIC Virtualization and Virtual Interrupts")
def test_interrupts_unblocked_while_l2_runs(l1: L1) -> None:
    """KVM_GUESTDBG_BLOCKIRQ ends while L2 is active: L1 takes what comes when it runs again."""
    apic, guest = Apic(l1), _guest(l1)
    for _ in range(2):
        _block(l1, True)
        _stop(guest)
        _block(l1, False)
        assert guest.resume() == Succeed()
        _check_interrupts(apic)


@pytest.mark.needs(Cap.SET_GUEST_DEBUG2)
@pytest.mark.sdm("APIC Virtualization and Virtual Interrupts")
@pytest.mark.parametrize("ended", ["in-L2", "in-L1"])
def test_interrupts_blocked_while_l2_runs(l1: L1, ended: str) -> None:
    """KVM_GUESTDBG_BLOCKIRQ, set while L2 is active, holds L1's interrupts back; then they come."""
    apic, guest = Apic(l1), _guest(l1)
    _check_interrupts(apic)
    for _ in range(2):
        _stop(guest)
        _block(l1, True)
        assert guest.resume() == Succeed()
        for vector in _VECTORS:
            apic.send(vector)
            assert apic.open_window() == []
        assert apic.requested() == list(_VECTORS)
        if ended == "in-L2":
            _stop(guest)
            _block(l1, False)
            # Without external-interrupt exiting L2 takes what waits; it acknowledges nothing.
            seen = guest.resume()
            assert seen == Fault(max(_VECTORS), error_code=0, rip=len(code.out8(0x80)))
            apic.end()
            assert apic.open_window() == [0xF1, 0xF0]
        else:
            _block(l1, False)
            assert apic.open_window() == [0xF2, 0xF1, 0xF0]
        _check_interrupts(apic)


@pytest.mark.needs(Cap.HYPERV_SYNIC)
@pytest.mark.sdm("APIC Virtualization and Virtual Interrupts")
def test_synic_while_l2_runs(l1: L1) -> None:
    """Hyper-V's interrupt controller, enabled while L2 is active, leaves L1's APIC as it was."""
    apic, guest = Apic(l1), _guest(l1)
    _stop(guest)
    l1.vcpu.enable_cap(Cap.HYPERV_SYNIC)
    assert guest.resume() == Succeed()
    _check_interrupts(apic)
    assert guest.run(code.NOP) == Succeed()
    _check_interrupts(apic)


# --- memory that KVM emulates, reached by L2 through EPT ---


def _entry(l1: L1, address: int) -> int:
    """Address of the EPT entry that maps the 2 MiB around an address above 3 GiB."""
    return l1.sym("ept_pml4_pd3") + 8 * (address >> 21 & 511)


def _apic_version(l1: L1, guest: Guest) -> None:
    own = l1.call(_LOAD, regs={"rdi": _VERSION})
    assert own == Succeed()
    assert own.regs["rax"] & 0xFF in range(0x10, 0x16)
    seen = guest.run(_LOAD, {"rdi": _VERSION})
    assert seen == Succeed()
    assert seen.regs["rax"] == own.regs["rax"]


def _user_memory(l1: L1, guest: Guest) -> None:
    seen = guest.run(_LOAD, {"rdi": _NOWHERE})
    assert isinstance(seen, HostExit)
    assert isinstance(seen.exit, MmioExit)
    assert (seen.exit.phys_addr, seen.exit.length, seen.exit.is_write) == (_NOWHERE, 4, False)
    l1.vcpu.set_mmio_data(b"\x44\x33\x22\x11")
    seen = guest.resume()
    assert seen == Succeed()
    assert seen.regs["rax"] == 0x11223344


_NOWHERE = 0xD0000010


@pytest.mark.needs(Proc2Ctl.ENABLE_EPT)
@pytest.mark.sdm("EPT Violations")
@pytest.mark.parametrize(
    ("address", "reads"),
    [pytest.param(_VERSION, _apic_version, id="APIC"),
     pytest.param(_NOWHERE, _user_memory, id="no-memory")],
)  # fmt: skip
def test_emulated_memory(l1: L1, address: int, reads: Callable[[L1, Guest], None]) -> None:
    """Memory that KVM emulates for L1 is L2's through EPT, unless L1 withdraws it: a violation."""
    guest = Guest(l1, ept=True)
    entry = _entry(l1, address)
    before = l1.read_int(entry)
    for _ in range(2):
        reads(l1, guest)
        poke(l1, entry, 0)
        invalidate(guest)
        known = EptQualification(read=True, linear_valid=True, translated=True).encode()
        seen = guest.run(_LOAD, {"rdi": address})
        assert seen == Exit(
            ExitReason.EPT_VIOLATION,
            rip=guest.at(),
            intr_info=NOT_VALID,
            idt_info=NOT_VALID,
            linear=address,
            physical=address,
        )
        assert seen.qualification & 0x1BF == known
        poke(l1, entry, before)
        invalidate(guest)
