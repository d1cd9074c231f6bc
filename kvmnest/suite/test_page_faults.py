"""Page faults of L2: every access through every kind of entry, against a model of paging.

Without EPT a hypervisor walks L2's tables itself and decides whether a fault is L2's; with EPT and
its own tables read-only, too. What it remembers of a table must not outlive what L2 and L1 do to
forget it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import pytest

from kvmnest.l1 import L1
from kvmnest.suite.support.emulation import forced
from kvmnest.suite.support.entries import address_bits
from kvmnest.suite.support.ept import FILL, VALUE, Access
from kvmnest.suite.support.guest import Guest
from kvmnest.vmx import (
    Cr0,
    Cr4,
    Efer,
    EntryCtl,
    EptVpidCap,
    ExitCtl,
    Field,
    Proc2Ctl,
    Rflags,
    Vector,
)
from kvmnest.vmx.outcome import Outcome, Succeed

__all__ = ["forced"]

pytestmark = [
    pytest.mark.series(21),
    pytest.mark.sdm("Page-Fault Exceptions"),
]

P, W, U, A, D, LARGE, NX = 1, 2, 4, 1 << 5, 1 << 6, 1 << 7, 1 << 63
KEY_1 = 1 << 59
ALL = P | W | U
LINEAR = 0x40000000
INVLPG = b"\x0f\x01\x3f"  # INVLPG [RDI]
INDIVIDUAL_ADDRESS = 0
#: Flags of a leaf: not present (with all else), and each set of permissions.
LEAVES = [W | U, *(P | w | u | nx for w in (0, W) for u in (0, U) for nx in (0, NX))]
#: Flags of an entry above it.
ABOVE = [P | U, P | W, ALL | NX, W | U]
CPLS = pytest.mark.parametrize("cpl", [0, 3], ids=["supervisor", "user"])
SIZES = pytest.mark.parametrize("large", [False, True], ids=["4K", "2M"])


@dataclass(frozen=True)
class Rules:
    """What decides beside the entries."""

    user: bool
    wp: bool = True
    nxe: bool = True
    smap: bool = False
    smep: bool = False
    ac: bool = False
    #: Access-disable and write-disable of protection key 1, if CR4.PKE is set.
    pkru: int | None = None

    def error_code(
        self, kind: Access, entries: list[int], reserved: int, reserved_in_leaf: int
    ) -> int | None:
        """The error code of the fault that the access meets, None if it meets none.

        ``entries`` are those of the walk, the leaf last; the reserved bits must be 0.
        """
        code = (kind is Access.WRITE) << 1 | self.user << 2
        code |= (kind is Access.FETCH and (self.nxe or self.smep)) << 4
        for entry, must_be_0 in zip(entries, (reserved, reserved_in_leaf), strict=True):
            if not entry & P:
                return code
            if entry & (must_be_0 if self.nxe else must_be_0 | NX):
                return code | 1 << 3 | P
        rights, leaf = entries[0], entries[-1]
        for entry in entries:
            rights &= entry
        never = any(entry & NX for entry in entries)
        if kind is not Access.FETCH and rights & U and leaf & KEY_1:
            # The error code says so, whatever else forbids the access.
            code |= self._key_forbids(kind) << 5
        if self.user and not rights & U:
            return code | P
        if kind is Access.FETCH:
            kept = not self.user and self.smep and rights & U
            return code | P if kept or (never and self.nxe) else None
        if kind is Access.WRITE and not rights & W and (self.user or self.wp):
            return code | P
        if not self.user and self.smap and not self.ac and rights & U:
            return code | P
        return code | P if code & 1 << 5 else None

    def _key_forbids(self, kind: Access) -> bool:
        """Whether PKRU forbids a data access to a user-mode address of protection key 1."""
        pkru = self.pkru or 0
        no_write = bool(pkru & 2) and (self.user or self.wp)
        return bool(pkru & 1) or (kind is Access.WRITE and no_write)


class Page:
    """A page of L2 with two paging-structure entries of its own: one above it, and its leaf.

    ``large``: it has 2 MiB, and lies where L1's memory begins; else 4 KiB. ``supervisor``: L2's
    code, stack and data lie in supervisor pages, where CR4.SMEP and CR4.SMAP allow them at CPL 0.
    """

    def __init__(
        self, guest: Guest, rules: Rules, *, large: bool = False, supervisor: bool = False
    ) -> None:
        self.guest, self.rules, self.large, self.supervisor = guest, rules, large, supervisor
        self.l1 = l1 = guest.l1
        directory, table, page = l1.alloc(), l1.alloc(), l1.alloc()
        l1.write(page, bytes([FILL]) * 4096)
        pointers = l1.sym("l2_pml4_pdpt")
        physical, _ = address_bits(l1)
        self.reserved = ((1 << 52) - 1) & -(1 << physical)
        #: Addresses of the two entries, and what they refer to.
        self.above, self.leaf = pointers + 8 * (LINEAR >> 30), directory
        self.table, self.frame = directory, 0
        self.linear = LINEAR + page
        if not large:
            l1.write_int(self.above, directory | ALL)
            self.above, self.leaf = directory, table
            self.table, self.frame = table, page
            self.linear = LINEAR
        #: Must be 0 in the leaf only: a 2 MiB page begins at a multiple of 2 MiB.
        self.reserved_in_leaf = self.reserved | (0x1FE000 if large else 0)
        if supervisor:
            self._write({pointers: l1.sym("l2_pml4_pd") | P | W})

    def __repr__(self) -> str:
        return f"<Page of L2 at {self.linear:#x}>"

    def _write(self, entries: dict[int, int]) -> None:
        """Let L1 write: KVM sees a guest's own writes to tables, not Python's."""
        for address, value in entries.items():
            # MOV [RDI], RAX
            assert self.l1.call(b"\x48\x89\x07", regs={"rdi": address, "rax": value}) == Succeed()

    def set(self, above: int, leaf: int) -> None:
        """Set the flags of both entries."""
        leaf |= LARGE * self.large
        regs = {
            **{"rdi": self.above, "rax": self.table | above},
            **{"rsi": self.leaf, "rbx": self.frame | leaf},
        }
        assert self.l1.call(b"\x48\x89\x07\x48\x89\x1e", regs=regs) == Succeed()

    def access(self, kind: Access, fields: dict[str, int], before: bytes = b"") -> Outcome:
        """Let L2 access the page; all page faults exit."""
        fields = {
            "EXCEPTION_BITMAP": 1 << Vector.PF,
            "PAGE_FAULT_ERROR_CODE_MASK": 0,
            "PAGE_FAULT_ERROR_CODE_MATCH": 0,
            **fields,
        }
        return self.guest.run(before + kind.value[1], {"rdi": self.linear, "rax": VALUE}, **fields)

    def wrong(
        self, kind: Access, above: int, leaf: int, seen: Outcome, offset: int = 0
    ) -> Iterator[str]:
        """What is wrong with an access: its outcome, or the flags of the entries behind it.

        ``offset`` is that of the access in L2's code.
        """
        entries = [self.l1.read_int(self.above), self.l1.read_int(self.leaf)]
        code = self.rules.error_code(kind, [above, leaf], self.reserved, self.reserved_in_leaf)
        what = f"{kind.name} above={above:#x} leaf={leaf:#x}"
        if code is None:
            if seen != Succeed():
                yield f"{what}: {seen}, expected no fault"
            dirty = D * (kind is Access.WRITE)
            # Where the leaf forbids writing, processors with CET never set it, others do.
            looked_at = A | D if leaf & W else A
            if entries[0] & A != A or entries[1] & looked_at != (A | dirty) & looked_at:
                yield f"{what}: flags behind it {entries[0] & 0xFFF:#x} {entries[1] & 0xFFF:#x}"
            return
        at = self.linear - self.guest.start if kind is Access.FETCH else offset
        expected = self.guest.exception(Vector.PF, code, offset=at, qualification=self.linear)
        if seen != expected:
            yield f"{what}: {seen}, expected {expected}"
        if entries[1] & D:
            yield f"{what}: dirty, although it faults"


def _cr(guest: Guest, rules: Rules) -> dict[str, int]:
    """The control registers, EFER and RFLAGS that make L2 obey the rules."""
    cr0 = guest.vmcs[Field.GUEST_CR0] & ~Cr0.WP | Cr0.WP * rules.wp
    cr4 = guest.vmcs[Field.GUEST_CR4] | Cr4.SMAP * rules.smap | Cr4.SMEP * rules.smep
    if rules.pkru is not None:
        cr4 |= Cr4.PKE
    return {"GUEST_CR0": cr0, "GUEST_CR4": cr4, "GUEST_RFLAGS": 0x2 | Rflags.AC * rules.ac}


def expect_model(
    page: Page, cases: Iterable[tuple[int, int]], fields: dict[str, int], before: bytes = b""
) -> None:
    """Try each access with each pair of entries."""
    wrong: list[str] = []
    # A CALL writes to L2's stack.
    no_stack = page.rules.smap and not page.supervisor
    kinds = [kind for kind in Access if kind is not Access.FETCH or not no_stack]
    for above, leaf in cases:
        for kind in kinds:
            page.set(above, leaf)
            seen = page.access(kind, fields, before)
            wrong += page.wrong(kind, above, leaf, seen, len(before))
    assert not wrong, "\n".join(wrong)


@CPLS
@SIZES
@pytest.mark.parametrize("wp", [True, False], ids=["WP", "no-WP"])
def test_rights_of_both_levels(l1: L1, cpl: int, large: bool, wp: bool) -> None:
    """An access needs its right at each level; CR0.WP decides for a supervisor's write."""
    guest = Guest(l1)
    guest.set_cpl(cpl)
    page = Page(guest, Rules(cpl == 3, wp), large=large)
    cases = [(ALL, leaf) for leaf in LEAVES] + [*itertools.product(ABOVE, (ALL, P))]
    expect_model(page, cases, _cr(guest, page.rules))


