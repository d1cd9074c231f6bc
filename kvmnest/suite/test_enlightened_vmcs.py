"""Enlightened VMCSs: VM entry takes its VMCS from a page of L1, without VMPTRLD or VMWRITE.

Hypervisor Top Level Functional Specification, "Nested Virtualization", "Enlightened VMCS"; what
entries and exits do with the fields is the SDM's.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvmnest.kvm import Cap, Kvm
from kvmnest.kvm.exits import IO_OUT, IoExit
from kvmnest.l1 import L2Mode, code
from kvmnest.l1.pool import L1Pool
from kvmnest.suite.support.bitmaps import set_io_bitmaps, set_msr_bitmap
from kvmnest.suite.support.enlightened import (
    ALL_CLEAN,
    CLEAN_FIELDS,
    ENLIGHTENMENTS,
    EnlightenedL1,
    EnlightenedVmcs,
)
from kvmnest.suite.support.guest import Guest
from kvmnest.vmx import (
    ExitReason,
    Field,
    IntrType,
    Msr,
    Proc2Ctl,
    ProcCtl,
    Vector,
    VmxError,
    intr_info,
)
from kvmnest.vmx.outcome import EntryFailure, Exit, Fault, HostExit, Succeed, VMfailValid

pytestmark = [
    pytest.mark.series(12),
    pytest.mark.sdm("Software Use of Virtual-Machine Control Structures"),
    pytest.mark.needs(Cap.HYPERV_ENLIGHTENED_VMCS),
]

PORT = 0x30
OUT = code.out8(PORT)
_UNPAGED = (L2Mode.UNPAGED, L2Mode.REAL)
MODES = [
    pytest.param(
        mode,
        id=mode.name.lower(),
        marks=[pytest.mark.needs(Proc2Ctl.UNRESTRICTED_GUEST)] if mode in _UNPAGED else [],
    )
    for mode in L2Mode
]


@pytest.fixture(scope="module")
def pool(kvm: Kvm) -> Iterator[L1Pool]:
    """Keeps one L1 under Hyper-V's enlightenments between cases."""
    made = L1Pool(kvm, make=EnlightenedL1)
    yield made
    made.close()


@pytest.fixture
def hv(pool: L1Pool) -> Iterator[EnlightenedL1]:
    """An L1 under Hyper-V's enlightenments."""
    l1 = pool.take()
    assert isinstance(l1, EnlightenedL1)
    yield l1
    pool.give_back(l1)


def _page(guest: Guest) -> EnlightenedVmcs:
    assert isinstance(guest.vmcs, EnlightenedVmcs)
    return guest.vmcs


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.sdm("Loading Guest State")
def test_entry_and_exit_in_each_mode(hv: EnlightenedL1, mode: L2Mode) -> None:
    """VMLAUNCH enters L2 from the page, and VMRESUME goes on there."""
    guest = Guest(hv, mode=mode)
    assert guest.run(b"") == Succeed()
    assert guest.run(code.CPUID) == guest.exit(ExitReason.CPUID, 2)


@pytest.mark.sdm("Recording VM-Exit Information and Updating VM-entry Control Fields")
def test_exit_information_is_in_the_page(hv: EnlightenedL1) -> None:
    """What VMREAD gives after an exit stands in the page too."""
    guest = Guest(hv, ProcCtl.USE_IO_BITMAPS, ProcCtl.USE_MSR_BITMAPS)
    set_io_bitmaps(hv, (PORT,))
    set_msr_bitmap(hv)
    guest.vmcs[Field.EXCEPTION_BITMAP] = 1 << Vector.UD
    assert guest.run(code.UD2) == guest.exception(Vector.UD)
    assert guest.vmcs.read(Field.VM_EXIT_REASON, Field.VM_EXIT_INTR_INFO) == (
        ExitReason.EXCEPTION_NMI,
        intr_info(Vector.UD, IntrType.HARDWARE_EXCEPTION, False),
    )
    seen = guest.run(OUT)
    assert isinstance(seen, Exit)
    assert seen.reason == ExitReason.IO_INSTRUCTION
    assert guest.vmcs.read(
        Field.VM_EXIT_REASON, Field.VM_EXIT_INSTRUCTION_LEN, Field.GUEST_RIP
    ) == (ExitReason.IO_INSTRUCTION, len(OUT), guest.at())
    assert guest.vmcs.read(Field.EXIT_QUALIFICATION)[0] >> 16 == PORT


