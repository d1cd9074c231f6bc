"""IN and OUT of L2: the I/O bitmaps decide; what L1 does not want reaches KVM's user."""

import pytest

from kvmnest.kvm.exits import IO_IN, IO_OUT, IoExit
from kvmnest.l1 import L1
from kvmnest.suite.support.bitmaps import set_all_io_bits, set_io_bitmaps
from kvmnest.suite.support.guest import Guest
from kvmnest.vmx import ExitReason, Field, IoQualification, ProcCtl, Rflags, Vector
from kvmnest.vmx.outcome import Exit, Fault, HostExit, Outcome, Succeed

pytestmark = [
    pytest.mark.series(19),
    pytest.mark.sdm("I/O-Bitmap Addresses"),
    pytest.mark.needs(ProcCtl.USE_IO_BITMAPS, ProcCtl.UNCONDITIONAL_IO_EXITING),
]

OUT_DX = {1: b"\xee", 2: b"\x66\xef", 4: b"\xef"}
IN_DX = {1: b"\xec", 2: b"\x66\xed", 4: b"\xed"}
VALUE = 0x44332211


def _out(guest: Guest, port: int, size: int = 1) -> Outcome:
    return guest.run(OUT_DX[size], {"rdx": port, "rax": VALUE})


def _io_exit(guest: Guest, port: int, size: int = 1, *, read: bool = False) -> Exit:
    code = (IN_DX if read else OUT_DX)[size]
    qualification = IoQualification(size=size, input=read, port=port).encode()
    return guest.exit(ExitReason.IO_INSTRUCTION, len(code), qualification=qualification)


def _to_user(port: int, size: int = 1) -> HostExit:
    return HostExit(IoExit(IO_OUT, size, port, 1, VALUE.to_bytes(4, "little")[:size]))


def expect_exit(guest: Guest, port: int, size: int = 1) -> None:
    """OUT and IN of this port exit to L1, and nothing reaches userspace or L2's registers."""
    seen = _out(guest, port, size)
    assert seen == _io_exit(guest, port, size), f"OUT of {size} bytes to {port:#x}"
    assert guest.changed(seen) == {}
    seen = guest.run(IN_DX[size], {"rdx": port})
    assert seen == _io_exit(guest, port, size, read=True), f"IN of {size} bytes from {port:#x}"
    assert guest.changed(seen) == {}


def expect_no_exit(guest: Guest, port: int, size: int = 1) -> None:
    """OUT of this port goes past L1 to userspace, and L2 then goes on."""
    assert _out(guest, port, size) == _to_user(port, size), f"OUT of {size} bytes to {port:#x}"
    seen = guest.resume()
    assert seen == Succeed()
    assert guest.changed(seen) == {}


@pytest.mark.parametrize("port", [0, 0x80, 0x7FFF, 0x8000, 0xCF8, 0xFFFF], ids=hex)
def test_one_bit(l1: L1, port: int) -> None:
    """A single bit makes its port exit and neither neighbour: A has 0-7FFFH, B the rest."""
    guest = Guest(l1, ProcCtl.USE_IO_BITMAPS)
    set_io_bitmaps(l1, [port])
    expect_exit(guest, port)
    for other in {(port - 1) & 0xFFFF, (port + 1) & 0xFFFF, port ^ 0x8000}:
        expect_no_exit(guest, other)


@pytest.mark.parametrize("size", [2, 4], ids=["16-bit", "32-bit"])
@pytest.mark.parametrize("port", [0x40, 0x8000, 0xFFFE], ids=hex)
def test_any_byte_of_an_access(l1: L1, port: int, size: int) -> None:
    """A wider access exits when the bit of any byte is 1, also across the two bitmaps."""
    guest = Guest(l1, ProcCtl.USE_IO_BITMAPS)
    set_io_bitmaps(l1, [port])
    for first in range(port - size + 1, port + 1):
        if first + size <= 0x10000:
            expect_exit(guest, first, size)
    expect_no_exit(guest, port - size, size)
    if port + size < 0x10000:
        expect_no_exit(guest, port + 1, size)


def test_wrap_around(l1: L1) -> None:
    """An access beyond port FFFFH exits whatever the bitmaps hold."""
    guest = Guest(l1, ProcCtl.USE_IO_BITMAPS)
    set_io_bitmaps(l1, [])
    for port, size in ((0xFFFF, 2), (0xFFFF, 4), (0xFFFE, 4), (0xFFFD, 4)):
        expect_exit(guest, port, size)
    for port, size in ((0xFFFF, 1), (0xFFFE, 2), (0xFFFC, 4)):
        expect_no_exit(guest, port, size)


