"""VM entry with IA-32e mode, EFER, CR3 and CR0.TS; long runs of entries."""

from __future__ import annotations

import pytest

from kvmnest.l1 import L1, L2Mode, code
from kvmnest.suite.support.bitmaps import set_msr_bitmap
from kvmnest.suite.support.entries import BAD_GUEST, address_bits
from kvmnest.suite.support.guest import Guest
from kvmnest.vmx import Cr0, Efer, EntryCtl, Field, Msr, Proc2Ctl, ProcCtl, Vector
from kvmnest.vmx.outcome import Fault, Succeed

pytestmark = [
    pytest.mark.series(16),
    pytest.mark.sdm("Loading Guest Control Registers, Debug Registers, and MSRs"),
]

LONG = Efer.LME | Efer.LMA


def _read_efer(guest: Guest, **fields: int) -> int:
    """EFER as L2 reads it."""
    seen = guest.run(code.RDMSR, {"rcx": Msr.IA32_EFER}, **fields)
    assert seen == Succeed(), fields
    value: int = seen.regs["rax"]
    return value


def _guest(l1: L1, *flags: EntryCtl, mode: L2Mode = L2Mode.LONG) -> Guest:
    guest = Guest(l1, ProcCtl.USE_MSR_BITMAPS, *flags, mode=mode)
    set_msr_bitmap(l1)
    return guest


@pytest.mark.needs(EntryCtl.LOAD_EFER)
def test_efer_loaded(l1: L1) -> None:
    """With "load IA32_EFER" L2 has the guest-state area's EFER."""
    guest = _guest(l1, EntryCtl.LOAD_EFER)
    for rest in (0, Efer.SCE, Efer.NXE, Efer.NXE | Efer.SCE):
        assert _read_efer(guest, GUEST_IA32_EFER=LONG | rest) == LONG | rest


@pytest.mark.parametrize(
    "mode", [L2Mode.LONG, L2Mode.PROTECTED, L2Mode.PAE], ids=lambda mode: mode.name
)
def test_efer_follows_the_control(l1: L1, mode: L2Mode) -> None:
    """Without it LMA and LME follow "IA-32e mode guest"; the other bits are L1's."""
    guest = _guest(l1, mode=mode)
    guest.off(EntryCtl.LOAD_EFER)
    for rest in (Efer.NXE, Efer.NXE | Efer.SCE, 0):
        assert l1.wrmsr(Msr.IA32_EFER, LONG | rest) == Succeed()
        expected = rest | (LONG if mode is L2Mode.LONG else 0)
        assert _read_efer(guest, GUEST_IA32_EFER=0x500) == expected
        # The exit makes L1 a 64-bit program again.
        assert l1.rdmsr(Msr.IA32_EFER).value & LONG == LONG


@pytest.mark.needs(EntryCtl.LOAD_EFER)
@pytest.mark.sdm("Checks on Guest Control Registers, Debug Registers, and MSRs")
def test_efer_lma_and_lme(l1: L1) -> None:
    """LMA must be what "IA-32e mode guest" says, and with paging LME equal to it."""
    guest = _guest(l1, EntryCtl.LOAD_EFER)
    for value in map(int, (0, Efer.LME, Efer.LMA, Efer.NXE)):
        assert guest.run(code.NOP, GUEST_IA32_EFER=value) == BAD_GUEST, value
    assert guest.run(code.NOP, GUEST_IA32_EFER=LONG) == Succeed()


@pytest.mark.needs(EntryCtl.LOAD_EFER)
@pytest.mark.sdm("Checks on Guest Control Registers, Debug Registers, and MSRs")
def test_efer_lma_and_lme_of_32_bit_guests(l1: L1) -> None:
    """Outside IA-32e mode LMA and, with paging, LME must be 0."""
    guest = _guest(l1, EntryCtl.LOAD_EFER, mode=L2Mode.PAE)
    for value in map(int, (LONG, Efer.LME, Efer.LMA)):
        assert guest.run(code.NOP, GUEST_IA32_EFER=value) == BAD_GUEST, value
    for value in map(int, (0, Efer.NXE, Efer.SCE)):
        assert _read_efer(guest, GUEST_IA32_EFER=value) == value


@pytest.mark.needs(Proc2Ctl.UNRESTRICTED_GUEST, EntryCtl.LOAD_EFER)
@pytest.mark.sdm("Checks on Guest Control Registers, Debug Registers, and MSRs")
def test_lme_without_paging(l1: L1) -> None:
    """An unrestricted guest without paging may have LME set and not be in IA-32e mode."""
    guest = _guest(l1, EntryCtl.LOAD_EFER, mode=L2Mode.UNPAGED)
    for value in (0, Efer.LME, Efer.LME | Efer.NXE):
        assert _read_efer(guest, GUEST_IA32_EFER=value) == value
    for value in (Efer.LMA, LONG):
        assert guest.run(code.NOP, GUEST_IA32_EFER=value) == BAD_GUEST, value


