"""What ``payloads/reference_boot.s``, the ROM, is told to do, and what it answers."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

#: Guest-physical address of the ROM, and of what it is told, which is ROM too.
ROM, TASK = 0xF0000, 0xF8000
#: Where it writes its answers.
ANSWERS, ANSWER = 0x200000, struct.Struct("<IIIII12x")
_NONE, _ASK, _START = range(3)
_CPUID, _RDMSR = 1, 2
_LIST = 0x1000
_GDT_COPY, _GDT_ROOM = 0x400, 0xC00
_TABLE = struct.Struct("<HQ6x")
_AVAILABLE, _BUSY = 0x9, 0xB

#: Nothing but handing the CPU back.
IDLE = struct.pack("<I", _NONE)


@dataclass
class Start:
    """A state that the ROM brings the CPU to, from reset.

    ``selectors`` are CS, SS, DS, ES, FS, GS, TR, LDTR; the segments are what the GDT says.
    ``gpr`` are in the order of their encoding, ``msrs`` in the order of writing.
    """

    cr0: int = 0
    cr3: int = 0
    cr4: int = 0
    efer: int = 0
    gdtr: tuple[int, int] = (0, 0)
    idtr: tuple[int, int] = (0, 0)
    selectors: tuple[int, ...] = (0,) * 8
    rip: int = 0
    rflags: int = 2
    gpr: tuple[int, ...] = (0,) * 16
    msrs: dict[int, int] = field(default_factory=dict)

    def task(self, gdt: bytes) -> bytes:
        """The task; ``gdt`` is the content of the GDT."""
        copy = bytearray(gdt)
        tr = self.selectors[6] & ~7
        if tr:
            # LTR takes an available TSS and makes it busy, which it is in the GDT already.
            copy[tr + 5] = copy[tr + 5] & 0xF0 | _AVAILABLE
        page = bytearray(_LIST)
        struct.pack_into("<II", page, 0, _START, len(self.msrs))
        struct.pack_into("<QQQQ", page, 0x08, self.cr0, self.cr3, self.cr4, self.efer)
        for at, (base, limit) in (
            (0x28, self.gdtr),
            (0x38, self.idtr),
            (0x48, (TASK + _GDT_COPY, self.gdtr[1])),
        ):
            _TABLE.pack_into(page, at, limit, base)
        struct.pack_into("<8I", page, 0x58, *self.selectors)
        struct.pack_into("<3Q", page, 0x80, self.rip, self.gpr[4], self.rflags)
        struct.pack_into("<16Q", page, 0x98, *self.gpr)
        page[_GDT_COPY : _GDT_COPY + len(copy)] = copy
        msrs = b"".join(struct.pack("<QQ", *item) for item in self.msrs.items())
        return bytes(page) + msrs


def questions(leaves: Sequence[tuple[int, int]], msrs: Sequence[int]) -> bytes:
    """The task of executing CPUID for leaves (EAX, ECX), then RDMSR for MSRs."""
    asked = [(_CPUID, eax, ecx) for eax, ecx in leaves] + [(_RDMSR, 0, msr) for msr in msrs]
    head = struct.pack("<II", _ASK, len(asked)).ljust(_LIST, b"\0")
    return head + b"".join(struct.pack("<IIII", *one, 0) for one in asked)