@CPLS
@SIZES
def test_reserved_bits(l1: L1, cpl: int, large: bool) -> None:
    """A reserved bit of a present entry is told as such, whatever the rights are."""
    guest = Guest(l1)
    guest.set_cpl(cpl)
    page = Page(guest, Rules(cpl == 3), large=large)
    bits = [1 << n for n in range(52) if page.reserved >> n & 1]
    if not bits:
        pytest.skip("needs a reserved address bit: MAXPHYADDR is 52")
    cases = [(ALL | bit, leaf) for bit in (bits[0], bits[-1]) for leaf in (ALL, P, W)]
    cases += [(ALL, leaf | bit) for bit in (bits[0], bits[-1]) for leaf in (ALL, P, W)]
    cases += [(P, ALL | bit) for bit in bits]
    cases += [(ALL, ALL | 1 << n) for n in range(13, 21) if large]
    expect_model(page, cases, _cr(guest, page.rules))


@CPLS
@pytest.mark.needs(EntryCtl.LOAD_EFER, ExitCtl.LOAD_EFER)
def test_execute_disable_without_nxe(l1: L1, cpl: int) -> None:
    """With IA32_EFER.NXE clear bit 63 is reserved, and no fault is told as one of a fetch."""
    guest = Guest(l1)
    guest.set_cpl(cpl)
    page = Page(guest, Rules(cpl == 3, nxe=False))
    guest.on(EntryCtl.LOAD_EFER, ExitCtl.LOAD_EFER)
    efer = guest.vmcs[Field.GUEST_IA32_EFER] & ~Efer.NXE
    cases = itertools.product((ALL, ALL | NX), (ALL, ALL | NX, P, P | NX, W))
    expect_model(page, cases, {"GUEST_IA32_EFER": efer, **_cr(guest, page.rules)})


