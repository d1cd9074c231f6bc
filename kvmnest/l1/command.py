"""One command of L1: packed into its slot once, its result unpacked as far as somebody looks.

This is the hot path of everything: a case is some ten to a thousand commands, and each cost more
in Python than in KVM when commands and results were taken apart field by field.
"""

from __future__ import annotations

import enum
import functools
import struct
from collections.abc import Mapping
from typing import Any

from kvmnest.errors import PayloadError
from kvmnest.l1 import payload as payload_module
from kvmnest.l1.payload import Payload
from kvmnest.vmx.registers import STATUS_FLAGS

#: General registers in the order of their encoding, which is the order of the slots.
GPRS = (
    *("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi"),
    *("r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"),
)
_MASK = 0xFFFFFFFFFFFFFFFF

# A slot of the command page (``payloads/abi.inc``): what is written before a command ...
_RIP, _RFLAGS, _RSP, _CR2, _GPR, _OPERAND = 0x08, 0x18, 0x20, 0x38, 0x40, 0xC0
_IN = struct.Struct("<II7Q16Q")
#: ... and what is read after it: status, RIP, RFLAGS, vector; then what few look at.
_SEEN = struct.Struct("<4xI248xQ8xQ16xQ")
_OUT, _OUT_GPR = 0x100, 0x140
_QUAD = struct.Struct("<Q")
_REGISTERS = struct.Struct("<16Q")
_pack_quad = _QUAD.pack_into

#: Where a register stands in a slot. CR2 counts as one: L2 and a page-fault handler see it.
_OFFSET = {name: _GPR + 8 * index for index, name in enumerate(GPRS)} | {"cr2": _CR2}

#: An entry of a list of VMREADs or VMWRITEs: field, value, RFLAGS.
LIST_ENTRY = struct.Struct("<QQQ")

#: All six status flags are set: an instruction that should clear one and does not is noticed.
DEFAULT_RFLAGS = 0x2 | STATUS_FLAGS


class Mode(enum.Enum):
    """Code segment in which L1 executes an instruction."""

    LONG = "64-bit mode"
    COMPAT = "compatibility mode"


class Shadow(enum.Enum):
    """What precedes the instruction by one: nothing, MOV to SS, or STI."""

    NONE = ""
    MOV_SS = "_movss"
    STI = "_sti"


class Kind(enum.Enum):
    """What a command is."""

    ENTRY = "VMLAUNCH or VMRESUME"
    PLAIN = "another instruction, or a snippet of code"
    LIST = "a list of VMREADs or VMWRITEs"


class Frame:
    """What all commands for the same instruction, executed the same way, have in common.

    Attributes:
        kind: see ``Kind``.
        name: of the instruction, with its blocking ("vmread_movss"), or of the list.
        rip: where the instruction is; of a list, the address of its first entry.
        count: entries of a list, else 0.
        regs: registers that every such command loads (the address of a memory operand).
        packed: the slot's input, without the registers of a single command.
    """

    __slots__ = ("count", "kind", "name", "packed", "regs", "rip")

    def __init__(
        self,
        kind: Kind,
        name: str,
        op: int,
        rip: int,
        *,
        cs: int = 0,
        rsp: int = 0,
        ss: int = 0,
        ds: int = 0,
        count: int = 0,
        regs: Mapping[str, int] | None = None,
    ) -> None:
        self.kind, self.name, self.rip, self.count = kind, name, rip, count
        self.regs = dict(regs or {})
        gprs = [self.regs.get(name, 0) & _MASK for name in GPRS]
        # Of a list the count stands in the place of CS.
        state = (rip, count or cs, DEFAULT_RFLAGS, rsp, ss, ds, 0)
        self.packed = _IN.pack(op, 0, *state, *gprs)