@pytest.mark.sdm("Saving Guest State")
def test_guest_state_is_saved_in_the_page(hv: EnlightenedL1) -> None:
    """Registers that L2 changed without an exit are in the page after one."""
    guest = Guest(hv, ProcCtl.USE_MSR_BITMAPS)
    set_msr_bitmap(hv)
    values = {
        Msr.FS_BASE: (0x123456789000, Field.GUEST_FS_BASE),
        Msr.GS_BASE: (0x7FFF12345000, Field.GUEST_GS_BASE),
        Msr.SYSENTER_CS: (0x1238, Field.GUEST_SYSENTER_CS),
        Msr.SYSENTER_ESP: (0x112233445566, Field.GUEST_SYSENTER_ESP),
        Msr.SYSENTER_EIP: (0x665544332211, Field.GUEST_SYSENTER_EIP),
    }
    for msr, (value, field) in values.items():
        regs = {"rcx": int(msr), "rax": value & 0xFFFFFFFF, "rdx": value >> 32}
        assert guest.run(code.WRMSR, regs) == Succeed(), msr
        assert guest.vmcs.read(field) == (value,), msr


#: Bit of the group, a field of it, its new value, code of L2, and what then ends the run.
_GROUPS = {
    "guest_group_1": (11, Field.GUEST_SYSENTER_EIP, 0x77000, code.RDMSR, Msr.SYSENTER_EIP),
    "guest_group_2": (12, Field.GUEST_GS_BASE, 0x55000, code.RDMSR, Msr.GS_BASE),
    "exceptions": (7, Field.EXCEPTION_BITMAP, 1 << Vector.UD, code.UD2, ExitReason.EXCEPTION_NMI),
    "entry": (6, Field.VM_ENTRY_INTR_INFO_FIELD, 0, code.CPUID, ExitReason.CPUID),
}


@pytest.mark.parametrize("group", _GROUPS)
def test_a_change_of_a_group_that_is_not_clean_counts(hv: EnlightenedL1, group: str) -> None:
    """All other groups are said to be clean; the change takes effect at the next VMRESUME."""
    bit, field, value, snippet, expected = _GROUPS[group]
    guest = Guest(hv, ProcCtl.USE_MSR_BITMAPS)
    set_msr_bitmap(hv)
    page = _page(guest)
    assert guest.run(code.CPUID) == guest.exit(ExitReason.CPUID, 2)
    page.flush()
    # RIP belongs to no group; the rest of L2's state stays as the exit left it.
    page.clean = ALL_CLEAN & ~(1 << bit)
    page[field] = value
    hv.set_l2(snippet, page)
    seen = hv.vmresume(regs={"rcx": int(expected)})
    assert isinstance(seen, Exit)
    if isinstance(expected, Msr):
        assert (seen.reason, seen.regs["rax"]) == (ExitReason.VMCALL, value)
    else:
        assert seen.reason == expected


#: The enlightenment of the MSR bitmap, and its group of clean fields.
_MSR_BITMAP = 1 << 1


@pytest.mark.parametrize(
    ("enlightened", "clean"),
    [(0, ALL_CLEAN), (_MSR_BITMAP, ALL_CLEAN & ~_MSR_BITMAP)],
    ids=["without-the-enlightenment", "not-clean"],
)
@pytest.mark.parametrize("exits", [True, False], ids=["bit-set", "bit-cleared"])
@pytest.mark.sdm("MSR-Bitmap Address")
def test_a_changed_msr_bitmap(hv: EnlightenedL1, enlightened: int, clean: int, exits: bool) -> None:
    """A change of the bitmap counts at the next entry, unless the page says that there is none."""
    accesses = [("read-high", Msr.GS_BASE)]
    before, after = ([], accesses) if exits else (accesses, [])
    guest = Guest(hv, ProcCtl.USE_MSR_BITMAPS)
    page = _page(guest)
    hv.write_int(page.address + ENLIGHTENMENTS, enlightened, 4)
    regs = {"rcx": int(Msr.GS_BASE)}
    set_msr_bitmap(hv, before)
    seen = guest.run(code.RDMSR, regs)
    assert seen == (Succeed() if exits else guest.exit(ExitReason.RDMSR, 2))
    page.flush()
    page.clean = clean
    set_msr_bitmap(hv, after)
    seen = guest.run(code.RDMSR, regs)
    assert seen == (guest.exit(ExitReason.RDMSR, 2) if exits else Succeed())


