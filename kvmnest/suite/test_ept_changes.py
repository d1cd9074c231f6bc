"""EPT entries and memory slots that change under an L2 that has used them."""

from __future__ import annotations

import pytest

from kvmnest.kvm import Memory
from kvmnest.kvm.exits import MmioExit
from kvmnest.l1 import L1
from kvmnest.suite.support.ept import LARGE, RWX, VALUE, WRITE_BACK, Access, R, Window
from kvmnest.suite.support.guest import Guest
from kvmnest.vmx import EptVpidCap, Proc2Ctl
from kvmnest.vmx.outcome import HostExit, Succeed

pytestmark = [
    pytest.mark.series(24),
    pytest.mark.needs(Proc2Ctl.ENABLE_EPT),
    pytest.mark.sdm("Caching Translation Information"),
]

#: A guest-physical address without memory, and one for a memory slot of the case.
NOWHERE = 0x10000000
SLOT, MOVED, NUMBER = 0x20000000, 0x20400000, 7
LARGE_SIZE = 1 << 21


def _store(window: Window, value: int, offset: int = 0) -> object:
    return window.guest.run(Access.WRITE.value[1], {"rdi": window.linear + offset, "rax": value})


def _load(window: Window, offset: int = 0) -> object:
    seen = window.guest.run(Access.READ.value[1], {"rdi": window.linear + offset})
    return seen.regs["rax"] if isinstance(seen, Succeed) else seen


def _is_mmio(seen: object, address: int) -> bool:
    return (
        isinstance(seen, HostExit)
        and isinstance(seen.exit, MmioExit)
        and (seen.exit.phys_addr == address)
    )


def _again(l1: L1) -> None:
    """Take all of L1's memory away and give it back, which drops KVM's translations of it."""
    if not l1.nested_roundtrip:
        l1.vm.remove_memory(0)
        l1.vm.add_memory(0, 0, l1.memory)


@pytest.mark.parametrize("before", ["read-only", "all"])
def test_memory_becomes_nothing(l1: L1, before: str) -> None:
    """The host changes an EPT entry in use from memory to none: L2's next fault is MMIO there.

    Without INVEPT a processor may use the old entry as long as it allows the access; a write
    that it does not allow is a fault, for which KVM reads the new entry.
    """
    window = Window(Guest(l1))
    good = window.get(1)
    if before == "read-only":
        window.allow(1, R)
        window.invalidate()
    assert _load(window) == VALUE
    nothing = NOWHERE | WRITE_BACK | RWX
    if before == "all":
        window.set(1, nothing)
        window.invalidate()
    else:
        # Not L1 but somebody whom KVM does not see writes to the entry: the host's userspace.
        l1.write_int(window.entry(1), nothing)
    assert _is_mmio(_store(window, 0x1234), NOWHERE)
    assert window.guest.resume() == Succeed()
    window.set(1, good)
    window.invalidate()
    assert _store(window, 0x1234) == Succeed()
    assert l1.read_int(window.page) == 0x1234
    _again(l1)
    assert _load(window) == 0x1234


@pytest.mark.needs(EptVpidCap.PAGE_2MB)
@pytest.mark.parametrize("invept", [False, True], ids=["", "INVEPT"])
def test_large_page_becomes_a_table(l1: L1, invept: bool) -> None:
    """A 2-MiB entry that the host changes into a table, and back: never one for the other."""
    if l1.nested_roundtrip:
        pytest.skip("a VM that replaces another one has no such memory slot")
    window = Window(Guest(l1))
    table = window.get(2)
    # The frame of the large page is a page table's content at the same time.
    memory, frame = Memory(LARGE_SIZE), SLOT
    l1.vm.add_memory(NUMBER, frame, memory)
    memory.write(0, b"\x55" * 8)
    window.set(2, frame | LARGE | WRITE_BACK | RWX)
    window.invalidate()
    assert _load(window) == 0x5555555555555555
    assert _store(window, 0x6666) == Succeed()
    # The same frame as a table, whose entry 1 maps a page.
    page = l1.alloc()
    l1.write_int(page, 0x7777)
    memory.write(8, (page | WRITE_BACK | RWX).to_bytes(8, "little"))
    l1.write_int(window.entry(2), frame | RWX)
    if invept:
        window.invalidate()
        assert _load(window, 4096) == 0x7777
        assert _store(window, 0x8888, 4096) == Succeed()
        assert l1.read_int(page) == 0x8888
    else:
        _store(window, 0x8888, 4096)
    _again(l1)
    window.set(2, table)
    window.invalidate()
    assert _load(window) == VALUE
    assert memory.read(0, 2) == b"\x66\x66"
    l1.vm.remove_memory(NUMBER)
    memory.close()


#: What a directory's entry can name: large pages or page tables, in two frames each.
_NAMED = ("large", "other-large", "table", "other-table", "table-in-large")


