"""EPT paging structures as cases edit them, and accesses of L2 that go through them.

Entries and exit information: SDM, "The Extended Page Table Mechanism (EPT)" and "Exit
Qualification for EPT Violations".
"""

from __future__ import annotations

import enum
import struct

from kvmnest.l1 import L1
from kvmnest.suite.support.entries import address_bits
from kvmnest.suite.support.guest import NOT_VALID, Guest, Masked
from kvmnest.vmx import EptQualification, EptVpidCap, ExitReason, Field
from kvmnest.vmx.outcome import Exit, Outcome, Succeed

R, W, X = 1, 2, 4
RWX = R | W | X
#: Bits of an EPT entry.
LARGE, ACCESSED, DIRTY, WRITE_BACK = 1 << 7, 1 << 8, 1 << 9, 6 << 3
#: EPTP bit that enables the accessed and dirty flags.
ENABLE_AD = 1 << 6
#: Content of the window's pages: RET instructions, so that L2 can call any address of them.
FILL = 0xC3
VALUE = 0xC3C3C3C3C3C3C3C3
#: Bits of the exit qualification that are defined without mode-based execute control and
#: advanced information: the access, the permissions, linear address, NMI unblocking.
_DEFINED = 0x11BF
#: Bits 11:9: user-mode, writable and execute-disable linear address.
_LINEAR_RIGHTS = 0xE00
_SINGLE_CONTEXT = 1


class Access(enum.Enum):
    """An access of L2 to the address in RDI: (bit of the exit qualification, machine code)."""

    READ = (R, b"\x48\x8b\x07")  # MOV RAX, [RDI]
    WRITE = (W, b"\x48\x89\x07")  # MOV [RDI], RAX
    FETCH = (X, b"\xff\xd7")  # CALL RDI

    @property
    def bit(self) -> int:
        """The permission that the access needs, which is also its bit in the qualification."""
        return self.value[0]


class Window:
    """One GiB of L2's linear addresses, mapped by guest and EPT tables of its own.

    ``linear`` is mapped to guest-physical ``gpa`` by 2 MiB guest pages, and that by 4 KiB EPT
    pages to ``page``, L1's pages with the content ``FILL``. ``levels`` are the EPT levels (1 is
    the page table) whose entry ``entry(level)`` translates nothing else.
    """

    linear = 0x40000000

    def __init__(self, guest: Guest, *, pages: int = 1) -> None:
        self.guest, self.l1 = guest, guest.l1
        l1 = self.l1
        self.page = l1.alloc(pages)
        l1.write(self.page, bytes([FILL]) * 4096 * pages)
        physical, _ = address_bits(l1)
        wide = physical > 39
        self.gpa = 1 << 39 if wide else 1 << 30
        self.guest_pd = l1.alloc()
        self._table(self.guest_pd, [self.gpa + (n << 21) | 0xE7 for n in range(512)])
        l1.write_int(l1.sym("l2_pml4_pdpt") + 8, self.guest_pd | 7)
        pdpt, pd, pt = l1.alloc(), l1.alloc(), l1.alloc()
        self._table(pt, [self.page + 4096 * n | WRITE_BACK | RWX for n in range(pages)])
        self._table(pd, [pt | RWX])
        if wide:
            self._table(pdpt, [pd | RWX])
            l1.write_int(l1.sym("ept_pml4") + 8, pdpt | RWX)
            self._entries = {4: l1.sym("ept_pml4") + 8, 3: pdpt, 2: pd, 1: pt}
        else:
            l1.write_int(l1.sym("ept_pml4_pdpt") + 8, pd | RWX)
            self._entries = {3: l1.sym("ept_pml4_pdpt") + 8, 2: pd, 1: pt}
        self.levels = tuple(sorted(self._entries))

    def __repr__(self) -> str:
        return f"<Window of L2 at {self.linear:#x}>"

    def _table(self, address: int, entries: list[int]) -> None:
        self.l1.write(address, struct.pack(f"<{len(entries)}Q", *entries))

    # --- EPT entries ---

    def entry(self, level: int) -> int:
        """Address of the EPT entry of a level that translates the first page."""
        return self._entries[level]

    def get(self, level: int) -> int:
        """Content of that entry."""
        return self.l1.read_int(self.entry(level))

    def set(self, level: int, value: int) -> None:
        """Change that entry; ``invalidate`` makes the processor forget what it had cached."""
        poke(self.l1, self.entry(level), value)

    def allow(self, level: int, rights: int) -> None:
        """Set the permissions in that entry."""
        self.set(level, self.get(level) & ~RWX | rights)

    def invalidate(self) -> None:
        """INVEPT, single context."""
        invalidate(self.guest)

    # --- guest paging structures ---

    def guest_page_table(self) -> int:
        """Map the window's first 2 MiB by 4 KiB guest pages; the guest page table's address."""
        table = self.l1.alloc()
        self._table(table, [self.gpa + (n << 12) | 0x67 for n in range(512)])
        poke(self.l1, self.guest_pd, table | 7)
        return table

    # --- accesses ---

    def access(self, kind: Access, offset: int = 0) -> Outcome:
        """Let L2 access an offset of the window."""
        regs = {"rdi": self.linear + offset, "rax": VALUE}
        return self.guest.run(kind.value[1], regs)

    def violation(
        self, kind: Access, allowed: int, offset: int = 0, known: Masked | None = None
    ) -> Exit:
        """The EPT violation of an access where the entries together allow ``allowed``.

        ``known`` is the exit qualification where it says something else of the access.
        """
        linear = self.linear + offset
        if known is None:
            known = with_linear_rights(self.l1, qualification(kind.bit, allowed))
        return Exit(
            ExitReason.EPT_VIOLATION,
            qualification=known,
            rip=linear if kind is Access.FETCH else self.guest.at(),
            intr_info=NOT_VALID,
            idt_info=NOT_VALID,
            linear=linear,
            physical=self.gpa + offset,
        )

    def misconfiguration(self, kind: Access, offset: int = 0) -> Exit:
        """The EPT misconfiguration that an access meets."""
        return Exit(
            ExitReason.EPT_MISCONFIG,
            rip=self.linear + offset if kind is Access.FETCH else self.guest.at(),
            intr_info=NOT_VALID,
            idt_info=NOT_VALID,
            physical=self.gpa + offset,
        )