def test_all_bits(l1: L1) -> None:
    """With all bits 1 every port exits; the bitmaps are read from memory at each access."""
    guest = Guest(l1, ProcCtl.USE_IO_BITMAPS)
    set_all_io_bits(l1)
    for port in (0, 1, 0x7FFF, 0x8000, 0xE8, 0xFFFF):
        expect_exit(guest, port)
    # No VMWRITE in between: only the memory changes.
    l1.write(l1.sym("io_bitmap_a"), bytes(0x1000))
    expect_no_exit(guest, 0x7FFF)
    expect_exit(guest, 0x8000)
    expect_exit(guest, 0x7FFF, 2)


def test_neither_control(l1: L1) -> None:
    """With both controls 0 nothing exits: the bitmap addresses are not looked at."""
    guest = Guest(l1)
    set_all_io_bits(l1)
    for port in (0, 0x7FFF, 0x8000, 0xFFFF):
        expect_no_exit(guest, port)
    guest.vmcs[Field.IO_BITMAP_A] = guest.vmcs[Field.IO_BITMAP_B] = 0x123
    expect_no_exit(guest, 0x80, 4)


@pytest.mark.sdm("Instructions That Cause VM Exits Conditionally")
def test_unconditional_exiting(l1: L1) -> None:
    """With "unconditional I/O exiting" alone every access exits."""
    guest = Guest(l1, ProcCtl.UNCONDITIONAL_IO_EXITING)
    set_io_bitmaps(l1, [])
    for port in (0, 0x7FFF, 0x8000, 0xFFFF):
        expect_exit(guest, port)
    expect_exit(guest, 0x60, 2)
    expect_exit(guest, 0xCFC, 4)


@pytest.mark.sdm("Instructions That Cause VM Exits Conditionally")
def test_bitmaps_win_over_unconditional(l1: L1) -> None:
    """With both controls 1 the bitmaps decide and "unconditional I/O exiting" is ignored."""
    guest = Guest(l1, ProcCtl.USE_IO_BITMAPS, ProcCtl.UNCONDITIONAL_IO_EXITING)
    set_io_bitmaps(l1, [0x81])
    expect_no_exit(guest, 0x80)
    expect_exit(guest, 0x81)
    expect_exit(guest, 0x80, 2)
    expect_no_exit(guest, 0x8000, 4)


@pytest.mark.sdm("Exit Qualification for I/O Instructions")
def test_immediate_port(l1: L1) -> None:
    """The qualification tells an immediate port from DX; the port is right either way."""
    guest = Guest(l1, ProcCtl.UNCONDITIONAL_IO_EXITING)
    forms = {
        b"\xe6\xfe": (1, False),  # OUT imm8, AL
        b"\x66\xe7\xfe": (2, False),
        b"\xe7\xfe": (4, False),
        b"\xe4\xfe": (1, True),  # IN AL, imm8
        b"\x66\xe5\xfe": (2, True),
        b"\xe5\xfe": (4, True),
    }
    for form, (size, read) in forms.items():
        seen = guest.run(form, {"rdx": 0x1234})
        qualification = IoQualification(size, read, 0xFE, immediate=True).encode()
        assert seen == guest.exit(
            ExitReason.IO_INSTRUCTION, len(form), qualification=qualification
        ), form.hex()
        assert guest.changed(seen) == {}


def test_input_reaches_l2(l1: L1) -> None:
    """IN that L1 does not want gets its value from userspace, in the right part of RAX."""
    guest = Guest(l1)
    for size, result in ((1, 0x01010101010101A5), (2, 0x010101010101B4A5), (4, 0xD2C3B4A5)):
        seen = guest.run(IN_DX[size], {"rdx": 0x8001})
        assert seen == HostExit(IoExit(IO_IN, size, 0x8001, 1, b""))
        l1.vcpu.set_io_data(b"\xa5\xb4\xc3\xd2"[:size])
        seen = guest.resume()
        assert seen == Succeed()
        assert guest.changed(seen, "rdx") == {"rax": result}


@pytest.mark.sdm("Relative Priority of Faults and VM Exits")
def test_permission_of_the_tss_comes_first(l1: L1) -> None:
    """#GP of the I/O permission bitmap in the TSS comes before the VM exit; IOPL lifts it."""
    guest = Guest(l1, ProcCtl.UNCONDITIONAL_IO_EXITING)
    guest.set_cpl(3)
    assert _out(guest, 0x80) == Fault(Vector.GP, error_code=0, rip=0)
    seen = guest.run(OUT_DX[1], {"rdx": 0x80}, GUEST_RFLAGS=0x2 | Rflags.IOPL)
    assert seen == _io_exit(guest, 0x80)
    # The same with bitmaps.
    guest.on(ProcCtl.USE_IO_BITMAPS)
    set_io_bitmaps(l1, [0x80])
    assert _out(guest, 0x80) == Fault(Vector.GP, error_code=0, rip=0)
    seen = guest.run(OUT_DX[1], {"rdx": 0x80}, GUEST_RFLAGS=0x2 | Rflags.IOPL)
    assert seen == _io_exit(guest, 0x80)