@pytest.mark.needs(Proc2Ctl.UNRESTRICTED_GUEST)
@pytest.mark.parametrize("mode", [L2Mode.UNPAGED, L2Mode.REAL], ids=lambda mode: mode.name)
def test_lme_without_load_efer(l1: L1, mode: L2Mode) -> None:
    """LME is loaded only if CR0.PG is; without paging it stays as it was in L1."""
    guest = _guest(l1, mode=mode)
    guest.off(EntryCtl.LOAD_EFER)
    for rest in (Efer.NXE, Efer.NXE | Efer.SCE, 0):
        assert l1.wrmsr(Msr.IA32_EFER, LONG | rest) == Succeed()
        assert _read_efer(guest, GUEST_IA32_EFER=0) == Efer.LME | rest
        assert l1.rdmsr(Msr.IA32_EFER).value & LONG == LONG


@pytest.mark.parametrize("ept", [True, False], ids=["ept", "no-ept"])
def test_bad_cr3(l1: L1, ept: bool) -> None:
    """A CR3 wider than a physical address fails the entry; a good one then runs."""
    guest = Guest(l1) if ept else Guest(l1, ept=False)
    good = guest.vmcs[Field.GUEST_CR3]
    physical, _ = address_bits(l1)
    for bit in range(physical, 64):
        assert guest.run(code.NOP, GUEST_CR3=good | 1 << bit) == BAD_GUEST, bit
    assert guest.run(code.NOP, GUEST_CR3=(1 << 64) - 1) == BAD_GUEST
    # Bits 11:5 and 2:0 are ignored without PCIDs.
    for low in (0x8, 0x10, 0x18, 0xFE7):
        seen = guest.run(code.mov_from_cr(3, "rbx"), GUEST_CR3=good | low)
        assert seen == Succeed(), low
        assert seen.regs["rbx"] == good | low


@pytest.mark.parametrize("ept", [True, False], ids=["ept", "no-ept"])
def test_cr3_without_page_tables(l1: L1, ept: bool) -> None:
    """A CR3 that points at nothing is no failed entry: the first fetch faults."""
    guest = Guest(l1) if ept else Guest(l1, ept=False)
    empty = l1.alloc()
    seen = guest.run(code.NOP, GUEST_CR3=empty, EXCEPTION_BITMAP=1 << Vector.PF)
    assert seen == guest.exception(Vector.PF, 0x10, qualification=guest.start)
    assert guest.run(code.NOP, GUEST_CR3=l1.sym("l2_pml4")) == Succeed()


def test_each_entry_sees_its_cr3(l1: L1) -> None:
    """CR3 alternates between two address spaces with every entry."""
    guest = Guest(l1)
    pages = (l1.alloc(), l1.alloc())
    l1.write_int(pages[0], 0x1111)
    l1.write_int(pages[1], 0x2222)
    roots = [l1.sym("l2_pml4"), l1.alloc()]
    # The second address space maps the first page's address to the second page.
    tables = [roots[1], *(l1.alloc() for _ in range(3))]
    names = ("l2_pml4", "l2_pml4_pdpt", "l2_pml4_pd", "l2_pml4_pt")
    large = pages[0] >> 21
    for level, (table, name) in enumerate(zip(tables, names, strict=True)):
        source = l1.sym(name) + (large * 4096 if level == 3 else 0)
        l1.write(table, l1.read(source, 4096))
    l1.write_int(tables[0], tables[1] | 7)
    l1.write_int(tables[1], tables[2] | 7)
    l1.write_int(tables[2] + 8 * large, tables[3] | 7)
    l1.write_int(tables[3] + 8 * (pages[0] >> 12 & 511), pages[1] | 0x67)
    for number in range(10):
        root = roots[number % 2]
        seen = guest.run(b"\x8b\x07", {"rdi": pages[0]}, GUEST_CR3=root)  # MOV EAX, [RDI]
        assert seen == Succeed()
        assert seen.regs["rax"] == (0x1111, 0x2222)[number % 2]


def test_cr0_ts_of_each_entry(l1: L1) -> None:
    """CR0.TS is loaded by each entry, and L1's own by each exit."""
    guest = Guest(l1)
    cr0 = guest.vmcs[Field.GUEST_CR0]
    fninit = b"\xdb\xe3"
    for ts in (0, Cr0.TS, 0, Cr0.TS):
        seen = guest.run(fninit, GUEST_CR0=cr0 & ~Cr0.TS | ts)
        assert seen == (Fault(Vector.NM, error_code=0, rip=0) if ts else Succeed())
        assert l1.call(fninit) == Succeed()


def test_long_run(l1: L1) -> None:
    """Three hundred entries, with registers that each hands to the next."""
    guest = Guest(l1)
    # ADD RAX, RBX; ROL RCX; XOR RDX, RAX
    program = b"\x48\x01\xd8\x48\xd1\xc1\x48\x31\xc2"
    mask = (1 << 64) - 1
    rax, rbx, rcx, rdx = 1, 0x123456789ABCDEF, 0x8000000000000001, 0
    for number in range(300):
        seen = guest.run(program, {"rax": rax, "rbx": rbx, "rcx": rcx, "rdx": rdx})
        assert seen == Succeed()
        rax = rax + rbx & mask
        rcx = (rcx << 1 | rcx >> 63) & mask
        rdx ^= rax
        got = tuple(seen.regs[name] for name in ("rax", "rbx", "rcx", "rdx"))
        assert got == (rax, rbx, rcx, rdx), number
        assert guest.changed(seen, "rax", "rcx", "rdx") == {}
