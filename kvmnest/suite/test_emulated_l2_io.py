"""IN, OUT, INS and OUTS of L2 that KVM emulates: what L1 is told of the exit.

The exit has to look as if the processor had made it: reason, qualification, length, instruction
information and linear address. ``test_emulated_l2`` asks whether the exit comes at all.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from kvmnest.kvm.exits import IoExit
from kvmnest.l1 import L1, L2Mode
from kvmnest.suite.support.bitmaps import set_io_bitmaps
from kvmnest.suite.support.emulation import PREFIX, forced
from kvmnest.suite.support.guest import Guest, Masked
from kvmnest.vmx import (
    BasicCap,
    ExitReason,
    IoQualification,
    ProcCtl,
    Vector,
)
from kvmnest.vmx.outcome import ANY, Fault, HostExit

__all__ = ["forced"]

pytestmark = [pytest.mark.series(19)]

PORT = 0x3F8
IMMEDIATE = 0x80
DS, FS, GS = 3, 4, 5
AT = len(PREFIX)


# --- I/O instructions ---


@dataclass(frozen=True)
class Io:
    """A form of IN, OUT, INS or OUTS in 64-bit code; ``size`` in bytes, ``address`` in bits."""

    code: bytes
    size: int
    input: bool
    string: bool = False
    rep: bool = False
    immediate: bool = False
    address: int = 64
    segment: int = DS

    @property
    def port(self) -> int:
        """The port that it uses."""
        return IMMEDIATE if self.immediate else PORT

    @property
    def qualification(self) -> int:
        """The exit qualification."""
        return IoQualification(
            self.size, self.input, self.port, self.string, self.rep, self.immediate
        ).encode()

    @property
    def info(self) -> Masked:
        """The instruction information of INS and OUTS, as far as it is defined."""
        size = {32: 1, 64: 2}[self.address] << 7
        if self.input:
            return Masked(size, 7 << 7)
        return Masked(size | self.segment << 15, 7 << 7 | 7 << 15)


def _forms() -> dict[str, Io]:
    forms = {}
    for name, read, immediate, by_dx, string in (
        ("IN", True, 0xE4, 0xEC, 0x6C),
        ("OUT", False, 0xE6, 0xEE, 0x6E),
    ):
        for size, prefix, wide in ((1, b"", 0), (2, b"\x66", 1), (4, b"", 1)):
            bits = f"{8 * size}"
            opcode = prefix + bytes([immediate + wide, IMMEDIATE])
            forms[f"{name}-imm-{bits}"] = Io(opcode, size, read, immediate=True)
            forms[f"{name}-DX-{bits}"] = Io(prefix + bytes([by_dx + wide]), size, read)
            opcode = prefix + bytes([string + wide])
            forms[f"{name}S-{bits}"] = Io(opcode, size, read, True)
            forms[f"REP-{name}S-{bits}"] = Io(b"\xf3" + opcode, size, read, True, True)
        opcode = b"\x67" + bytes([string])
        forms[f"{name}S-address-32"] = Io(opcode, 1, read, True, address=32)
        forms[f"REP-{name}S-address-32"] = Io(b"\xf3" + opcode, 1, read, True, True, address=32)
    for segment, prefix in ((FS, b"\x64"), (GS, b"\x65")):
        forms[f"OUTS-{'FS' if segment == FS else 'GS'}"] = Io(
            prefix + b"\x6e", 1, False, True, segment=segment
        )
    return forms


FORMS = _forms()
STRINGS = {name: form for name, form in FORMS.items() if form.string}
BITMAPS = pytest.mark.parametrize(
    "bitmaps",
    [
        pytest.param(False, id="all", marks=pytest.mark.needs(ProcCtl.UNCONDITIONAL_IO_EXITING)),
        pytest.param(True, id="bitmaps", marks=pytest.mark.needs(ProcCtl.USE_IO_BITMAPS)),
    ],
)


def _io_regs(l1: L1) -> dict[str, int]:
    data = l1.sym("l2_data")
    return {"rdx": PORT, "rsi": data + 8, "rdi": data + 0x10, "rcx": 2}


def _io_guest(l1: L1, bitmaps: bool = False) -> Guest:
    if not bitmaps:
        return Guest(l1, ProcCtl.UNCONDITIONAL_IO_EXITING)
    guest = Guest(l1, ProcCtl.USE_IO_BITMAPS)
    set_io_bitmaps(l1, [PORT, IMMEDIATE])
    return guest


@pytest.mark.sdm("Exit Qualification for I/O Instructions")
@BITMAPS
@pytest.mark.parametrize("name", FORMS)
def test_io_qualification(l1: L1, forced: bytes, name: str, bitmaps: bool) -> None:
    """Size, direction, string, REP, immediate operand and port; nothing is moved."""
    form, guest = FORMS[name], _io_guest(l1, bitmaps)
    l1.write(l1.sym("l2_data"), b"\xee" * 64)
    seen = guest.run(PREFIX + form.code, _io_regs(l1))
    assert seen == guest.exit(
        ExitReason.IO_INSTRUCTION, len(form.code), offset=AT, qualification=form.qualification
    )
    assert guest.changed(seen) == {}
    assert l1.read(l1.sym("l2_data"), 64) == b"\xee" * 64


@pytest.mark.sdm("VM-Exit Instruction Information as Used for INS and OUTS")
@pytest.mark.needs(ProcCtl.UNCONDITIONAL_IO_EXITING, BasicCap.INS_OUTS_INFO)
@pytest.mark.parametrize("name", STRINGS)
def test_string_information(l1: L1, forced: bytes, name: str) -> None:
    """Address size and segment of INS and OUTS."""
    form, guest = STRINGS[name], _io_guest(l1)
    seen = guest.run(PREFIX + form.code, _io_regs(l1), GUEST_FS_BASE=4, GUEST_GS_BASE=0x20)
    assert seen == guest.exit(
        *(ExitReason.IO_INSTRUCTION, len(form.code)), offset=AT, qualification=ANY, info=form.info
    )


@pytest.mark.sdm("Basic VM-Exit Information")
@pytest.mark.needs(ProcCtl.UNCONDITIONAL_IO_EXITING)
@pytest.mark.parametrize("name", STRINGS)
def test_string_linear_address(l1: L1, forced: bytes, name: str) -> None:
    """The guest-linear address is that of the operand, with the base of its segment."""
    form, guest = STRINGS[name], _io_guest(l1)
    regs = _io_regs(l1)
    if form.address == 32:
        regs = {**regs, "rsi": regs["rsi"] | 7 << 32, "rdi": regs["rdi"] | 7 << 32}
    seen = guest.run(PREFIX + form.code, regs, GUEST_FS_BASE=4, GUEST_GS_BASE=0x20)
    base = 0 if form.input else {FS: 4, GS: 0x20}.get(form.segment, 0)
    assert seen == guest.exit(
        *(ExitReason.IO_INSTRUCTION, len(form.code)),
        offset=AT,
        qualification=ANY,
        linear=l1.sym("l2_data") + (0x10 if form.input else 8) + base,
    )


@pytest.mark.sdm("Relative Priority of Faults and VM Exits")
@pytest.mark.needs(ProcCtl.UNCONDITIONAL_IO_EXITING)
@pytest.mark.parametrize("name", FORMS)
def test_io_permission_comes_first(l1: L1, forced: bytes, name: str) -> None:
    """#GP of IOPL and the I/O permission bitmap comes before the exit."""
    form, guest = FORMS[name], _io_guest(l1)
    guest.set_cpl(3)
    seen = guest.run(PREFIX + form.code, _io_regs(l1))
    assert seen == Fault(Vector.GP, error_code=0, rip=AT)


