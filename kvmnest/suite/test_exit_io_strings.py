"""INS and OUTS of L2: qualification, linear address and instruction information."""

import pytest

from kvmnest.kvm.exits import IO_IN, IO_OUT, IoExit
from kvmnest.l1 import L1, L2Mode
from kvmnest.suite.support.bitmaps import set_io_bitmaps
from kvmnest.suite.support.guest import Guest, Masked
from kvmnest.vmx import BasicCap, ExitReason, Field, IoQualification, Proc2Ctl, ProcCtl, Vector
from kvmnest.vmx.outcome import Fault, HostExit, Succeed

pytestmark = [
    pytest.mark.series(19),
    pytest.mark.sdm("VM-Exit Instruction Information as Used for INS and OUTS"),
    pytest.mark.needs(ProcCtl.UNCONDITIONAL_IO_EXITING, BasicCap.INS_OUTS_INFO),
]

PORT = 0x3F8
ES, CS, SS, DS, FS, GS = range(6)
#: Opcode and element size.
STRINGS = {
    "INSB": (b"\x6c", 1),
    "INSW": (b"\x66\x6d", 2),
    "INSD": (b"\x6d", 4),
    "OUTSB": (b"\x6e", 1),
    "OUTSW": (b"\x66\x6f", 2),
    "OUTSD": (b"\x6f", 4),
}


def _info(address_size: int, segment: int | None) -> Masked:
    """Only the address size is defined for INS, also the segment for OUTS."""
    size = {16: 0, 32: 1, 64: 2}[address_size] << 7
    if segment is None:
        return Masked(size, 7 << 7)
    return Masked(size | segment << 15, 7 << 7 | 7 << 15)


@pytest.mark.parametrize("name", STRINGS)
def test_string(l1: L1, name: str) -> None:
    """The exit comes before any element is moved, and tells where the data would be."""
    guest = Guest(l1, ProcCtl.UNCONDITIONAL_IO_EXITING)
    opcode, size = STRINGS[name]
    read = name.startswith("IN")
    data = l1.sym("l2_data")
    index = "rdi" if read else "rsi"
    for rep in (b"", b"\xf3"):
        regs = {"rdx": PORT, index: data + 8, "rcx": 3}
        seen = guest.run(rep + opcode, regs)
        qualification = IoQualification(size, read, PORT, string=True, rep=bool(rep)).encode()
        assert seen == guest.exit(
            ExitReason.IO_INSTRUCTION,
            len(rep + opcode),
            qualification=qualification,
            info=_info(64, None if read else DS),
            linear=data + 8,
        )
        assert guest.changed(seen) == {}


def test_segment_override(l1: L1) -> None:
    """OUTS reports the segment it uses, and the linear address has its base added."""
    guest = Guest(l1, ProcCtl.UNCONDITIONAL_IO_EXITING)
    data = l1.sym("l2_data")
    prefixes = {ES: b"\x26", CS: b"\x2e", SS: b"\x36", DS: b"\x3e", FS: b"\x64", GS: b"\x65"}
    bases = {FS: 0x100, GS: 0x200}
    qualification = IoQualification(1, False, PORT, string=True).encode()
    for segment, prefix in prefixes.items():
        seen = guest.run(
            *(prefix + b"\x6e", {"rdx": PORT, "rsi": data}),
            GUEST_FS_BASE=0x100,
            GUEST_GS_BASE=0x200,
        )
        # In 64-bit mode ES, CS, SS and DS have no base; which of them is reported is theirs.
        info = _info(64, segment) if segment in bases else Masked(2 << 7, 7 << 7)
        assert seen == guest.exit(
            *(ExitReason.IO_INSTRUCTION, 2),
            qualification=qualification,
            info=info,
            linear=data + bases.get(segment, 0),
        ), f"segment {segment}"


def test_address_size(l1: L1) -> None:
    """With a 32-bit address size the upper half of RSI or RDI does not count."""
    guest = Guest(l1, ProcCtl.UNCONDITIONAL_IO_EXITING)
    data = l1.sym("l2_data")
    regs = {"rdx": PORT, "rsi": data | 0x7 << 32, "rdi": data | 0x7 << 32}
    for opcode, read in ((b"\x6e", False), (b"\x6c", True)):
        seen = guest.run(b"\x67" + opcode, regs)
        assert seen == guest.exit(
            *(ExitReason.IO_INSTRUCTION, 2),
            qualification=IoQualification(1, read, PORT, string=True).encode(),
            info=_info(32, None if read else DS),
            linear=data,
        )


