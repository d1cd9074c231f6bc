"""The MSR areas of VM exits and the effects of the one of VM entries."""

from __future__ import annotations

import pytest

from kvmnest.l1 import L1, VmLost, code
from kvmnest.suite.support.bitmaps import set_msr_bitmap
from kvmnest.suite.support.failures import write_msr_area
from kvmnest.suite.support.guest import Guest
from kvmnest.vmx import Efer, EntryCtl, ExitCtl, ExitReason, Field, Msr, ProcCtl
from kvmnest.vmx.outcome import EntryFailure, Succeed

pytestmark = [pytest.mark.series(18), pytest.mark.sdm("VM Exits: Saving MSRs")]

_AREAS = {
    "store": (Field.VM_EXIT_MSR_STORE_ADDR, Field.VM_EXIT_MSR_STORE_COUNT, "exit_store_msrs"),
    "load": (Field.VM_EXIT_MSR_LOAD_ADDR, Field.VM_EXIT_MSR_LOAD_COUNT, "exit_load_msrs"),
    "entry": (Field.VM_ENTRY_MSR_LOAD_ADDR, Field.VM_ENTRY_MSR_LOAD_COUNT, "entry_load_msrs"),
}
_HIGH = 0xFFFF800000001000


def _guest(l1: L1, *flags: EntryCtl | ExitCtl) -> Guest:
    guest = Guest(l1, ProcCtl.USE_MSR_BITMAPS, *flags)
    set_msr_bitmap(l1)
    return guest


def _area(guest: Guest, name: str, *entries: tuple[int, int]) -> int:
    """Fill an MSR area and point the VMCS at it; its address."""
    address, count, label = _AREAS[name]
    where = guest.l1.sym(label)
    write_msr_area(guest.l1, where, *entries)
    guest.vmcs[address], guest.vmcs[count] = where, len(entries)
    return where


def _stored(l1: L1, where: int, count: int) -> list[tuple[int, int]]:
    """Read an area back: the whole first half of each entry, and the value."""
    return [
        (l1.read_int(where + 16 * number), l1.read_int(where + 16 * number + 8))
        for number in range(count)
    ]


@pytest.mark.needs(EntryCtl.LOAD_EFER, EntryCtl.LOAD_PAT, ExitCtl.LOAD_EFER, ExitCtl.LOAD_PAT)
def test_store_gives_l2s_values(l1: L1) -> None:
    """Values are those at the exit, before host state is loaded; the index half stays."""
    guest = _guest(l1, EntryCtl.LOAD_EFER, EntryCtl.LOAD_PAT, ExitCtl.LOAD_EFER, ExitCtl.LOAD_PAT)
    vmcs = guest.vmcs
    expected = {
        Msr.SYSENTER_CS: 0x18,
        Msr.SYSENTER_EIP: _HIGH,
        Msr.FS_BASE: 0x7FFFFFFFF000,
        Msr.GS_BASE: _HIGH + 8,
        Msr.IA32_EFER: int(Efer.LME | Efer.LMA | Efer.NXE | Efer.SCE),
        Msr.PAT: 0x0606060606060606,
        Msr.LSTAR: 0x1234,
        Msr.KERNEL_GS_BASE: 0x5678,
    }
    where = _area(guest, "store", *((msr, 0xA5A5A5A5A5A5A5A5) for msr in expected))
    vmcs[Field.GUEST_SYSENTER_CS] = 0x18
    vmcs[Field.GUEST_FS_BASE] = 0x7FFFFFFFF000
    vmcs[Field.GUEST_IA32_EFER] = expected[Msr.IA32_EFER]
    vmcs[Field.GUEST_IA32_PAT] = expected[Msr.PAT]
    program = b""
    for msr in (Msr.SYSENTER_EIP, Msr.GS_BASE, Msr.LSTAR, Msr.KERNEL_GS_BASE):
        value = expected[msr]
        program += code.mov32("rcx", msr) + code.mov32("rax", value & 0xFFFFFFFF)
        program += code.mov32("rdx", value >> 32) + code.WRMSR
    assert guest.run(program) == Succeed()
    assert _stored(l1, where, len(expected)) == [(int(m), v) for m, v in expected.items()]
    # L1 got its own values, where the host-state area has them.
    assert l1.rdmsr(Msr.SYSENTER_EIP) == Succeed(0)
    assert l1.rdmsr(Msr.FS_BASE) == Succeed(0)


def test_store_of_the_tsc(l1: L1) -> None:
    """IA32_TSC is stored as L1's RDMSR would read it: without L2's offset."""
    guest = _guest(l1)
    where = _area(guest, "store", (Msr.TSC, 0), (Msr.TSC, 0))
    assert guest.run(code.NOP) == Succeed()
    l1.vcpu.set_tsc_offset(l1.vcpu.get_tsc_offset() + (1 << 45))
    guest.on(ProcCtl.USE_TSC_OFFSETTING)
    for offset in (0, 1 << 50, -(1 << 40)):
        before = l1.rdtsc()
        assert guest.run(code.RDTSC, TSC_OFFSET=offset & (1 << 64) - 1) == Succeed()
        after = l1.rdtsc()
        first, second = (value for _, value in _stored(l1, where, 2))
        assert before.value < first <= second < after.value, hex(offset)