class Command:
    """One command: a ``Frame``, and what this one has of its own.

    Args:
        frame: what it has in common with others.
        given: registers ("rax" ... "r15", "cr2") before the instruction; kept, not copied.
        operand: bytes of its memory operand, at most 64.
        code: the snippet that it runs, if it does.
    """

    __slots__ = ("_patches", "code", "frame", "given", "operand")

    def __init__(
        self, frame: Frame, given: Mapping[str, int], operand: bytes = b"", code: bytes = b""
    ) -> None:
        self.frame, self.given, self.operand, self.code = frame, given, operand, code
        self._patches: dict[int, int] | None = None

    def set_state(
        self, *, rip: int | None = None, rflags: int | None = None, rsp: int | None = None
    ) -> None:
        """Start with other values than the frame's."""
        stated = ((_RIP, rip), (_RFLAGS, rflags), (_RSP, rsp))
        patches = {offset: value & _MASK for offset, value in stated if value is not None}
        if patches:
            self._patches = {**(self._patches or {}), **patches}

    def pack_into(self, memory: Any, slot: int) -> None:
        """Write this command into the slot at address ``slot`` of L1's memory (an mmap)."""
        packed = self.frame.packed
        memory[slot : slot + _OPERAND] = packed
        for name, value in self.given.items():
            _pack_quad(memory, slot + _OFFSET[name], value & _MASK)
        if self._patches:
            for offset, value in self._patches.items():
                _pack_quad(memory, slot + offset, value)
        operand = self.operand
        if operand:
            start = slot + _OPERAND
            memory[start : start + len(operand)] = operand

    @property
    def kind(self) -> Kind:
        """Whether this is a VM entry, another instruction or a list."""
        return self.frame.kind

    @property
    def name(self) -> str:
        """Name of the instruction or list, or the snippet's code in hexadecimal."""
        return f"code {self.code.hex()}" if self.code else self.frame.name

    @property
    def rip(self) -> int:
        """Linear address of the instruction, or of a list's first entry."""
        return (self._patches or {}).get(_RIP, self.frame.rip)

    @property
    def rflags(self) -> int:
        """RFLAGS before the instruction."""
        return (self._patches or {}).get(_RFLAGS, DEFAULT_RFLAGS)

    @property
    def regs(self) -> dict[str, int]:
        """Registers before the instruction; those that are absent are 0."""
        return {**self.frame.regs, **self.given}

    def __str__(self) -> str:
        """Return the line that a log shows: name and registers."""
        return f"{self.name} " + " ".join(f"{name}={n:#x}" for name, n in self.regs.items())


class Result:
    """What the payload recorded for one command: ``raw`` holds the slot, ``at`` its offset.

    ``status`` is STATUS_* of abi.inc; ``rip``, ``rflags`` and ``vector`` belong to the trap.
    """

    __slots__ = ("_at", "_raw", "rflags", "rip", "status", "vector")
    status: int
    rip: int
    rflags: int
    vector: int

    def __init__(self, raw: bytes, at: int) -> None:
        self._raw, self._at = raw, at
        self.status, self.rip, self.rflags, self.vector = _SEEN.unpack_from(raw, at)

    def _quad(self, number: int) -> int:
        return _QUAD.unpack_from(self._raw, self._at + _OUT + 8 * number)[0]  # type: ignore[no-any-return]

    @property
    def cs(self) -> int:
        """CS after the command."""
        return self._quad(1)

    @property
    def rsp(self) -> int:
        """RSP after the command."""
        return self._quad(3)

    @property
    def ss(self) -> int:
        """SS after the command."""
        return self._quad(4)

    @property
    def error(self) -> int:
        """Error code of the exception, 0 where it has none."""
        return self._quad(6)

    @property
    def cr2(self) -> int:
        """CR2 after the command."""
        return self._quad(7)

    @property
    def regs(self) -> dict[str, int]:
        """General registers after the command."""
        values = _REGISTERS.unpack_from(self._raw, self._at + _OUT_GPR)
        return dict(zip(GPRS, values, strict=True))


