"""VPIDs: which translations L2 may and may not use after L1 or L2 changed the tables."""

from __future__ import annotations

import pytest

from kvmnest.l1 import L1, code
from kvmnest.suite.support.entries import EPT_OR_NOT
from kvmnest.suite.support.ept import poke
from kvmnest.suite.support.guest import Guest
from kvmnest.vmx import Cr4, EptVpidCap, ExitReason, Field, Proc2Ctl, Vector
from kvmnest.vmx.outcome import EntryFailure, Fault, Succeed

pytestmark = [pytest.mark.series(19), pytest.mark.sdm("Operations that Invalidate Cached Mappings")]

LINEAR = 0x40000000
LOAD = b"\x48\x8b\x07"  # MOV RAX, [RDI]
STORE = b"\x48\x89\x1e"  # MOV [RSI], RBX
INVLPG = b"\x0f\x01\x3f"  # INVLPG [RDI]
GLOBAL = 1 << 8
_VPID = Proc2Ctl.ENABLE_VPID


class Mapping:
    """Page ``LINEAR`` of the tables under ``pdpt``, to be pointed at one of four pages.

    Page number n holds the value n + ``first``.
    """

    def __init__(self, l1: L1, pdpt: int, first: int = 1, flags: int = 0) -> None:
        self.l1, self.first, self.flags = l1, first, 0x67 | flags
        self.pages, directory, self.table = l1.alloc(4), l1.alloc(), l1.alloc()
        for number in range(4):
            l1.write_int(self.pages + 4096 * number, number + first)
        l1.write_int(directory, self.table | 7)
        l1.write_int(self.table, self.entry(0))
        l1.write_int(pdpt + 8, directory | 7)

    def entry(self, number: int) -> int:
        """The page-table entry that names page ``number``."""
        return self.pages + 4096 * number | self.flags

    def point(self, number: int) -> int:
        """Let L1 point the entry at a page; its value."""
        poke(self.l1, self.table, self.entry(number))
        return number + self.first


def _guest(l1: L1, ept: bool, vpid: int = 0) -> tuple[Guest, Mapping]:
    guest = Guest(l1, ept=ept)
    mapping = Mapping(l1, l1.sym("l2_pml4_pdpt"))
    if vpid:
        guest.on(_VPID)
        guest.vmcs[Field.VIRTUAL_PROCESSOR_ID] = vpid
    return guest, mapping


def _load(guest: Guest) -> int:
    seen = guest.run(LOAD, {"rdi": LINEAR})
    assert seen == Succeed()
    value: int = seen.regs["rax"]
    return value


@EPT_OR_NOT
def test_without_vpid(l1: L1, ept: bool) -> None:
    """Without VPIDs each VM entry and exit forgets linear translations."""
    guest, mapping = _guest(l1, ept)
    for turn in range(24):
        value = mapping.point(turn % 4)
        assert _load(guest) == value, turn


TYPES = (
    EptVpidCap.INVVPID_INDIVIDUAL_ADDRESS,
    EptVpidCap.INVVPID_SINGLE_CONTEXT,
    EptVpidCap.INVVPID_ALL_CONTEXTS,
    EptVpidCap.INVVPID_SINGLE_CONTEXT_RETAINING_GLOBALS,
)