def test_store_counts_and_order(l1: L1) -> None:
    """As many entries as the count says are stored, also the recommended maximum of them."""
    guest = _guest(l1)
    most = l1.caps.misc.msr_list_max
    area = l1.alloc(most * 16 // 4096 + 1)
    for count in (0, 1, 7, most):
        write_msr_area(l1, area, *((Msr.KERNEL_GS_BASE, 7) for _ in range(most)))
        value = 0x1000 + count
        assert l1.wrmsr(Msr.KERNEL_GS_BASE, value) == Succeed()
        guest.vmcs[Field.VM_EXIT_MSR_STORE_ADDR] = area
        assert guest.run(code.NOP, VM_EXIT_MSR_STORE_COUNT=count) == Succeed()
        expected = [(int(Msr.KERNEL_GS_BASE), value)] * count
        expected += [(int(Msr.KERNEL_GS_BASE), 7)] * (most - count)
        assert _stored(l1, area, most) == expected, count


@pytest.mark.sdm("VM Exits: Loading MSRs")
def test_longest_areas(l1: L1) -> None:
    """All three areas at the recommended maximum: each entry counts, and L1's other MSRs stay."""
    guest = _guest(l1)
    most = l1.caps.misc.msr_list_max
    others = (Msr.LSTAR, Msr.CSTAR, Msr.STAR, Msr.FMASK, Msr.PAT)
    before = {msr: l1.rdmsr(msr).value for msr in others}
    where = {}
    for number, (name, (address, count, _)) in enumerate(_AREAS.items(), 1):
        where[name] = l1.alloc(most * 16 // 4096 + 1)
        entries = ((Msr.KERNEL_GS_BASE, number << 20 | n) for n in range(most))
        write_msr_area(l1, where[name], *entries)
        guest.vmcs[address], guest.vmcs[count] = where[name], most
    regs = {"rcx": Msr.KERNEL_GS_BASE}
    # Twice: the second entry has nothing left over from the first one.
    for _ in range(2):
        assert l1.wrmsr(Msr.KERNEL_GS_BASE, 0x5555) == Succeed()
        seen = guest.run(code.RDMSR, regs)
        assert seen == Succeed()
        loaded = 3 << 20 | most - 1
        assert seen.regs["rax"] & 0xFFFFFFFF == loaded
        assert _stored(l1, where["store"], most) == [(int(Msr.KERNEL_GS_BASE), loaded)] * most
        assert l1.rdmsr(Msr.KERNEL_GS_BASE) == Succeed(2 << 20 | most - 1)
    assert {msr: l1.rdmsr(msr).value for msr in others} == before


@pytest.mark.sdm("VM Exits: Loading MSRs")
def test_exit_load_comes_last(l1: L1) -> None:
    """The area is loaded after the host-state area, entry by entry."""
    guest = _guest(l1, ExitCtl.LOAD_EFER)
    long_mode = Efer.LME | Efer.LMA
    _area(
        guest, "load",
        (Msr.SYSENTER_CS, 0x44), (Msr.SYSENTER_EIP, 1), (Msr.SYSENTER_EIP, _HIGH),
        (Msr.IA32_EFER, int(long_mode | Efer.NXE | Efer.SCE)), (Msr.KERNEL_GS_BASE, 0x99),
        (Msr.LSTAR, _HIGH), (Msr.PAT, 0x0505050505050505),
    )  # fmt: skip
    guest.vmcs[Field.HOST_IA32_SYSENTER_CS] = 0x11
    guest.vmcs[Field.HOST_IA32_SYSENTER_ESP] = 0x22
    guest.vmcs[Field.HOST_IA32_EFER] = long_mode | Efer.NXE
    assert guest.run(code.NOP) == Succeed()
    for msr, value in (
        (Msr.SYSENTER_CS, 0x44),
        (Msr.SYSENTER_ESP, 0x22),
        (Msr.SYSENTER_EIP, _HIGH),
        (Msr.IA32_EFER, long_mode | Efer.NXE | Efer.SCE),
        (Msr.KERNEL_GS_BASE, 0x99),
        (Msr.LSTAR, _HIGH),
        (Msr.PAT, 0x0505050505050505),
    ):
        assert l1.rdmsr(msr) == Succeed(value), msr.name


@pytest.mark.sdm("VM Exits: Loading MSRs")
def test_store_before_load(l1: L1) -> None:
    """One MSR in both areas swaps: L2's value is stored, then L1's is loaded."""
    guest = _guest(l1)
    store = _area(guest, "store", (Msr.KERNEL_GS_BASE, 0))
    load = _area(guest, "load", (Msr.KERNEL_GS_BASE, 0x1111))
    entry = _area(guest, "entry", (Msr.KERNEL_GS_BASE, 0x2222))
    assert guest.run(code.RDMSR, {"rcx": Msr.KERNEL_GS_BASE}) == Succeed(), "entry area"
    assert _stored(l1, store, 1) == [(int(Msr.KERNEL_GS_BASE), 0x2222)]
    assert l1.rdmsr(Msr.KERNEL_GS_BASE) == Succeed(0x1111)
    # The loads read their areas only.
    assert _stored(l1, load, 1) == [(int(Msr.KERNEL_GS_BASE), 0x1111)]
    assert _stored(l1, entry, 1) == [(int(Msr.KERNEL_GS_BASE), 0x2222)]


@pytest.mark.sdm("Loading MSRs")
def test_entry_load_comes_after_the_guest_state(l1: L1) -> None:
    """The VM-entry area overrides the fields of the guest-state area, and the exit saves that."""
    guest = _guest(l1)
    _area(guest, "entry", (Msr.SYSENTER_EIP, 5), (Msr.SYSENTER_CS, 0x77),
          (Msr.SYSENTER_EIP, _HIGH))  # fmt: skip
    seen = guest.run(
        code.RDMSR, {"rcx": Msr.SYSENTER_EIP}, GUEST_SYSENTER_EIP=3, GUEST_SYSENTER_CS=4
    )
    assert seen == Succeed()
    assert seen.regs["rdx"] << 32 | seen.regs["rax"] == _HIGH
    saved = guest.vmcs.read(Field.GUEST_SYSENTER_EIP, Field.GUEST_SYSENTER_CS)
    assert saved == (_HIGH, 0x77)


@pytest.mark.sdm("VM-Entry Failures During or After Loading Guest State")
def test_areas_at_a_failed_entry(l1: L1) -> None:
    """A failed entry loads MSRs for L1 as an exit does, and stores none."""
    guest = _guest(l1)
    store = _area(guest, "store", (Msr.KERNEL_GS_BASE, 7))
    _area(guest, "load", (Msr.LSTAR, 0x4321))
    for fields, reason, qualification in (
        ({"GUEST_RFLAGS": 0}, ExitReason.INVALID_GUEST_STATE, 0),
        ({"VMCS_LINK_POINTER": 1}, ExitReason.INVALID_GUEST_STATE, 4),
    ):
        assert l1.wrmsr(Msr.LSTAR, 0) == Succeed()
        seen = guest.run(code.NOP, **fields)
        assert seen == EntryFailure(reason, qualification=qualification)
        assert l1.rdmsr(Msr.LSTAR) == Succeed(0x4321), fields
        assert _stored(l1, store, 1) == [(int(Msr.KERNEL_GS_BASE), 7)]
    guest.vmcs[Field.VMCS_LINK_POINTER] = (1 << 64) - 1
    _area(guest, "entry", (Msr.FS_BASE, 0))
    assert l1.wrmsr(Msr.LSTAR, 0) == Succeed()
    assert guest.run(code.NOP) == EntryFailure(ExitReason.MSR_LOAD_FAIL, qualification=1)
    assert l1.rdmsr(Msr.LSTAR) == Succeed(0x4321)
    assert _stored(l1, store, 1) == [(int(Msr.KERNEL_GS_BASE), 7)]


@pytest.mark.sdm("VMX Aborts")
@pytest.mark.parametrize(
    ("area", "index", "value"),
    [
        pytest.param("load", Msr.FS_BASE, 0, id="load-FS_BASE"),
        pytest.param("load", Msr.GS_BASE, 0, id="load-GS_BASE"),
        pytest.param("load", Msr.KERNEL_GS_BASE, 1 << 63, id="load-not-canonical"),
        pytest.param("load", 0x12345678, 0, id="load-unknown"),
        pytest.param("load", 1 << 40 | Msr.KERNEL_GS_BASE, 0, id="load-reserved-half"),
        pytest.param("store", 0x12345678, 0, id="store-unknown"),
        pytest.param("store", 1 << 32 | Msr.KERNEL_GS_BASE, 0, id="store-reserved-half"),
        pytest.param("store", Msr.SMBASE, 0, id="store-SMBASE"),
    ],
)
def test_bad_entry_aborts(l1: L1, area: str, index: int, value: int) -> None:
    """An exit that cannot store or load an MSR is a VMX abort: the processor shuts down."""
    guest = _guest(l1)
    assert guest.run(code.NOP) == Succeed()
    _area(guest, area, (Msr.KERNEL_GS_BASE, 0), (index, value))
    with pytest.raises(VmLost) as caught:
        guest.run(code.NOP)
    assert caught.value.kind == "triple fault"