@pytest.mark.sdm("Recording VM-Exit Information and Updating VM-entry Control Fields")
def test_after_an_exit_all_groups_are_clean(hv: EnlightenedL1) -> None:
    """Page and processor agree after an exit: all bits are set, until L1 clears one."""
    guest = Guest(hv)
    assert guest.run(b"") == Succeed()
    assert hv.read_int(guest.vmcs.address + CLEAN_FIELDS, 4) == ALL_CLEAN


def test_the_first_entry_takes_all_groups(hv: EnlightenedL1) -> None:
    """VMLAUNCH loads all fields, whatever the page calls clean: there was no entry before."""
    guest = Guest(hv)
    _page(guest).clean = ALL_CLEAN
    assert guest.run(code.CPUID) == guest.exit(ExitReason.CPUID, 2)


@pytest.mark.sdm("Checks on VMX Controls")
def test_a_bad_control_fails(hv: EnlightenedL1) -> None:
    """VMfailValid with error 7, which stands in the page's field too."""
    guest = Guest(hv)
    good = guest.vmcs[Field.PIN_BASED_VM_EXEC_CONTROL]
    guest.vmcs[Field.PIN_BASED_VM_EXEC_CONTROL] = 0
    assert hv.vmlaunch() == VMfailValid(VmxError.ENTRY_INVALID_CONTROL_FIELD)
    error = guest.vmcs.read(Field.VM_INSTRUCTION_ERROR)
    assert error == (VmxError.ENTRY_INVALID_CONTROL_FIELD,)
    guest.vmcs[Field.PIN_BASED_VM_EXEC_CONTROL] = good
    assert guest.run(b"") == Succeed()


@pytest.mark.sdm("Checks on Host Control Registers, MSRs, and SSP")
def test_a_bad_host_field_fails(hv: EnlightenedL1) -> None:
    """VMfailValid with error 8."""
    guest = Guest(hv)
    guest.vmcs[Field.HOST_CR4] = 0
    assert hv.vmlaunch() == VMfailValid(VmxError.ENTRY_INVALID_HOST_STATE_FIELD)


@pytest.mark.sdm("Checks on the Guest State Area")
def test_a_bad_guest_field_fails_the_entry(hv: EnlightenedL1) -> None:
    """Reason 33, and the page's exit reason says that the entry failed."""
    guest = Guest(hv)
    guest.vmcs[Field.GUEST_RFLAGS] = 0
    assert hv.vmlaunch() == EntryFailure(ExitReason.INVALID_GUEST_STATE)
    assert guest.vmcs.read(Field.VM_EXIT_REASON) == (1 << 31 | ExitReason.INVALID_GUEST_STATE,)


@pytest.mark.sdm("VM Entries")
def test_two_pages_hold_two_guests(hv: EnlightenedL1) -> None:
    """The assist page names one, then the other: each goes on where it stopped."""
    hv.enter_vmx()
    pages = {}
    for region, base in (("vmcs_a", 0x1000), ("vmcs_b", 0x2000)):
        pages[region] = hv.load_vmcs(region, l2=code.CPUID)
        pages[region][Field.GUEST_GS_BASE] = base
        assert hv.vmlaunch() == Exit(ExitReason.CPUID)
    for region, base in (("vmcs_a", 0x1000), ("vmcs_b", 0x2000)):
        hv.name(hv.sym(region))
        hv.skip_l2_instruction(2)
        assert hv.vmresume() == Exit(ExitReason.VMCALL)
        assert pages[region].read(Field.GUEST_GS_BASE) == (base,)


def test_vmclear_lets_the_page_go(hv: EnlightenedL1) -> None:
    """VMCLEAR of the page in use succeeds, writes no launch state into it, and it can be used."""
    guest = Guest(hv)
    page = _page(guest)
    assert guest.run(b"") == Succeed()
    before = hv.read(page.address, 0x338)
    assert hv.vmclear(page.address) == Succeed()
    assert hv.read(page.address, 0x338) == before
    hv.name(page.address)
    assert hv.vmlaunch() == Exit(ExitReason.VMCALL)