@EPT_OR_NOT
@pytest.mark.needs(_VPID, EptVpidCap.INVVPID)
def test_invvpid(l1: L1, ept: bool) -> None:
    """After INVVPID of any type L2 uses the changed table."""
    guest, mapping = _guest(l1, ept, vpid=5)
    kinds = [kind for kind, flag in enumerate(TYPES) if l1.caps.supports(flag)]
    for turn in range(24):
        kind = kinds[turn // 2 % len(kinds)]
        value = mapping.point(turn % 4)
        assert l1.invvpid(kind, 5, LINEAR) == Succeed()
        assert _load(guest) == value, f"turn {turn}, type {kind}"


@EPT_OR_NOT
@pytest.mark.needs(_VPID, EptVpidCap.INVVPID)
def test_invvpid_of_global_pages(l1: L1, ept: bool) -> None:
    """Single context forgets global translations, too."""
    guest = Guest(l1, _VPID, ept=ept)
    mapping = Mapping(l1, l1.sym("l2_pml4_pdpt"), flags=GLOBAL)
    guest.vmcs[Field.VIRTUAL_PROCESSOR_ID] = 5
    guest.vmcs.set_bits(Field.GUEST_CR4, Cr4.PGE)
    for turn in range(8):
        value = mapping.point(turn % 4)
        assert l1.invvpid(turn % 2, 5, LINEAR) == Succeed()
        assert _load(guest) == value, turn


@EPT_OR_NOT
@pytest.mark.needs(_VPID)
def test_new_vpid(l1: L1, ept: bool) -> None:
    """A VPID that was never used has no translations, whatever others have."""
    guest, mapping = _guest(l1, ept, vpid=1)
    for vpid in (1, 2, 0x100, 0x101, 0x8000, 0xFFFF, 3):
        guest.vmcs[Field.VIRTUAL_PROCESSOR_ID] = vpid
        value = mapping.point(vpid % 4)
        assert _load(guest) == value, hex(vpid)


@EPT_OR_NOT
@pytest.mark.needs(_VPID)
@pytest.mark.parametrize("failure", ["MSR-area", "guest-state"])
def test_new_vpid_after_a_failed_entry(l1: L1, ept: bool, failure: str) -> None:
    """The first entry with a VPID fails: the next one finds no translations all the same."""
    guest, mapping = _guest(l1, ept, vpid=1)
    area, cr3 = l1.alloc(), guest.vmcs[Field.GUEST_CR3]
    l1.write_int(area, 0x801)  # an MSR of the x2APIC, which no area can load
    guest.vmcs[Field.VM_ENTRY_MSR_LOAD_ADDR] = area
    assert _load(guest) == mapping.first
    for vpid in (2, 0x101, 0x8003, 0xFFFC):
        guest.vmcs[Field.VIRTUAL_PROCESSOR_ID] = vpid
        value = mapping.point(vpid % 4)
        if failure == "MSR-area":
            seen = guest.run(code.NOP, VM_ENTRY_MSR_LOAD_COUNT=1)
            assert seen == EntryFailure(ExitReason.MSR_LOAD_FAIL, qualification=1)
        else:
            seen = guest.run(code.NOP, GUEST_CR3=cr3 | 1 << 63)
            assert seen == EntryFailure(ExitReason.INVALID_GUEST_STATE, qualification=0)
        guest.vmcs[Field.VM_ENTRY_MSR_LOAD_COUNT], guest.vmcs[Field.GUEST_CR3] = 0, cr3
        assert _load(guest) == value, hex(vpid)


@EPT_OR_NOT
@pytest.mark.needs(_VPID, EptVpidCap.INVVPID)
def test_vpid_used_again(l1: L1, ept: bool) -> None:
    """Going back to an old VPID, INVVPID of that VPID is what forgets its translations."""
    guest, mapping = _guest(l1, ept, vpid=1)
    for turn in range(12):
        vpid = 1 + turn % 2
        guest.vmcs[Field.VIRTUAL_PROCESSOR_ID] = vpid
        value = mapping.point(turn // 2 % 4)
        assert l1.invvpid(1, vpid) == Succeed()
        assert _load(guest) == value, turn


@EPT_OR_NOT
@pytest.mark.parametrize(
    "vpid", [0, pytest.param(7, marks=pytest.mark.needs(_VPID))], ids=["no-vpid", "vpid"]
)
@pytest.mark.sdm("Virtual-Processor Identifiers (VPIDs)")
def test_l1_and_l2_have_their_own_translations(l1: L1, ept: bool, vpid: int) -> None:
    """The same linear address in L1 and in L2: each sees its own page, all the time."""
    guest, mapping = _guest(l1, ept, vpid)
    own = Mapping(l1, l1.sym("l1_pml4_pdpt"), first=100)
    for _ in range(8):
        seen = l1.call(LOAD, regs={"rdi": LINEAR})
        assert seen == Succeed()
        assert seen.regs["rax"] == 100
        assert _load(guest) == mapping.first
    value = own.point(2)
    assert l1.execute("invlpg", {}, at=LINEAR) == Succeed()
    assert l1.call(LOAD, regs={"rdi": LINEAR}).regs["rax"] == value
    assert _load(guest) == mapping.first


@EPT_OR_NOT
@pytest.mark.parametrize(
    "vpids",
    [(0, 0), pytest.param((1, 2), marks=pytest.mark.needs(_VPID))],
    ids=["no-vpid", "vpid"],
)
@pytest.mark.sdm("Virtual-Processor Identifiers (VPIDs)")
def test_two_guests(l1: L1, ept: bool, vpids: tuple[int, int]) -> None:
    """Two VMCSs with tables of their own never see each other's pages."""
    root, pdpt = l1.alloc(), l1.alloc()
    l1.write(root, l1.read(l1.sym("l2_pml4"), 4096))
    l1.write(pdpt, l1.read(l1.sym("l2_pml4_pdpt"), 4096))
    l1.write_int(root, pdpt | 7)
    mappings = [
        Mapping(l1, l1.sym("l2_pml4_pdpt"), first=1),
        Mapping(l1, pdpt, first=100),
    ]
    l1.enter_vmx()
    regions = []
    for number, (vpid, cr3) in enumerate(zip(vpids, (l1.sym("l2_pml4"), root), strict=True)):
        vmcs = l1.load_vmcs(("vmcs_a", "vmcs_b")[number], ept=ept, l2=LOAD)
        vmcs[Field.GUEST_CR3] = cr3
        if vpid:
            vmcs.set_bits(Field.CPU_BASED_VM_EXEC_CONTROL, 1 << 31)
            vmcs[Field.SECONDARY_VM_EXEC_CONTROL] = (
                vmcs.fields().get(Field.SECONDARY_VM_EXEC_CONTROL, 0) | _VPID
            )
            vmcs[Field.VIRTUAL_PROCESSOR_ID] = vpid
        regions.append(vmcs)
    for turn in range(12):
        vmcs, mapping = regions[turn % 2], mappings[turn % 2]
        assert l1.vmptrld(vmcs.address) == Succeed()
        value = mapping.point(turn // 2 % 4)
        if vpids[turn % 2]:
            assert l1.invvpid(0, vpids[turn % 2], LINEAR) == Succeed()
        vmcs[Field.GUEST_RIP] = l1.sym("l2_code")
        seen = l1.vmlaunch(regs={"rdi": LINEAR}) if turn < 2 else l1.vmresume(regs={"rdi": LINEAR})
        assert seen.regs["rax"] == value, turn


# --- what L2 does itself ---


@EPT_OR_NOT
@pytest.mark.parametrize(
    "vpid", [0, pytest.param(7, marks=pytest.mark.needs(_VPID))], ids=["no-vpid", "vpid"]
)
def test_l2_changes_its_tables(l1: L1, ept: bool, vpid: int) -> None:
    """L2 maps another page and executes INVLPG, or loads CR3: it then reads the new page."""
    guest, mapping = _guest(l1, ept, vpid)
    for turn in range(12):
        number = (turn + 1) % 4
        flush = INVLPG if turn % 3 else code.mov_from_cr(3) + code.mov_to_cr(3)
        regs = {"rdi": LINEAR, "rsi": mapping.table, "rbx": mapping.entry(number)}
        seen = guest.run(LOAD + STORE + flush + LOAD, regs)
        assert seen == Succeed(), turn
        assert seen.regs["rax"] == mapping.first + number, turn


@EPT_OR_NOT
@pytest.mark.parametrize(
    "vpid", [0, pytest.param(7, marks=pytest.mark.needs(_VPID))], ids=["no-vpid", "vpid"]
)
def test_l2_unmaps_a_page(l1: L1, ept: bool, vpid: int) -> None:
    """After L2 cleared an entry and executed INVLPG the access faults inside L2."""
    guest, mapping = _guest(l1, ept, vpid)
    before = LOAD + STORE + INVLPG
    regs = {"rdi": LINEAR, "rsi": mapping.table, "rbx": 0}
    expected = Fault(Vector.PF, error_code=0, cr2=LINEAR, rip=len(before))
    assert guest.run(before + LOAD, regs) == expected
    mapping.point(3)
    if vpid:
        assert l1.invvpid(0, vpid, LINEAR) == Succeed()
    assert _load(guest) == 4


@EPT_OR_NOT
@pytest.mark.parametrize(
    "vpid", [0, pytest.param(7, marks=pytest.mark.needs(_VPID))], ids=["no-vpid", "vpid"]
)
def test_l2_write_protects_a_page(l1: L1, ept: bool, vpid: int) -> None:
    """L2 makes its own page read-only: reads go on, a write faults with P and W/R."""
    guest, mapping = _guest(l1, ept, vpid)
    write = b"\x48\x89\x07"  # MOV [RDI], RAX
    regs = {"rdi": LINEAR, "rsi": mapping.table, "rbx": mapping.entry(0) & ~2}
    before = LOAD + write + STORE + INVLPG + LOAD
    seen = guest.run(before + write, regs)
    assert seen == Fault(Vector.PF, error_code=3, cr2=LINEAR, rip=len(before))
    assert l1.read_int(mapping.pages) == mapping.first