def poke(l1: L1, address: int, value: int) -> None:
    """Let L1 write 64 bits: KVM sees a guest's own writes to paging structures, not Python's."""
    assert l1.call(b"\x48\x89\x07", regs={"rdi": address, "rax": value}) == Succeed()


def qualification(
    access: int, allowed: int, *, translated: bool = True, undefined: int = 0
) -> Masked:
    """Exit qualification of an EPT violation; ``undefined`` bits are left out."""
    value = access | allowed << 3
    value |= EptQualification(linear_valid=True, translated=translated).encode()
    return Masked(value, _DEFINED & ~undefined)


def with_linear_rights(
    l1: L1, known: Masked, *, user: bool = True, writable: bool = True, no_execute: bool = False
) -> Masked:
    """Add what advanced VM-exit information says of the linear address, if L1 is offered it.

    ``user``, ``writable`` and ``no_execute`` are what L2's own paging structures allow; the pages
    of the payload and of ``Window`` are the default. Without it bits 11:9 are undefined.
    """
    if not l1.caps.supports(EptVpidCap.ADVANCED_EXIT_INFO):
        return known
    bits = EptQualification(
        linear_user=user, linear_writable=writable, linear_execute_disable=no_execute
    ).encode()
    return Masked(known.value | bits, known.mask | _LINEAR_RIGHTS)


def invalidate(guest: Guest) -> None:
    """INVEPT, single context, of the guest's EPT pointer."""
    assert guest.l1.invept(_SINGLE_CONTEXT, guest.vmcs[Field.EPT_POINTER]) == Succeed()


def identity_entry(l1: L1, address: int) -> int:
    """Address of the EPT page-table entry that maps a page of RAM one to one."""
    return l1.sym("ept_pml4_pt") + 8 * (address >> 12)


def preset_flags(l1: L1) -> None:
    """Set the accessed and dirty flags in all entries of the one-to-one EPT tables."""
    set_everywhere(l1, ACCESSED | DIRTY)


def set_everywhere(l1: L1, bits: int) -> None:
    """Set bits in all present entries of the one-to-one EPT tables."""
    start, end = l1.sym("ept_pml4"), l1.sym("ept_pml4_pt") + 8 * (l1.sym("RAM_SIZE") >> 12)
    count = (end - start) // 8
    entries = struct.unpack(f"<{count}Q", l1.read(start, end - start))
    flagged = [entry | bits if entry else 0 for entry in entries]
    l1.write(start, struct.pack(f"<{count}Q", *flagged))
