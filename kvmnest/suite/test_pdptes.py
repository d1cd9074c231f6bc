"""The four PDPTEs of an L2 with PAE paging and EPT: loaded, changed by L2, saved, restored."""

from __future__ import annotations

import pytest

from kvmnest.kvm import exits
from kvmnest.l1 import L1, L2Mode, code
from kvmnest.suite.support.guest import Guest
from kvmnest.vmx import Cr0, Field, Proc2Ctl, ProcCtl
from kvmnest.vmx.outcome import HostExit, Succeed

pytestmark = [
    pytest.mark.series(24),
    pytest.mark.needs(Proc2Ctl.ENABLE_EPT),
    pytest.mark.sdm("Loading Page-Directory-Pointer-Table Entries"),
]

PDPTES = (Field.GUEST_PDPTR0, Field.GUEST_PDPTR1, Field.GUEST_PDPTR2, Field.GUEST_PDPTR3)
#: PDPTE 1 translates 1 to 2 GiB, which L2's own tables leave out.
LINEAR = 0x40000000
PRESENT, LARGE = 1, 0xE7
#: MOV EAX, [ESI], in front of MOV to CR3 or CR0, and behind it.
LOAD = b"\x8b\x06"
MOV_CR3, MOV_CR0 = b"\x0f\x22\xd9", b"\x0f\x22\xc1"  # MOV CR3, ECX; MOV CR0, ECX
OUT_80 = code.out8(0x80)


def _table(l1: L1, content: int) -> tuple[int, list[int]]:
    """A PDPT like L2's own, with a directory for ``LINEAR`` whose page begins with ``content``.

    Returns its address and its four entries.
    """
    first = l1.read_int(l1.sym("l2_pae_pdpt"))
    last = l1.read_int(l1.sym("l2_pae_pdpt") + 24)
    table, directory, pages, page = l1.alloc(), l1.alloc(), l1.alloc(), l1.alloc()
    l1.write_int(page, content)
    l1.write_int(directory, pages | 7)
    l1.write_int(pages, page | 7)
    entries = [first, directory | PRESENT, 0, last]
    for number, entry in enumerate(entries):
        l1.write_int(table + 8 * number, entry)
    return table, entries


def _guest(l1: L1) -> tuple[Guest, int, list[int]]:
    guest = Guest(l1, mode=L2Mode.PAE, ept=True)
    guest.off(ProcCtl.CR3_LOAD_EXITING, ProcCtl.CR3_STORE_EXITING)
    table, entries = _table(l1, 0x1111)
    guest.vmcs[Field.GUEST_CR3] = table
    for field, entry in zip(PDPTES, entries, strict=True):
        guest.vmcs[field] = entry
    return guest, table, entries


def test_entry_loads_the_fields(l1: L1) -> None:
    """VM entry takes the PDPTEs from the VMCS, not from memory, and the exit saves them."""
    guest, table, entries = _guest(l1)
    l1.write_int(table + 8, 0)
    seen = guest.run(LOAD, {"rsi": LINEAR})
    assert seen == Succeed()
    assert seen.regs["rax"] & 0xFFFFFFFF == 0x1111
    assert guest.vmcs.read(*PDPTES) == tuple(entries)


@pytest.mark.parametrize("moved", ["", "userspace", "moved"])
def test_mov_to_cr3(l1: L1, moved: str) -> None:
    """MOV to CR3 loads all four from memory; L2 uses them, and the exit saves them."""
    guest, _, _ = _guest(l1)
    other, entries = _table(l1, 0x2222)
    stop = OUT_80 if moved else b""
    seen = guest.run(MOV_CR3 + stop + LOAD, {"rsi": LINEAR, "rcx": other})
    if moved:
        assert isinstance(seen, HostExit)
        assert isinstance(l1.vcpu.run(immediate_exit=True), exits.IntrExit)
        if moved == "moved":
            l1.round_trip()
        seen = guest.resume()
    assert seen == Succeed()
    assert seen.regs["rax"] & 0xFFFFFFFF == 0x2222
    assert guest.vmcs.read(Field.GUEST_CR3, *PDPTES) == (other, *entries)


@pytest.mark.sdm("PDPTE Registers")
def test_mov_to_cr0(l1: L1) -> None:
    """MOV to CR0 that changes CD or NW loads the four from memory."""
    guest, table, entries = _guest(l1)
    changed = _table(l1, 0x3333)[1]
    l1.write_int(table + 8, changed[1])
    cr0 = guest.vmcs[Field.GUEST_CR0]
    seen = guest.run(MOV_CR0 + LOAD, {"rsi": LINEAR, "rcx": cr0 ^ Cr0.CD})
    assert seen == Succeed()
    assert seen.regs["rax"] & 0xFFFFFFFF == 0x3333
    assert guest.vmcs.read(*PDPTES) == (entries[0], changed[1], 0, entries[3])


def test_memory_alone_changes_nothing(l1: L1) -> None:
    """A write to the table is no load of PDPTEs, nor is a VM exit or an entry."""
    guest, table, entries = _guest(l1)
    store = b"\x89\x0f"  # MOV [EDI], ECX
    seen = guest.run(store + OUT_80 + LOAD, {"rsi": LINEAR, "rdi": table + 8, "rcx": 0})
    assert isinstance(seen, HostExit)
    seen = guest.resume()
    assert seen == Succeed()
    assert seen.regs["rax"] & 0xFFFFFFFF == 0x1111
    assert guest.vmcs.read(*PDPTES) == tuple(entries)
    seen = guest.run(LOAD, {"rsi": LINEAR})
    assert seen == Succeed()
    assert seen.regs["rax"] & 0xFFFFFFFF == 0x1111