@pytest.mark.sdm("Relative Priority of Faults and VM Exits")
@pytest.mark.needs(ProcCtl.UNCONDITIONAL_IO_EXITING)
@pytest.mark.parametrize("name", STRINGS)
def test_io_exit_comes_before_a_page_fault(l1: L1, forced: bytes, name: str) -> None:
    """The exit of INS and OUTS comes before a page fault of the operand."""
    form, guest = STRINGS[name], _io_guest(l1)
    regs = {**_io_regs(l1), "rsi": 0x50000000, "rdi": 0x50000000}
    seen = guest.run(PREFIX + form.code, regs)
    assert seen == guest.exit(
        ExitReason.IO_INSTRUCTION, len(form.code), offset=AT, qualification=ANY
    )


@pytest.mark.sdm("I/O-Bitmap Addresses")
@pytest.mark.needs(ProcCtl.USE_IO_BITMAPS)
@pytest.mark.parametrize("name", [name for name, form in FORMS.items() if form.size > 1])
def test_any_byte_of_an_access(l1: L1, forced: bytes, name: str) -> None:
    """An access exits when the bit of any of its ports is 1, and else reaches userspace."""
    form, guest = FORMS[name], _io_guest(l1, True)
    set_io_bitmaps(l1, [form.port + form.size - 1])
    seen = guest.run(PREFIX + form.code, _io_regs(l1))
    assert seen == guest.exit(
        ExitReason.IO_INSTRUCTION, len(form.code), offset=AT, qualification=ANY
    )
    set_io_bitmaps(l1, [form.port - 1, form.port + form.size])
    seen = guest.run(PREFIX + form.code, _io_regs(l1))
    assert isinstance(seen, HostExit)
    assert isinstance(seen.exit, IoExit)
    assert (seen.exit.port, seen.exit.size) == (form.port, form.size)


# --- other modes ---


@pytest.mark.parametrize("mode", [L2Mode.PROTECTED, L2Mode.PAE], ids=lambda mode: mode.name)
@pytest.mark.needs(ProcCtl.UNCONDITIONAL_IO_EXITING, ProcCtl.USE_IO_BITMAPS)
@pytest.mark.sdm("Exit Qualification for I/O Instructions")
def test_32_bit_code(l1: L1, forced: bytes, mode: L2Mode) -> None:
    """In 32-bit code the exit of an emulated OUT is the same."""
    guest = Guest(l1, ProcCtl.USE_IO_BITMAPS, mode=mode)
    set_io_bitmaps(l1, [PORT, IMMEDIATE])
    for name in ("OUT-imm-8", "OUT-DX-32", "OUTS-16", "REP-OUTS-8"):
        form = FORMS[name]
        seen = guest.run(PREFIX + form.code, _io_regs(l1))
        assert seen == guest.exit(
            ExitReason.IO_INSTRUCTION, len(form.code), offset=AT, qualification=form.qualification
        ), name