@pytest.mark.needs(Cr4.SMAP)
@pytest.mark.parametrize("ac", [False, True], ids=["no-AC", "AC"])
def test_supervisor_accesses_to_user_pages(l1: L1, ac: bool) -> None:
    """With CR4.SMAP data of user pages is for a supervisor with RFLAGS.AC set only."""
    guest = Guest(l1)
    page = Page(guest, Rules(user=False, smap=True, ac=ac))
    expect_model(page, itertools.product((ALL, P | W), LEAVES), _cr(guest, page.rules))


@pytest.mark.needs(Cr4.SMEP)
@SIZES
@pytest.mark.parametrize("smap", [False, True], ids=["no-SMAP", "SMAP"])
def test_supervisor_l2_on_supervisor_pages(l1: L1, large: bool, smap: bool) -> None:
    """With CR4.SMEP a supervisor does not execute what lies in user pages."""
    if smap and not l1.caps.supports(Cr4.SMAP):
        pytest.skip("needs Cr4.SMAP")
    guest = Guest(l1)
    page = Page(guest, Rules(user=False, smep=True, smap=smap), large=large, supervisor=True)
    cases = itertools.product((ALL, P | W, ALL | NX), LEAVES)
    expect_model(page, cases, _cr(guest, page.rules))


@pytest.mark.needs(Cr4.SMEP, EntryCtl.LOAD_EFER, ExitCtl.LOAD_EFER)
def test_fetch_without_nxe(l1: L1) -> None:
    """With CR4.SMEP a fault is told as one of a fetch even if IA32_EFER.NXE is clear."""
    guest = Guest(l1, EntryCtl.LOAD_EFER, ExitCtl.LOAD_EFER)
    page = Page(guest, Rules(user=False, nxe=False, smep=True), supervisor=True)
    efer = guest.vmcs[Field.GUEST_IA32_EFER] & ~Efer.NXE
    cases = itertools.product((ALL, P | W), (ALL, ALL | NX, P, W))
    expect_model(page, cases, {"GUEST_IA32_EFER": efer, **_cr(guest, page.rules)})


