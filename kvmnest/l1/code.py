"""Machine code for L1 and L2 as bytes: no assembler at test time.

Instructions are written as their encodings (SDM volume 2, "Instruction Set Reference").
"""

from __future__ import annotations

import struct

NOP = b"\x90"
HLT = b"\xf4"
VMCALL = b"\x0f\x01\xc1"
VMLAUNCH = b"\x0f\x01\xc2"
VMRESUME = b"\x0f\x01\xc3"
VMXOFF = b"\x0f\x01\xc4"
VMFUNC = b"\x0f\x01\xd4"
CPUID = b"\x0f\xa2"
RDMSR = b"\x0f\x32"
WRMSR = b"\x0f\x30"
RDTSC = b"\x0f\x31"
RDTSCP = b"\x0f\x01\xf9"
RDPMC = b"\x0f\x33"
INVD = b"\x0f\x08"
WBINVD = b"\x0f\x09"
PAUSE = b"\xf3\x90"
MONITOR = b"\x0f\x01\xc8"
MWAIT = b"\x0f\x01\xc9"
XSETBV = b"\x0f\x01\xd1"
XGETBV = b"\x0f\x01\xd0"
UD2 = b"\x0f\x0b"
INT3 = b"\xcc"
INT1 = b"\xf1"
CLI = b"\xfa"
STI = b"\xfb"
CLTS = b"\x0f\x06"
PUSHFQ = b"\x9c"
POPFQ = b"\x9d"
JMP_SELF = b"\xeb\xfe"

_REGISTERS = {
    **{name: index for index, name in enumerate(("rax", "rcx", "rdx", "rbx"))},
    **{name: 4 + index for index, name in enumerate(("rsp", "rbp", "rsi", "rdi"))},
    **{f"r{number}": number for number in range(8, 16)},
}


def mov(register: str, value: int) -> bytes:
    """MOV r64, imm64 (64-bit mode)."""
    number = _REGISTERS[register]
    prefix = bytes([0x48 | number >> 3, 0xB8 | number & 7])
    return prefix + struct.pack("<Q", value & 0xFFFFFFFFFFFFFFFF)


def mov32(register: str, value: int) -> bytes:
    """MOV r32, imm32 (32-bit and 64-bit mode; one of the first eight registers, as "rax")."""
    return bytes([0xB8 | _REGISTERS[register]]) + struct.pack("<I", value & 0xFFFFFFFF)


def out8(port: int) -> bytes:
    """OUT imm8, AL."""
    return bytes([0xE6, port])


def int_n(vector: int) -> bytes:
    """INT imm8."""
    return bytes([0xCD, vector])


def mov_to_cr(cr: int, register: str = "rax") -> bytes:
    """MOV CRn, r64."""
    return _mov_special(0x22, cr, register)


def mov_from_cr(cr: int, register: str = "rax") -> bytes:
    """MOV r64, CRn."""
    return _mov_special(0x20, cr, register)


def mov_to_dr(dr: int, register: str = "rax") -> bytes:
    """MOV DRn, r64."""
    return _mov_special(0x23, dr, register)


def mov_from_dr(dr: int, register: str = "rax") -> bytes:
    """MOV r64, DRn."""
    return _mov_special(0x21, dr, register)


def _mov_special(opcode: int, special: int, register: str) -> bytes:
    number = _REGISTERS[register]
    rex = 0x40 | (special >> 3) << 2 | number >> 3
    prefix = bytes([rex]) if rex != 0x40 else b""
    return prefix + bytes([0x0F, opcode, 0xC0 | (special & 7) << 3 | number & 7])
