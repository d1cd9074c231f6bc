"""Two runs of the same program: where do they first see something else?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvmnest.fuzz.programs import defined
from kvmnest.fuzz.programs.observe import Seen
from kvmnest.fuzz.programs.places import Ran
from kvmnest.vmx import ExitReason, VmxError
from kvmnest.vmx.reasons import ExitReason as Reason

Value = Any


@dataclass(frozen=True)
class Difference:
    """What differs: ``what`` names it ("end", "parts.length", "guest.GUEST_CR0", "regs.rax").

    ``step`` and ``part`` say where: the number of the step, and of what was seen in it. ``end`` is
    what the instruction ended in, on the first machine, and ``ends`` has that and those before it.
    ``one`` and ``other`` are the values.
    """

    step: int
    part: int
    what: str
    end: str
    one: Value
    other: Value
    ends: frozenset[str] = field(default=frozenset(), compare=False)

    @property
    def signature(self) -> str:
        """Differences that are alike have the same one."""
        if self.what == "end":
            return f"{shown(self.one)} or {shown(self.other)}"
        return f"{self.what} after {self.end}"

    def __str__(self) -> str:
        where = f"step {self.step}" + (f", part {self.part}" if self.part else "")
        if self.what == "end":
            return f"{where}: {shown(self.one)} or {shown(self.other)}"
        return f"{where}: {self.what} {_number(self.one)} or {_number(self.other)} ({self.end})"


def _number(value: Value) -> str:
    return hex(value) if isinstance(value, int) else str(value)


def shown(found: Any) -> str:
    """An end in words: "Exit(CPUID)", "VMfailValid(7)", "lost: hang"."""
    if not isinstance(found, list) or not found:
        return str(found)
    name, *rest = found
    if name in ("Exit", "EntryFailure"):
        reason = Reason(rest[0]).name if rest[0] in [*ExitReason] else str(rest[0])
        return f"{name}({', '.join([reason, *map(hex, rest[1:])])})"
    if name == "VMfailValid" and rest[0] in [*VmxError]:
        return f"VMfailValid({rest[0]}: {VmxError(rest[0]).name})"
    return f"{name}({', '.join(map(str, rest))})" if rest else str(name)


class _State:
    """The whole of what only changes are seen of."""

    def __init__(self) -> None:
        self._guest: dict[str, int] = {}
        self._memory: dict[str, int] = {}

    def take(self, seen: Seen) -> dict[str, Value]:
        """Everything that one thing seen says and that is defined, by name."""
        found: dict[str, Value] = {}
        ended = seen.get("end", [""])
        if ended[0] == "Exit":
            parts = defined.parts(ended[1], seen.get("parts", {}))
            found |= {f"parts.{name}": value for name, value in parts.items()}
        found |= {f"regs.{name}": value for name, value in seen.get("regs", {}).items()}
        for name in ("cr2", "value", "failed", "taken"):
            if name in seen:
                found[name] = seen[name]
        found |= {f"host.{n}": value for n, value in enumerate(seen.get("host", ()))}
        if "guest" in seen:
            found["guest"] = seen["guest"] is not None
            self._guest.update(seen["guest"] or {})
            state = defined.guest(self._guest)
            found |= {f"guest.{name}": value for name, value in state.items()}
        self._memory.update(seen.get("memory", {}))
        if "memory" in seen:
            found |= {f"memory.{name}": value for name, value in self._memory.items()}
        return found


def values(ran: Ran) -> list[list[dict[str, Value]]]:
    """For each step, everything that is defined of each thing seen in it, by name."""
    state = _State()
    return [[{"end": seen.get("end"), **state.take(seen)} for seen in step] for step in ran.seen]


def differences(one: Ran, other: Ran) -> Iterator[Difference]:
    """All that differs, each once: in order, up to the first other end, behind which all may.

    What differs after a step and did so before with the same values is not told again.
    """
    states = _State(), _State()
    told: dict[str, tuple[Value, Value]] = {}
    ends: set[str] = set()
    for step in range(max(len(one.seen), len(other.seen))):
        if step >= min(len(one.seen), len(other.seen)):
            yield Difference(step, 0, "end", "", _whole(one, step), _whole(other, step))
            return
        parts = one.seen[step], other.seen[step]
        for part in range(max(map(len, parts))):
            if part >= min(map(len, parts)):
                yield Difference(
                    step, part, "end", "", _part(parts[0], part), _part(parts[1], part)
                )
                return
            first, second = (each[part] for each in parts)
            if first.get("end") != second.get("end"):
                yield Difference(step, part, "end", "", first.get("end"), second.get("end"))
                return
            end = shown(first.get("end"))
            ends.add(end)
            values = [s.take(seen) for s, seen in zip(states, (first, second), strict=True)]
            for name, pair in _differing(*values):
                if told.get(name) != pair:
                    told[name] = pair
                    yield Difference(step, part, name, end, *pair, frozenset(ends))
    if bool(one.crashed) != bool(other.crashed):
        went = [["crashed", ran.crashed] if ran.crashed else ["went on"] for ran in (one, other)]
        yield Difference(len(one.seen), 0, "end", "", went[0], went[1])


def _differing(
    one: Mapping[str, Value], other: Mapping[str, Value]
) -> Iterator[tuple[str, tuple[Value, Value]]]:
    for name in sorted(one.keys() | other.keys()):
        # A register that is absent is 0.
        absent = 0 if name.startswith("regs.") else None
        pair = one.get(name, absent), other.get(name, absent)
        if pair[0] != pair[1]:
            yield name, pair


def _whole(ran: Ran, step: int) -> list[str]:
    if ran.crashed:
        return ["crashed", ran.crashed]
    return ["went on"] if step < len(ran.seen) else ["ended"]


def _part(parts: Sequence[Seen], part: int) -> list[str]:
    return ["went on"] if part < len(parts) else ["ended"]
