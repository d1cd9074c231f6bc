"""Guest memory on the host's side."""

import pytest

from kvmnest.kvm import Memory


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


def test_more_memory_than_there_is() -> None:
    with pytest.raises((OSError, OverflowError)):
        Memory(1 << 60)