@pytest.mark.needs(Proc2Ctl.UNRESTRICTED_GUEST)
def test_real_mode(l1: L1) -> None:
    """In real mode the address size is 16 and the linear address is base plus SI or DI."""
    guest = Guest(l1, ProcCtl.UNCONDITIONAL_IO_EXITING, mode=L2Mode.REAL)
    regs = {"rdx": PORT, "rsi": 0xFFFF0010, "rdi": 0xFFFF0020}
    for opcode, read, linear in ((b"\x6e", False, 0x5010), (b"\x6c", True, 0x6020)):
        seen = guest.run(opcode, regs, GUEST_DS_SELECTOR=0x500, GUEST_DS_BASE=0x5000,
                         GUEST_ES_SELECTOR=0x600, GUEST_ES_BASE=0x6000)  # fmt: skip
        assert seen == guest.exit(
            *(ExitReason.IO_INSTRUCTION, 1),
            qualification=IoQualification(1, read, PORT, string=True).encode(),
            info=_info(16, None if read else DS),
            linear=linear,
        )
        seen = guest.run(b"\x67\xf3" + opcode, {"rdx": PORT, "rsi": 0x10, "rdi": 0x20, "rcx": 1})
        assert seen == guest.exit(
            *(ExitReason.IO_INSTRUCTION, 3),
            qualification=IoQualification(1, read, PORT, string=True, rep=True).encode(),
            info=_info(32, None if read else DS),
            linear=linear,
        )


def test_bitmaps_govern_strings(l1: L1) -> None:
    """The I/O bitmaps hold for INS and OUTS as for IN and OUT, with every byte of the access."""
    guest = Guest(l1, ProcCtl.USE_IO_BITMAPS)
    set_io_bitmaps(l1, [PORT + 3])
    l1.write(l1.sym("l2_data"), b"abcdefgh")
    regs = {"rdx": PORT, "rsi": l1.sym("l2_data")}
    seen = guest.run(b"\x6f", regs)
    assert seen == guest.exit(
        *(ExitReason.IO_INSTRUCTION, 1),
        qualification=IoQualification(4, False, PORT, string=True).encode(),
        linear=l1.sym("l2_data"),
    )
    seen = guest.run(b"\x66\x6f", regs)
    assert seen == HostExit(IoExit(IO_OUT, 2, PORT, 1, b"ab"))
    seen = guest.resume()
    assert seen == Succeed()
    assert guest.changed(seen) == {"rsi": l1.sym("l2_data") + 2}


def test_strings_without_intercept(l1: L1) -> None:
    """String I/O that L1 does not want moves L2's memory to and from userspace."""
    guest = Guest(l1)
    data = l1.sym("l2_data")
    l1.write(data, b"nested VMX")
    seen = guest.run(b"\xf3\x6e", {"rdx": PORT, "rsi": data, "rcx": 10})
    sent = b""
    while isinstance(seen, HostExit):
        assert (seen.exit.direction, seen.exit.size, seen.exit.port) == (IO_OUT, 1, PORT)
        sent += seen.exit.data
        seen = guest.resume()
    assert seen == Succeed()
    assert sent == b"nested VMX"
    assert guest.changed(seen) == {"rsi": data + 10, "rcx": 0}
    wanted = b"0123456789ab"
    seen = guest.run(b"\xf3\x6d", {"rdx": PORT, "rdi": data + 0x100, "rcx": 3})
    done = 0
    while isinstance(seen, HostExit):
        assert (seen.exit.direction, seen.exit.size, seen.exit.port) == (IO_IN, 4, PORT)
        l1.vcpu.set_io_data(wanted[done : done + 4 * seen.exit.count])
        done += 4 * seen.exit.count
        seen = guest.resume()
    assert seen == Succeed()
    assert l1.read(data + 0x100, 12) == wanted
    assert guest.changed(seen) == {"rdi": data + 0x10C, "rcx": 0}


@pytest.mark.sdm("Relative Priority of Faults and VM Exits")
def test_permission_of_the_tss_comes_first(l1: L1) -> None:
    """#GP of the TSS's I/O permission bitmap comes before the exit of a string instruction."""
    guest = Guest(l1, ProcCtl.UNCONDITIONAL_IO_EXITING)
    guest.set_cpl(3)
    regs = {"rdx": PORT, "rsi": l1.sym("l2_data"), "rdi": l1.sym("l2_data"), "rcx": 2}
    for opcode, _ in STRINGS.values():
        seen = guest.run(b"\xf3" + opcode, regs)
        assert seen == Fault(Vector.GP, error_code=0, rip=0), opcode.hex()
    assert guest.vmcs[Field.GUEST_RIP] == l1.sym("l2_64_report")
