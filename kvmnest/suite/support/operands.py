"""Memory operands of 64-bit code: their encoding, and what a VM exit says about them.

Encoding: SDM volume 2, "Addressing-Mode Encoding of ModR/M and SIB Bytes". Information: the
tables of "VM-Exit Instruction Information".
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from kvmnest.suite.support.guest import Masked
from kvmnest.vmx import InstructionInfo
from kvmnest.vmx.exitinfo import GPR_NAMES, SEGMENT_NAMES

_OVERRIDES = (0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65)
_SCALE, _ADDRESS_SIZE, _MEMORY, _SEGMENT = 0x3, 0x7 << 7, 1 << 10, 7 << 15
_INDEX, _NO_INDEX, _BASE, _NO_BASE = 0xF << 18, 1 << 22, 0xF << 23, 1 << 27


@dataclass(frozen=True)
class Memory:
    """A memory operand: [segment:base+index*2^scale+displacement], or relative to RIP.

    ``wide`` makes the displacement 32 bits even where 8 are enough; registers are numbers.
    """

    base: int | None = None
    index: int | None = None
    scale: int = 0
    displacement: int = 0
    segment: int | None = None
    address_size: int = 64
    relative: bool = False
    wide: bool = False

    def __str__(self) -> str:
        """Assembler form, as a case's id."""
        parts = [GPR_NAMES[self.base]] if self.base is not None else []
        if self.index is not None:
            parts.append(f"{GPR_NAMES[self.index]}*{1 << self.scale}")
        if self.relative:
            parts.append("rip")
        if self.displacement or not parts:
            parts.append(hex(self.displacement))
        prefix = f"{SEGMENT_NAMES[self.segment]}:" if self.segment is not None else ""
        suffix = "" if self.address_size == 64 else f"/a{self.address_size}"
        return f"{prefix}[{'+'.join(parts)}]{suffix}".replace("+-", "-")

    def encode(self, opcode: bytes, reg: int = 0, *, prefix: bytes = b"", rex: int = 0) -> bytes:
        """Machine code of an instruction with this operand; ``rex`` adds REX bits (8 is W)."""
        code = b"" if self.segment is None else bytes([_OVERRIDES[self.segment]])
        code += b"" if self.address_size == 64 else b"\x67"
        rex |= (reg >> 3) << 2 | ((self.index or 0) >> 3) << 1 | (self.base or 0) >> 3
        code += prefix + (bytes([0x40 | rex]) if rex else b"") + opcode
        middle = (reg & 7) << 3
        if self.relative:
            return code + bytes([middle | 5]) + struct.pack("<i", self.displacement)
        narrow = -128 <= self.displacement < 128 and not self.wide
        if self.base is None:
            mod, displacement = 0, struct.pack("<i", self.displacement)
        elif self.displacement == 0 and not self.wide and self.base & 7 != 5:
            mod, displacement = 0, b""
        elif narrow:
            mod, displacement = 0x40, struct.pack("<b", self.displacement)
        else:
            mod, displacement = 0x80, struct.pack("<i", self.displacement)
        if self.base is None or self.index is not None or self.base & 7 == 4:
            index = 4 if self.index is None else self.index & 7
            base = 5 if self.base is None else self.base & 7
            return (
                code + bytes([mod | middle | 4, self.scale << 6 | index << 3 | base]) + displacement
            )
        return code + bytes([mod | middle | self.base & 7]) + displacement

    def info(self, reg2: int, reg2_bits: int = 2) -> Masked:
        """The instruction information, as far as it is defined for this operand."""
        default = 2 if self.base in (4, 5) and not self.relative else 3
        value = InstructionInfo(
            scale=self.scale,
            address_size=self.address_size,
            segment=default if self.segment is None else self.segment,
            index=self.index,
            base=self.base,
            reg2=reg2,
        ).encode()
        mask = _ADDRESS_SIZE | _MEMORY | _SEGMENT | _NO_INDEX | _NO_BASE
        mask |= ((1 << reg2_bits) - 1) << 28
        mask |= 0 if self.index is None else _INDEX | _SCALE
        mask |= 0 if self.base is None else _BASE
        return Masked(value, mask)

    def qualification(self, next_rip: int) -> Masked:
        """The displacement; bits beyond the address size are undefined."""
        value = self.displacement + (next_rip if self.relative else 0)
        return Masked(value, (1 << self.address_size) - 1)


def register_info(register: int, reg2: int) -> Masked:
    """Instruction information of SLDT, STR, LLDT and LTR with a register operand."""
    value = InstructionInfo(register=True, reg1=register, reg2=reg2).encode()
    return Masked(value, 0xF << 3 | _MEMORY | 3 << 28)
