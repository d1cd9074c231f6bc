"""L2 as a subroutine: machine code in, what became of it out; controls by name."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Any

from kvmnest.l1 import L1, L2Mode
from kvmnest.vmx import (
    AccessRights,
    ExitReason,
    Field,
    IntrType,
    Proc2Ctl,
    ProcCtl,
    Vector,
    intr_info,
)
from kvmnest.vmx.control_fields import FIELD_OF
from kvmnest.vmx.numbers import enum_or_int
from kvmnest.vmx.outcome import ANY, Exit, Fault, Outcome, Succeed

#: Guest state that each run starts from, since the run before may have changed it.
_FRESH = (
    *(Field.GUEST_RSP, Field.GUEST_RFLAGS, Field.GUEST_INTERRUPTIBILITY_INFO),
    *(Field.GUEST_ACTIVITY_STATE, Field.GUEST_PENDING_DBG_EXCEPTIONS),
)
_REPORT = {
    L2Mode.LONG: ("l2_64_report", 8),
    L2Mode.PROTECTED: ("l2_32_report", 4),
    L2Mode.PAE: ("l2_32_report", 4),
    L2Mode.UNPAGED: ("l2_32_report", 4),
    L2Mode.REAL: ("l2_16_report", 2),
}
_CODE = {0: ("SEL_CODE64", 0xA09B), 3: ("SEL_USER_CODE64", 0xA0FB)}
_DATA = {0: ("SEL_DATA", 0xC093), 3: ("SEL_USER_DATA", 0xC0F3)}

#: General registers that VM entry and exit leave alone, with a value of its own for each.
PATTERN = {
    name: 0x0101010101010101 * number
    for number, name in enumerate(
        ("rax", "rcx", "rdx", "rbx", "rbp", "rsi", "rdi", *(f"r{n}" for n in range(8, 16))), 1
    )
}


class _NotValid:
    """Equal to each interruption-information value whose valid bit is 0; the rest is undefined."""

    __slots__ = ()
    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, int) and not other >> 31 & 1

    def __repr__(self) -> str:
        return "NOT_VALID"


NOT_VALID: Any = _NotValid()


class Masked:
    """Equal to each number with the same bits under a mask; the others are undefined."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, value: int, mask: int) -> None:
        self.value, self.mask = value & mask, mask

    def __eq__(self, other: object) -> bool:
        return isinstance(other, int) and other & self.mask == self.value

    def __repr__(self) -> str:
        return f"Masked({self.value:#x}, mask={self.mask:#x})"