class Frames:
    """The frames of one vCPU of L1, each made when it is first asked for."""

    def __init__(self, payload: Payload, index: int) -> None:
        self._payload, self._index = payload, index
        #: Address of the operand of the first slot.
        self.operand = payload[f"cpu{index}_slots"] + _OPERAND
        self._usual: dict[str, Frame] = {}
        self._others: dict[tuple[object, ...], Frame] = {}
        self._lists: dict[tuple[str, int, int], Command] = {}

    def usual(self, name: str) -> Frame:
        """Frame of an instruction at CPL 0, in 64-bit mode, without blocking."""
        frame = self._usual.get(name)
        if frame is None:
            frame = self._usual[name] = self._make(name, 0, Mode.LONG, Shadow.NONE, False, None)
        return frame

    def get(
        self, name: str, cpl: int, mode: Mode, shadow: Shadow, via_ss: bool, at: int | None
    ) -> Frame:
        """Frame of an instruction; ``at`` is its memory operand, None for the slot's own."""
        key = (name, cpl, mode, shadow, via_ss, at)
        frame = self._others.get(key)
        if frame is None:
            frame = self._make(*key)
            if at is None:
                self._others[key] = frame
        return frame

    def _make(
        self, name: str, cpl: int, mode: Mode, shadow: Shadow, via_ss: bool, at: int | None
    ) -> Frame:
        payload = self._payload
        prefix = "insn_" if mode is Mode.LONG else "insn32_"
        kind = Kind.ENTRY if name in ("vmlaunch", "vmresume") else Kind.PLAIN
        regs = {}
        # L2 gets the registers that a case states; an operand of VMLAUNCH there is none.
        if at is not None or kind is Kind.PLAIN:
            regs["rbp" if via_ss else "rdi"] = self.operand if at is None else at
        code = {
            (0, Mode.LONG): "SEL_CODE64",
            (3, Mode.LONG): "SEL_USER_CODE64",
            (0, Mode.COMPAT): "SEL_CODE32",
            (3, Mode.COMPAT): "SEL_USER_CODE32",
        }[cpl, mode]
        return Frame(
            kind,
            name + shadow.value,
            payload["OP_EXECUTE"],
            payload[f"{prefix}{name}{'_ss' if via_ss else ''}{shadow.value}"],
            cs=payload[code],
            rsp=payload["snippet_stack_top"] - 2048 * self._index,
            ss=payload["SEL_USER_DATA" if cpl == 3 else "SEL_DATA"],
            ds=payload["SEL_USER_DATA"],
            regs=regs,
        )

    def list(self, op: str, first: int, count: int) -> Command:
        """Command for a list of ``count`` entries from address ``first``; ``op`` as in abi.inc."""
        key = (op, first, count)
        command = self._lists.get(key)
        if command is None:
            name = op.removeprefix("OP_")
            frame = Frame(Kind.LIST, name, self._payload[op], first, count=count)
            command = self._lists[key] = Command(frame, {})
        return command


def _check_layout(payload: Payload) -> None:
    """Check that the packed formats above are the payload's layout; PayloadError if not."""
    symbols = payload.symbols
    order = ("OP", "STATUS", "RIP", "CS", "RFLAGS", "RSP", "SS", "DS", "CR2", "GPR", "OPERAND")
    offsets = [0, 4, _RIP, 0x10, _RFLAGS, _RSP, 0x28, 0x30, _CR2, _GPR, _OPERAND]
    outs = ("RIP", "CS", "RFLAGS", "RSP", "SS", "VECTOR", "ERROR", "CR2", "GPR")
    right = (
        [symbols[f"SLOT_{name}"] for name in order] == offsets
        and [symbols["SLOT_LIST"], symbols["SLOT_LIST_COUNT"]] == offsets[2:4]
        and symbols["SLOT_OUT"] == _OUT
        and [symbols[f"OUT_{name}"] for name in outs] == [_OUT + 8 * i for i in range(9)]
        and symbols["LIST_ENTRY_SIZE"] == LIST_ENTRY.size
    )
    if not right:
        raise PayloadError("the payload's command slots differ from kvmnest/l1/command.py")


@functools.cache
def checked_payload() -> Payload:
    """Return the package's payload, its command slots checked. Raises PayloadError."""
    payload = payload_module.default()
    _check_layout(payload)
    return payload


@functools.cache
def frames(index: int) -> Frames:
    """Return the frames of vCPU ``index``, the same ones for every L1."""
    return Frames(checked_payload(), index)