@pytest.mark.parametrize("what", ["no_memory", "version"])
def test_no_entry_from_a_page_that_is_none(hv: EnlightenedL1, what: str) -> None:
    """Neither a page where no memory is, nor one of another version is entered from."""
    guest = Guest(hv)
    guest.vmcs.flush()
    if what == "no_memory":
        hv.name(1 << 38)
    else:
        hv.write_int(guest.vmcs.address, 0x77, 4)
    assert not isinstance(hv.vmlaunch(), Exit | EntryFailure | HostExit)
    hv.write_int(guest.vmcs.address, 1, 4)
    hv.name(guest.vmcs.address)
    assert guest.run(b"") == Succeed()


@pytest.mark.sdm("VM Entries")
def test_a_usual_vmcs_beside_it(hv: EnlightenedL1) -> None:
    """Without the enlightenment the same L1 enters from the VMCS that VMPTRLD made current."""
    guest = Guest(hv)
    assert guest.run(b"") == Succeed()
    # While a page is in use KVM lets VMPTRLD not end: VMCLEAR comes first, as in the TLFS.
    assert hv.vmclear(guest.vmcs.address) == Succeed()
    hv.without_enlightenment()
    usual = super(EnlightenedL1, hv).load_vmcs("vmcs_c", l2=code.CPUID)
    assert hv.vmlaunch() == Exit(ExitReason.CPUID)
    assert usual.read(Field.VM_EXIT_REASON) == (ExitReason.CPUID,)


def _stopped(hv: EnlightenedL1) -> Guest:
    """A guest whose OUTs come to userspace."""
    guest = Guest(hv, ProcCtl.USE_IO_BITMAPS, ProcCtl.USE_MSR_BITMAPS)
    set_io_bitmaps(hv, ())
    set_msr_bitmap(hv)
    return guest


@pytest.mark.needs(Cap.NESTED_STATE)
def test_l2_moves_to_another_vm(hv: EnlightenedL1) -> None:
    """Saved while L2 runs, restored into another VM: L2 goes on, and its exit is in the page."""
    guest = _stopped(hv)
    seen = guest.run(OUT + code.CPUID, {"rax": 7})
    assert isinstance(seen, HostExit)
    assert isinstance(seen.exit, IoExit)
    assert (seen.exit.direction, seen.exit.port) == (IO_OUT, PORT)
    hv.round_trip()
    assert guest.resume() == guest.exit(ExitReason.CPUID, 2, offset=len(OUT))
    assert guest.vmcs.read(Field.VM_EXIT_REASON) == (ExitReason.CPUID,)


@pytest.mark.needs(Cap.NESTED_STATE)
def test_l1_moves_to_another_vm(hv: EnlightenedL1) -> None:
    """Saved between an exit and VMRESUME: what L1 writes into the page afterwards counts."""
    guest = Guest(hv)
    assert guest.run(code.CPUID) == guest.exit(ExitReason.CPUID, 2)
    hv.round_trip()
    guest.vmcs[Field.EXCEPTION_BITMAP] = 1 << Vector.UD
    assert guest.run(code.UD2) == guest.exception(Vector.UD)
    assert hv.read_int(guest.vmcs.address + CLEAN_FIELDS, 4) == ALL_CLEAN


@pytest.mark.sdm("VMREAD-Read Field from Virtual-Machine Control Structure")
def test_vmread_of_what_the_page_holds(hv: EnlightenedL1) -> None:
    """VMREAD gives the page's values, and fails for a field that it does not have."""
    guest = Guest(hv)
    assert guest.run(code.CPUID) == guest.exit(ExitReason.CPUID, 2)
    for field in (Field.GUEST_CS_SELECTOR, Field.GUEST_RIP, Field.VM_EXIT_REASON, Field.HOST_CR3):
        assert hv.vmread(field) == Succeed(value=guest.vmcs.read(field)[0]), field
    assert not isinstance(hv.vmread(Field.POSTED_INTR_NV), Succeed | Fault)