class Guest:
    """A launchable L1 whose L2 runs snippets; each run starts from fresh RSP and RFLAGS.

    The outcome of a run is ``Succeed`` when L2 reached the end of its code, ``Fault`` for an
    exception that L2's own handler got (``rip`` is an offset into the code), else what L1 saw.
    """

    def __init__(
        self, l1: L1, *flags: enum.IntFlag, mode: L2Mode = L2Mode.LONG, ept: bool | None = None
    ) -> None:
        self.l1 = l1
        self.mode = mode
        self.vmcs = l1.launchable(mode=mode, ept=ept)
        self.start = self.size = 0
        self.loaded: dict[str, int] = {}
        self._launched = False
        self._segments: dict[Field, int] = {}
        self.on(*flags)

    def __repr__(self) -> str:
        return f"<Guest in {self.mode.name.lower()} mode>"

    # --- controls ---

    def on(self, *flags: enum.IntFlag) -> None:
        """Set VM-execution, VM-exit and VM-entry controls."""
        for flag in flags:
            if isinstance(flag, Proc2Ctl):
                self.on(ProcCtl.ACTIVATE_SECONDARY_CONTROLS)
            self.vmcs.set_bits(FIELD_OF[type(flag)], flag)

    def off(self, *flags: enum.IntFlag) -> None:
        """Clear VM-execution, VM-exit and VM-entry controls."""
        for flag in flags:
            self.vmcs.clear_bits(FIELD_OF[type(flag)], flag)

    def set_cpl(self, cpl: int) -> None:
        """Let L2 (in 64-bit mode) start at this privilege level."""
        self._segments.clear()
        for segment in ("CS", "SS", "DS", "ES"):
            name, rights = (_CODE if segment == "CS" else _DATA)[cpl]
            self._segments[Field[f"GUEST_{segment}_SELECTOR"]] = self.l1.sym(name)
            self._segments[Field[f"GUEST_{segment}_ACCESS_RIGHTS"]] = rights
            # A null SS that an event's delivery loads has these undefined.
            self._segments[Field[f"GUEST_{segment}_BASE"]] = 0
            self._segments[Field[f"GUEST_{segment}_LIMIT"]] = 0xFFFFFFFF

    # --- running ---

    def at(self, offset: int = 0) -> int:
        """RIP of an offset into the code."""
        return self.start + offset

    def handler(self, vector: int) -> int:
        """Offset from the code, once it has run, of L2's handler of a vector (in 64-bit mode)."""
        return self.l1.sym("l2_64_handlers") + 16 * vector - self.start

    def run(self, code: bytes, regs: Mapping[str, int] | None = None, /, **fields: int) -> Outcome:
        """Run code in L2 with these registers and, by name, VMCS fields."""
        self.start = self.l1.set_l2(code, self.vmcs)
        self.size = len(code)
        for field in _FRESH:
            self.vmcs[field] = self.vmcs.baseline[field]
        # An exception handler of L2 leaves it at CPL 0.
        self.vmcs.update(self._segments)
        for name, value in fields.items():
            self.vmcs[Field[name]] = value
        self.loaded = {**PATTERN, **(regs or {})}
        enter = self.l1.vmresume if self._launched else self.l1.vmlaunch
        return self._judge(enter(regs=dict(self.loaded)))

    def go_on(self, regs: dict[str, int] | None = None, *, skip: int = 0) -> Outcome:
        """VMRESUME where L2 stopped, ``skip`` bytes further."""
        if skip:
            self.l1.skip_l2_instruction(skip)
        self.loaded = regs or self.loaded
        return self._judge(self.l1.vmresume(regs=dict(self.loaded)))

    def resume(self) -> Outcome:
        """Go on after a ``HostExit``."""
        return self._judge(self.l1.resume())

    def _judge(self, seen: Outcome) -> Outcome:
        if not isinstance(seen, Exit):
            return seen
        self._launched = True
        if seen.reason != ExitReason.VMCALL:
            return seen
        if seen.rip == self.start + self.size:
            return Succeed(regs=seen.regs)
        report, word = _REPORT[self.mode]
        if seen.rip == self.l1.sym(report):
            vector, error, rip = self.l1.l2_frame(3, word)
            return Fault(
                enum_or_int(Vector, vector),
                error_code=error,
                cr2=seen.cr2,
                rip=rip - self.start,
                regs=seen.regs,
            )
        return seen

    def changed(self, seen: Outcome, *ignored: str) -> dict[str, int]:
        """General registers that differ from what L2 started with."""
        names = [name for name in PATTERN if name not in ignored]
        return {name: seen.regs[name] for name in names if seen.regs[name] != self.loaded[name]}

    # --- what is expected ---

    def exit(self, reason: ExitReason, length: Any = ANY, *, offset: int = 0, **more: Any) -> Exit:
        """The VM exit that an instruction of this length at an offset causes.

        One that comes before an instruction, or behind it like a trap, defines no length. The exit
        qualification is 0 unless stated: it is cleared for exits that do not define it; nor is
        there interruption or IDT-vectoring information unless stated.
        """
        expected = {"qualification": 0, "intr_info": NOT_VALID, "idt_info": NOT_VALID, **more}
        return Exit(reason, rip=self.at(offset), length=length, **expected)

    def exception(
        self,
        vector: Vector,
        error: int | None = None,
        *,
        offset: int = 0,
        type: IntrType = IntrType.HARDWARE_EXCEPTION,
        qualification: int = 0,
        **more: Any,
    ) -> Exit:
        """The VM exit that an exception intercepted by the exception bitmap causes."""
        if error is not None:
            more["intr_error"] = error
        info = intr_info(vector, type, error is not None)
        return self.exit(
            ExitReason.EXCEPTION_NMI,
            offset=offset,
            qualification=qualification,
            intr_info=info,
            **more,
        )


def copied_idt(l1: L1, types: Mapping[int, int] | None = None) -> int:
    """Address of a copy of L2's 64-bit IDT; ``types``: vector -> P, DPL and type of its gate."""
    idt = l1.alloc()
    l1.write(idt, l1.read(l1.sym("l2_idt"), 4096))
    for vector, kind in (types or {}).items():
        l1.write_int(idt + 16 * vector + 5, kind, 1)
    return idt


def rights(**parts: int) -> int:
    """Access-rights field; see ``AccessRights`` for the parts."""
    return int(AccessRights(**parts))
