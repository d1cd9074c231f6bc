"""A grammar of L2's instructions, in parts: each is entered at its beginning.

A part sets the registers that it needs, so that what is drawn means something; what it reads of
time or chance it throws away. Encodings: SDM volume 2, "Instruction Set Reference".
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from dataclasses import dataclass

from kvmnest.fuzz.programs.program import PAUSE_PORT
from kvmnest.l1.payload import Payload
from kvmnest.vmx import Msr

_GOOD_MSRS = (
    *(Msr.SYSENTER_CS, Msr.SYSENTER_ESP, Msr.SYSENTER_EIP, Msr.STAR, Msr.LSTAR, Msr.CSTAR),
    *(Msr.FMASK, Msr.FS_BASE, Msr.GS_BASE, Msr.KERNEL_GS_BASE, Msr.PAT, Msr.IA32_EFER),
)
_BAD_MSRS = (0x2FF + 0x1000, 0x40000000, 0xC0001FFF, 0xC0002000, 0xFFFF)
_CONSTANTS = (0, 1, 2, 0x1000, 0xFFFF, 0x80000000, 0xFFFFFFFF, (1 << 47) - 1, 1 << 47, 1 << 63)
_PORTS = (0, 0x20, 0x60, 0x70, 0x80, 0xE7, 0x3F8, 0xCF8, 0x7FFF, 0x8000, 0xFFFF)
#: Bits of CR4 that no processor has.
CR4_RESERVED = 1 << 31 | 1 << 26
#: Linear addresses that are mapped nowhere, and one that is not canonical.
UNMAPPED, NOT_CANONICAL = 0x40000000, 0x8000000000000000


def value(chance: random.Random) -> int:
    """A number for a register: one bit, or one at an edge."""
    return 1 << chance.randrange(64) if chance.random() < 0.3 else chance.choice(_CONSTANTS)


@dataclass(frozen=True)
class Machine:
    """What the grammar has to know: bits of L2's code, where L2 has memory, bits of CR4.

    ``apic``: the local APIC is in x2APIC mode; ``pauses``: L2 may wait for its host.
    """

    bits: int
    data: int
    selectors: tuple[int, ...]
    cr4: int
    paged: bool = True
    apic: bool = False
    pauses: bool = False

    @classmethod
    def of(cls, payload: Payload, bits: int, cr4: int) -> Machine:
        """Of the payload; ``cr4`` are the bits of CR4 that may be 1."""
        names = ("SEL_CODE64", "SEL_DATA", "SEL_CODE32", "SEL_USER_DATA", "SEL_USER_CODE64")
        more = ("SEL_TSS0", "SEL_TSS_L2", "SEL_LDT")
        selectors = tuple(payload[name] for name in (*names, *more))
        return cls(bits, payload["l2_data"], (*selectors, 0, 3, 0x78, 0xFFF8), cr4)


class Part:
    """Draws one part of L2's code."""

    def __init__(self, chance: random.Random, machine: Machine) -> None:
        self._chance, self._machine = chance, machine
        self._bits = machine.bits
        self._cr4 = machine.cr4 | CR4_RESERVED

    def draw(self) -> bytes:
        """Machine code."""
        kinds = [kind for kind, _ in _KINDS]
        kind = self._chance.choices(kinds, [weight for _, weight in _KINDS])[0]
        return kind(self)

    # --- operands ---

    def _mov(self, register: int, value: int) -> bytes:
        """MOV register, value; the register is its number."""
        if self._bits == 64:
            return bytes([0x48, 0xB8 | register]) + struct.pack("<Q", value & (1 << 64) - 1)
        prefix = b"\x66" if self._bits == 16 else b""
        return prefix + bytes([0xB8 | register]) + struct.pack("<I", value & 0xFFFFFFFF)

    def _address(self) -> int:
        """Mostly of L2's data."""
        data = self._machine.data + self._chance.choice((0, 8, 0x40, 0x800, 0xFF8))
        bad = [UNMAPPED, UNMAPPED + 0xFFC]
        if self._bits == 64:
            bad += [NOT_CANONICAL]
        return data if self._chance.random() < 0.85 else self._chance.choice(bad)

    def _memory(self, opcode: bytes, extension: int, *, wide: bool = False) -> bytes:
        """An instruction with a memory operand at [RDI]; in 16-bit code with a 32-bit address."""
        prefix = b"\x67" if self._bits == 16 else b""
        if wide and self._bits == 64:
            return prefix + b"\x48" + opcode + bytes([extension << 3 | 7])
        return prefix + opcode + bytes([extension << 3 | 7])

    def _at(self, opcode: bytes, extension: int, *, wide: bool = False) -> bytes:
        return self._mov(7, self._address()) + self._memory(opcode, extension, wide=wide)

    def _value(self) -> int:
        return value(self._chance)

    # --- kinds ---

    def _plain(self) -> bytes:
        return self._chance.choice(_PLAIN)

    def _clock(self) -> bytes:
        # RDTSC, RDTSCP, RDPMC; then XOR EAX, EAX; XOR EDX, EDX; XOR ECX, ECX.
        code = self._chance.choice((b"\x0f\x31", b"\x0f\x01\xf9", b"\x0f\x33"))
        return self._mov(1, 0) + code + b"\x31\xc0\x31\xd2\x31\xc9"

    def _vmx(self) -> bytes:
        if self._chance.random() < 0.5:
            return self._chance.choice(
                [b"\x0f\x01" + bytes([n]) for n in (*range(0xC1, 0xC5), 0xD4)]
            )
        field = self._chance.choice((0x6800, 0x4402, 0x681E, 0x2800, 0x1234, 0xFFFF))
        register = self._mov(0, field) + self._mov(2, self._value())
        choice = self._chance.choice(
            (
                register + b"\x0f\x78\xc2",  # VMREAD RDX, RAX
                register + b"\x0f\x79\xc2",  # VMWRITE RAX, RDX
                register + self._at(b"\x0f\x78", 0),
                register + self._at(b"\x0f\x79", 0),
                self._at(b"\x0f\xc7", 6),  # VMPTRLD
                self._at(b"\x0f\xc7", 7),  # VMPTRST
                b"",
            )
        )
        if choice:
            return choice
        operand = self._mov(7, self._address())
        memory = self._memory
        return operand + self._chance.choice(
            (
                b"\x66" + memory(b"\x0f\xc7", 6),  # VMCLEAR
                b"\xf3" + memory(b"\x0f\xc7", 6),  # VMXON
                self._mov(0, 2) + b"\x66" + memory(b"\x0f\x38\x80", 0),  # INVEPT
                self._mov(0, 2) + b"\x66" + memory(b"\x0f\x38\x81", 0),  # INVVPID
            )
        )

    def _control_register(self) -> bytes:
        number = self._chance.choice((0, 0, 3, 4, 4, 8) if self._bits == 64 else (0, 0, 3, 4, 4))
        rex = b"\x44" if number == 8 else b""
        modrm = bytes([0xC0 | (number & 7) << 3])
        read = rex + b"\x0f\x20" + modrm
        what = self._chance.random()
        if what < 0.3:
            return read
        if what < 0.45:
            return self._chance.choice((b"\x0f\x06", b"\x0f\x01\xe0", self._lmsw()))
        # The present value with one bit changed, or anything.
        if what < 0.85:
            bit = self._chance.choice((*range(1, 22), 29, 30))
            if number == 8:
                # KVM looks at the low 8 bits only.
                bit = self._chance.randrange(8)
            elif number == 4:
                # What one machine has and the other has not is no difference to look for.
                bit = self._chance.choice([b for b in range(32) if self._cr4 >> b & 1])
            elif number == 3:
                # Not another address: what would be L2's page tables there is not L2's.
                bit = self._chance.choice((*range(12), 62, 63) if self._bits == 64 else range(12))
            elif self._bits == 64 and self._chance.random() < 0.1:
                bit = self._chance.randrange(32, 64)
            rexw = b"\x48" if self._bits == 64 else (b"\x66" if self._bits == 16 else b"")
            # BTC RAX, bit; CLC, since CF has the bit as it was, which may be a known difference.
            flip = rexw + b"\x0f\xba\xf8" + bytes([bit & 63]) + b"\xf8"
            return read + flip + rex + b"\x0f\x22" + modrm
        value = self._value()
        if number == 8:
            value &= 0xFF
        if number == 3:
            return read + rex + b"\x0f\x22" + modrm
        if number == 4:
            value &= self._cr4
        if number == 0:
            # Bochs lets L2 leave protected mode and paging without unrestricted guest.
            value |= 0x80000001
            if not self._machine.paged:
                # Whether L2 may turn paging on depends on EFER.LME, which KVM clears at entry.
                value &= 0x7FFFFFFE
        return self._mov(0, value) + rex + b"\x0f\x22" + modrm

    def _lmsw(self) -> bytes:
        if self._chance.random() < 0.5:
            return self._mov(0, self._chance.choice((1, 3, 0xB, 0xF, 0x31))) + b"\x0f\x01\xf0"
        return self._at(b"\x0f\x01", 6)

    def _debug_register(self) -> bytes:
        number = self._chance.choice((0, 1, 2, 3, 4, 5, 6, 7, 7))
        modrm = bytes([0xC0 | number << 3])
        if self._chance.random() < 0.4:
            return b"\x0f\x21" + modrm
        # Breakpoints on what L2 does would make it another program: none is enabled.
        value = 0x400 if number in (5, 7) else self._value() & (1 << 47) - 1
        return self._mov(0, value) + b"\x0f\x23" + modrm

    def _table(self) -> bytes:
        opcode, extension = self._chance.choice(
            (
                *((b"\x0f\x01", 0), (b"\x0f\x01", 1)),  # SGDT, SIDT
                *((b"\x0f\x00", 0), (b"\x0f\x00", 1)),  # SLDT, STR
                *((b"\x0f\x00", 2), (b"\x0f\x00", 3)),  # LLDT, LTR
                *((b"\x0f\x00", 4), (b"\x0f\x00", 5)),  # VERR, VERW
                (b"\x0f\x01", 7),  # INVLPG
            )
        )
        if self._chance.random() < 0.4 and opcode == b"\x0f\x00":
            selector = self._chance.choice(self._machine.selectors)
            return self._mov(0, selector) + opcode + bytes([0xC0 | extension << 3])
        return self._at(opcode, extension)

    def _table_round_trip(self) -> bytes:
        """SGDT, LGDT or SIDT, LIDT of the same place."""
        store = self._chance.choice((0, 1))
        operand = self._mov(7, self._machine.data + 0x100)
        code = self._memory(b"\x0f\x01", store) + self._memory(b"\x0f\x01", store + 2)
        return operand + code

    def _io(self) -> bytes:
        port = self._chance.choice(_PORTS)
        what = self._chance.random()
        if what < 0.3:
            opcode = self._chance.choice((0xE4, 0xE5, 0xE6, 0xE7))
            return bytes([opcode, port & 0xFF])
        code = self._mov(2, port)
        if what < 0.6:
            opcode = self._chance.choice((0xEC, 0xED, 0xEE, 0xEF))
            prefix = self._chance.choice((b"", b"", b"\x66"))
            return code + prefix + bytes([opcode])
        code += self._mov(7, self._address()) + self._mov(6, self._address())
        code += self._mov(1, self._chance.choice((0, 1, 3)))
        prefix = self._chance.choice((b"", b"\xf3", b"\x66", b"\x67", b"\x26", b"\x64\xf3"))
        return code + prefix + bytes([self._chance.choice((0x6C, 0x6D, 0x6E, 0x6F))])

    def _msr(self) -> bytes:
        good = self._chance.random() < 0.7
        index = self._chance.choice(_GOOD_MSRS if good else _BAD_MSRS)
        code = self._mov(1, int(index))
        if self._chance.random() < 0.5:
            return code + b"\x0f\x32"
        value = self._value()
        if index == Msr.IA32_EFER:
            value = self._chance.choice((0, 0x500, 0x501, 0xD00, 0xD01, 0xC00, 0x1D01, 2))
        if index in (Msr.SYSENTER_ESP, Msr.SYSENTER_EIP):
            # KVM makes them canonical, as it says itself, where a processor refuses them.
            value &= (1 << 47) - 1
        if index == Msr.PAT:
            value = self._chance.choice((0x0007040600070406, 0, 2, 0x0606060606060606))
        return code + self._mov(0, value & 0xFFFFFFFF) + self._mov(2, value >> 32) + b"\x0f\x30"

    def _string(self) -> bytes:
        code = self._mov(7, self._address()) + self._mov(6, self._address())
        code += self._mov(1, self._chance.choice((0, 1, 5, 16)))
        opcode = self._chance.choice((0xA4, 0xA5, 0xAA, 0xAB, 0xAC, 0xAD, 0xA6, 0xAE))
        return code + self._chance.choice((b"", b"\xf3", b"\xf2")) + bytes([opcode])

    def _own_interrupt(self) -> bytes:
        """WRMSR of the x2APIC: an interrupt or an NMI to L2's own CPU, or the end of one."""
        msr, value = self._chance.choice(
            (
                *((Msr.X2APIC_SELF_IPI, self._chance.choice((0x31, 0x51, 0xF1))),) * 3,
                *((Msr.X2APIC_ICR, 4 << 8), (Msr.X2APIC_ICR, 0x61), (Msr.X2APIC_EOI, 0)),
            )
        )
        code = self._mov(1, int(msr)) + self._mov(0, value) + self._mov(2, 0) + b"\x0f\x30"
        return self._chance.choice((b"", b"\xfb", b"\xfa")) + code + b"\x90"

    def _fault(self) -> bytes:
        return self._chance.choice(
            (
                b"\x0f\x0b",  # UD2
                b"\x31\xc9\xf7\xf1",  # XOR ECX, ECX; DIV ECX
                b"\xcc",
                b"\xf1",
                b"\x0f\xb9\xc0",  # UD1
                b"\xcd" + bytes([self._chance.choice((0, 3, 8, 13, 14, 32, 0x80, 255))]),
                self._mov(7, UNMAPPED) + self._memory(b"\x8b", 0),
                self._mov(7, UNMAPPED) + self._memory(b"\x89", 0),
                self._mov(7, UNMAPPED) + self._memory(b"\xff", 6),  # PUSH [RDI]
                self._mov(0, self._chance.choice(self._machine.selectors)) + b"\x8e\xd8",
                self._mov(0, self._chance.choice(self._machine.selectors)) + b"\x8e\xd0",
                self._mov(0, self._chance.choice(self._machine.selectors)) + b"\x8e\xe0",
            )
        )

    def _flags(self) -> bytes:
        """PUSH of a value and POPF, or STI, CLI, MOV SS before something else."""
        if self._chance.random() < 0.5:
            bits = 2
            for bit in (8, 9, 14, 16, 18, 12, 21):
                bits |= (self._chance.random() < 0.25) << bit
            prefix = b"\x66" if self._bits == 16 else b""
            return prefix + b"\x68" + struct.pack("<I", bits) + prefix + b"\x9d"
        first = self._chance.choice((b"\xfb", b"\xfa", b"\x8c\xd0\x8e\xd0", b"\x9c\x58"))
        return first + self._chance.choice((*_PLAIN, b"\x90"))

    def _far(self) -> bytes:
        """A far jump, call or IRET to the part behind it, with some selector."""
        selector = self._chance.choice(self._machine.selectors)
        if self._bits == 64:
            # LEA RAX, [RIP+n]; PUSH selector; PUSH RAX; RETF: what follows is n bytes on.
            code = b"\x6a" + bytes([selector & 0x7F]) + b"\x50\x48\xcb"
            return b"\x48\x8d\x05" + struct.pack("<i", len(code)) + code
        return self._mov(0, selector) + b"\x8e\xc0"

    def _fpu(self) -> bytes:
        return self._chance.choice(
            (
                *(b"\xdb\xe3", b"\x9b", b"\xd9\xe8", b"\xdf\xe0", b"\x0f\x77"),
                *(b"\x0f\x57\xc0", b"\x66\x0f\xef\xc9"),
                # Not STMXCSR: under KVM MXCSR is at times that of KVM's process, since Bochs leaves
                # it alone where a compacted XRSTOR initializes SSE.
                self._at(b"\x0f\xae", 2),  # LDMXCSR
                self._at(b"\x0f\xae", 7),  # CLFLUSH
            )
        )

    def _extended_state(self) -> bytes:
        code = self._mov(1, self._chance.choice((0, 0, 1)))
        if self._chance.random() < 0.5:
            return code + b"\x0f\x01\xd0\x31\xc0\x31\xd2"
        value = self._chance.choice((0, 1, 3, 7, 1 << 31))
        return code + self._mov(0, value) + self._mov(2, 0) + b"\x0f\x01\xd1"

    def _random(self) -> bytes:
        register = self._chance.choice((0, 2, 3, 6))
        kind = self._chance.choice((0xF0, 0xF8))
        # RDRAND or RDSEED of a register; MOV of 0 to it.
        return b"\x0f\xc7" + bytes([kind | register]) + self._mov(register, 0)

    def _invpcid(self) -> bytes:
        kind = self._mov(0, self._chance.choice((0, 1, 2, 3, 4)))
        return kind + self._mov(7, self._address()) + b"\x66" + self._memory(b"\x0f\x38\x82", 0)

    def _data(self) -> bytes:
        """Reads, writes and a LOCKed one."""
        return self._chance.choice(
            (
                self._at(b"\x8b", 0, wide=True),
                self._mov(0, self._value()) + self._at(b"\x89", 0, wide=True),
                self._mov(7, self._address()) + b"\xf0" + self._memory(b"\x01", 0),
                self._at(b"\x0f\xc7", 1),  # CMPXCHG8B
            )
        )

    def _self_modifying(self) -> bytes:
        """MOV BYTE [the NOP behind it], an instruction that exits or faults."""
        new = self._chance.choice((0xF4, 0xCC, 0x90, 0xF1, 0xFB))
        if self._bits == 64:
            return b"\xc6\x05" + struct.pack("<i", 0) + bytes([new]) + b"\x90"
        return b"\x90"