@CPLS
@pytest.mark.parametrize("wp", [True, False], ids=["WP", "no-WP"])
def test_emulated_access(l1: L1, forced: bytes, cpl: int, wp: bool) -> None:
    """An access that KVM emulates meets the same faults: its emulator walks L2's tables too."""
    guest = Guest(l1)
    guest.set_cpl(cpl)
    page = Page(guest, Rules(cpl == 3, wp))
    cases = [(ALL, leaf) for leaf in LEAVES] + [*itertools.product(ABOVE, (ALL, P))]
    expect_model(page, cases, _cr(guest, page.rules), forced)


@CPLS
@pytest.mark.needs(Cr4.PKE)
@pytest.mark.sdm("Protection Keys")
@pytest.mark.parametrize("pkru", range(4), ids=["none", "AD", "WD", "AD-WD"])
def test_protection_key(l1: L1, cpl: int, pkru: int) -> None:
    """PKRU, which VMX does not switch, takes away data accesses to user pages of its key."""
    guest = Guest(l1)
    guest.set_cpl(cpl)
    page = Page(guest, Rules(cpl == 3, pkru=pkru))
    # PUSH RAX; XOR ECX, ECX; XOR EDX, EDX; MOV EAX, key 1; WRPKRU; POP RAX
    before = b"\x50\x31\xc9\x31\xd2\xb8" + (pkru << 2).to_bytes(4, "little")
    before += b"\x0f\x01\xef\x58"
    cases = itertools.product((ALL, P | W), [leaf | key for leaf in LEAVES for key in (0, KEY_1)])
    expect_model(page, cases, _cr(guest, page.rules), before)


# --- what is remembered of an entry, and what makes the processor forget it ---

#: Pairs of leaves: what L2 accessed before, and what the entry was changed to.
CHANGES = [(ALL | A | D, leaf) for leaf in (W | U, P | U, P | W, ALL | NX)]
CHANGES += [(leaf, ALL) for leaf in (W | U, P | U)]


@CPLS
@pytest.mark.parametrize("way", ["without-VPID", "INVLPG", "INVVPID", "new-VPID"])
@pytest.mark.sdm("Operations that Invalidate Cached Mappings")
def test_changed_entry(l1: L1, cpl: int, way: str) -> None:
    """After each way to invalidate a translation the entry as it is now decides."""
    guest = Guest(l1)
    rules = Rules(cpl == 3)
    page = Page(guest, rules)
    if way != "without-VPID":
        needed = [Proc2Ctl.ENABLE_VPID] + [EptVpidCap.INVVPID] * (way == "INVVPID")
        for flag in needed:
            if not l1.caps.supports(flag):
                pytest.skip(f"needs {flag!r}")
        guest.on(Proc2Ctl.ENABLE_VPID)
    vpid, wrong, registers = 1, [], _cr(guest, rules)
    for (first, then), kind in itertools.product(CHANGES, Access):
        if way != "without-VPID":
            guest.vmcs[Field.VIRTUAL_PROCESSOR_ID] = vpid
        guest.set_cpl(cpl)
        page.set(ALL, first)
        page.access(kind, registers)
        page.set(ALL, then)
        if way == "INVLPG":
            guest.set_cpl(0)
            assert guest.run(INVLPG, {"rdi": page.linear}) == Succeed()
            guest.set_cpl(cpl)
        elif way == "INVVPID":
            assert l1.invvpid(INDIVIDUAL_ADDRESS, vpid, page.linear) == Succeed()
        elif way == "new-VPID":
            vpid += 1
            guest.vmcs[Field.VIRTUAL_PROCESSOR_ID] = vpid
        seen = page.access(kind, registers)
        wrong += [f"from {first:#x}: {text}" for text in page.wrong(kind, ALL, then, seen)]
        # The next round starts without what this one left.
        vpid += way != "without-VPID"
    assert wrong == []
