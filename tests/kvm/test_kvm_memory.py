"""Guest memory on the host's side."""

import mmap
import os

import pytest

from kvmnest.kvm import Memory, SealedMemory
from kvmnest.kvm.memory import Image


def test_read_write_view() -> None:
    memory = Memory(0x2000)
    assert memory.read(0, 0x2000) == bytes(0x2000)
    memory.write(0x1FFC, b"abcd")
    memory.view[0:2] = b"xy"
    assert memory.read(0x1FFC, 4) == b"abcd"
    assert memory.read(0, 2) == b"xy"
    memory.write(5, memoryview(b"zz"))
    assert bytes(memory.view[5:7]) == b"zz"
    assert memory.address % 4096 == 0


@pytest.mark.parametrize("size", [0, -4096, 1, 4097])
def test_sizes(size: int) -> None:
    with pytest.raises(ValueError, match="is not a positive multiple of 0x1000"):
        Memory(size)


def test_bounds() -> None:
    memory = Memory(0x1000)
    with pytest.raises(IndexError, match=r"0xffe\.\.0x1002 are outside memory of 0x1000"):
        memory.write(0xFFE, b"1234")
    for offset, length in ((-1, 1), (0x1000, 1), (0, 0x1001), (0, -1)):
        with pytest.raises(IndexError):
            memory.read(offset, length)
    assert memory.read(0x1000, 0) == b""


def test_close() -> None:
    memory = Memory(0x1000)
    memory.close()
    memory.close()
    for use in (lambda: memory.read(0, 1), lambda: memory.write(0, b"1"), lambda: memory.address):
        with pytest.raises(ValueError, match="closed"):
            use()
    with pytest.raises(ValueError, match="released"):
        memory.view[0]


def test_close_with_a_slice_in_use() -> None:
    memory = Memory(0x1000)
    memory.write(0, b"keep")
    part = memory.view[0:4]
    memory.close()
    assert bytes(part) == b"keep"
    with pytest.raises(ValueError, match="closed"):
        memory.read(0, 1)


def test_an_image_comes_back_wherever_it_was_changed() -> None:
    """Also at the edges of pages and of the groups of pages that are compared at once."""
    content = bytes(range(256)) * 16 * 19  # two groups of eight pages, and three pages
    memory = Memory(0x20000)
    image = Image(memory, content)
    image.restore()
    assert memory.read(0, len(content)) == content
    behind = len(content)
    memory.write(behind, b"stays")
    places = (0, 0xFFF, 0x1000, 0x7FFF, 0x8000, 0xFFFF, 0x10000, behind - 1)
    for place in places:
        memory.write(place, bytes([content[place] ^ 0xFF]))
        image.restore()
        assert memory.read(0, len(content)) == content, hex(place)
    for place in places:
        memory.write(place, bytes([content[place] ^ 0xFF]))
    image.restore()
    assert memory.read(0, len(content)) == content
    assert memory.read(behind, 5) == b"stays"


def test_an_image_writes_nothing_that_is_as_it_should_be() -> None:
    """A page that nobody touched stays unmapped: it costs neither memory nor a fault."""
    memory = Memory(0x10000)
    memory.write(0x3000, b"x")
    Image(memory, bytes(0x8000)).restore()
    assert memory.read(0x3000, 1) == b"\0"
    start = memory.address // 4096 * 8
    with open("/proc/self/pagemap", "rb") as pagemap:
        pagemap.seek(start)
        entries = [int.from_bytes(pagemap.read(8), "little") for _ in range(16)]
    # Bit 56: mapped by this process alone. The zero page, which reading maps, is shared.
    assert [number for number, entry in enumerate(entries) if entry >> 56 & 1] == [3]


@pytest.mark.parametrize("length", [1, 0x1001, 0x3000])
def test_an_image_is_whole_pages_of_its_memory(length: int) -> None:
    with pytest.raises(ValueError, match="are not whole pages of 0x2000"):
        Image(Memory(0x2000), bytes(length))


def test_an_image_outlives_its_memory() -> None:
    memory = Memory(0x1000)
    image = Image(memory, bytes(0x1000))
    memory.close()
    image.restore()


def test_more_memory_than_there_is() -> None:
    with pytest.raises((OSError, OverflowError)):
        Memory(1 << 60)


def test_memory_that_nobody_refers_to_is_not_leaked() -> None:
    memory = SealedMemory(0x2000)
    memory.write(0x1FFC, b"abcd")
    assert memory.read(0x1FFC, 4) == b"abcd"
    assert not memory.leaked()


def test_a_reference_that_is_left_is_a_leak() -> None:
    """Somebody else has mapped the pages to write to them, as a host that forgot them would."""
    memory = SealedMemory(0x1000)
    numbers = [
        int(name)
        for name in os.listdir("/proc/self/fd")
        if os.path.realpath(f"/proc/self/fd/{name}").startswith("/memfd:kvmnest")
    ]
    other = mmap.mmap(numbers[0], 0x1000, flags=mmap.MAP_SHARED)
    assert memory.leaked()
    other.close()


def test_sealed_memory_has_whole_pages() -> None:
    with pytest.raises(ValueError, match="is not a positive multiple of 0x1000"):
        SealedMemory(4097)