_PLAIN = (
    *(b"\x0f\xa2", b"\xf4", b"\xf3\x90", b"\x0f\x08", b"\x0f\x09", b"\x0f\xaa", b"\x0f\x37"),
    *(b"\x0f\x01\xf8", b"\x0f\x34", b"\x0f\x35", b"\x90"),
)
_KINDS: tuple[tuple[Callable[[Part], bytes], int], ...] = (
    (Part._plain, 8),
    (Part._clock, 3),
    (Part._vmx, 8),
    (Part._control_register, 10),
    (Part._debug_register, 4),
    (Part._table, 6),
    (Part._table_round_trip, 1),
    (Part._io, 8),
    (Part._msr, 8),
    (Part._string, 5),
    (Part._fault, 8),
    (Part._flags, 5),
    (Part._far, 3),
    (Part._fpu, 3),
    (Part._extended_state, 2),
    (Part._random, 2),
    (Part._invpcid, 2),
    (Part._data, 3),
    (Part._self_modifying, 1),
)
#: OUT PAUSE_PORT, AL; an instruction that the host's action may interrupt.
_PAUSE = bytes([0xE6, PAUSE_PORT, 0x90])


def parts(chance: random.Random, machine: Machine, count: int) -> list[bytes]:
    """Draw ``count`` parts."""
    drawn = []
    for _ in range(count):
        part = Part(chance, machine)
        if machine.apic and chance.random() < 0.15:
            drawn.append(part._own_interrupt())
        elif machine.pauses and chance.random() < 0.25:
            drawn.append(_PAUSE)
        else:
            drawn.append(part.draw())
    return drawn