@pytest.mark.needs(EptVpidCap.PAGE_2MB)
@pytest.mark.parametrize("invept", [False, True], ids=["", "INVEPT"])
@pytest.mark.parametrize("before", _NAMED)
def test_entry_of_a_directory_changes(l1: L1, before: str, invept: bool) -> None:
    """The host makes a directory's entry name something else: L2 has that after INVEPT.

    Without INVEPT an access before may go to either. Then the memory goes, which shows what KVM
    keeps of the entry before.
    """
    if l1.nested_roundtrip:
        pytest.skip("a VM that replaces another one has no such memory slot")
    window = Window(Guest(l1))
    memory, tables, pages = Memory(2 * LARGE_SIZE), l1.alloc(2), l1.alloc(3)
    large = LARGE | WRITE_BACK | RWX
    entries = {
        "large": SLOT | large,
        "other-large": SLOT + LARGE_SIZE | large,
        "table": tables | RWX,
        "other-table": tables + 4096 | RWX,
        "table-in-large": SLOT | RWX,
    }
    for number, (name, table) in enumerate(zip(_NAMED[2:], (tables, tables + 4096), strict=False)):
        for index in (0, 1, 2):
            l1.write_int(table + 8 * index, pages + 4096 * number | WRITE_BACK | RWX)
        l1.write_int(pages + 4096 * number, _NAMED.index(name))
    inside = pages + 2 * 4096 | WRITE_BACK | RWX
    memory.write(0, inside.to_bytes(8, "little") * 3)
    l1.write_int(pages + 2 * 4096, _NAMED.index("table-in-large"))
    for after in _NAMED:
        l1.vm.add_memory(NUMBER, SLOT, memory)
        memory.write(4096, bytes([_NAMED.index("large"), *bytes(7)]))
        memory.write(LARGE_SIZE + 4096, bytes([_NAMED.index("other-large"), *bytes(7)]))
        window.set(2, entries[before])
        window.invalidate()
        assert _load(window, 4096) == _NAMED.index(before)
        l1.write_int(window.entry(2), entries[after])
        if invept:
            window.invalidate()
        assert _store(window, 0x55, 2 * 4096 + 8) == Succeed(), after
        window.invalidate()
        assert _load(window, 4096) == _NAMED.index(after), after
        l1.vm.remove_memory(NUMBER)
        _again(l1)
    memory.close()


def test_table_becomes_another_table(l1: L1) -> None:
    """The host changes an entry from one table to another: what this one maps is in no other.

    A second entry leads to the first table, and L2 has used both: what KVM keeps of the first
    table stays in use.
    """
    window = Window(Guest(l1))
    second = window.entry(2) + 8
    l1.write_int(second, window.get(2))
    assert (_load(window), _load(window, LARGE_SIZE)) == (VALUE, VALUE)
    page, table = l1.alloc(), l1.alloc()
    l1.write_int(page, 0x7777)
    l1.write_int(table, window.get(1))
    l1.write_int(table + 8, page | WRITE_BACK | RWX)
    l1.write_int(window.entry(2), table | RWX)
    window.invalidate()
    assert _load(window, 4096) == 0x7777
    seen = window.access(Access.READ, LARGE_SIZE + 4096)
    assert seen == window.violation(Access.READ, 0, LARGE_SIZE + 4096)


def test_memory_slot_changes(l1: L1) -> None:
    """A memory slot that is removed, replaced or moved under L2 is gone for it at once."""
    if l1.nested_roundtrip:
        pytest.skip("a VM that replaces another one has no such memory slot")
    window = Window(Guest(l1))
    first, second = Memory(4096), Memory(4096)
    first.write(0, b"\x11" * 8)
    second.write(0, b"\x22" * 8)
    l1.vm.add_memory(NUMBER, SLOT, first)
    window.set(1, SLOT | WRITE_BACK | RWX)
    window.invalidate()
    assert _load(window) == 0x1111111111111111
    assert _store(window, 0x33) == Succeed()
    assert first.read(0, 1) == b"\x33"
    l1.vm.remove_memory(NUMBER)
    assert _is_mmio(_store(window, 0x44), SLOT)
    assert window.guest.resume() == Succeed()
    assert first.read(0, 1) == b"\x33"
    l1.vm.add_memory(NUMBER, SLOT, second)
    assert _load(window) == 0x2222222222222222
    assert _store(window, 0x55) == Succeed()
    assert (first.read(0, 1), second.read(0, 1)) == (b"\x33", b"\x55")
    l1.vm.add_memory(NUMBER, MOVED, second)
    assert _is_mmio(_store(window, 0x66), SLOT)
    assert window.guest.resume() == Succeed()
    window.set(1, MOVED | WRITE_BACK | RWX)
    window.invalidate()
    assert _store(window, 0x77) == Succeed()
    assert second.read(0, 1) == b"\x77"
    l1.vm.remove_memory(NUMBER)
    first.close()
    second.close()


def test_read_only_slot(l1: L1) -> None:
    """A memory slot that becomes read-only under L2: reads go on, a write is userspace's."""
    if l1.nested_roundtrip:
        pytest.skip("a VM that replaces another one has no such memory slot")
    window = Window(Guest(l1))
    memory = Memory(4096)
    l1.vm.add_memory(NUMBER, SLOT, memory)
    window.set(1, SLOT | WRITE_BACK | RWX)
    window.invalidate()
    assert _store(window, 0x33) == Succeed()
    l1.vm.remove_memory(NUMBER)
    l1.vm.add_memory(NUMBER, SLOT, memory, read_only=True)
    assert _load(window) == 0x33
    assert _is_mmio(_store(window, 0x44), SLOT)
    assert window.guest.resume() == Succeed()
    assert memory.read(0, 1) == b"\x33"
    l1.vm.remove_memory(NUMBER)
    memory.close()
