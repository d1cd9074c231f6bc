"""Where programs run: KVM of this machine or of the lab, and the reference CPU."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from kvmnest.errors import HarnessError
from kvmnest.fuzz.journal import FACTS_SCHEMA
from kvmnest.fuzz.machines import LocalMachine, OnEvent, Task
from kvmnest.fuzz.programs.observe import Seen
from kvmnest.fuzz.programs.program import Program
from kvmnest.reference.emulator import find
from kvmnest.schema import COUNT, TEXT

MODULE = "kvmnest.fuzz.programs.execute"
#: What the executor says.
EVENT_SCHEMA = {
    "type": "object",
    "additionalProperties": False,
    "dependentRequired": {"seen": ["end"], "end": ["seen"]},
    "properties": {
        "start": COUNT,
        "step": COUNT,
        "end": COUNT,
        "seen": {
            "type": "array",
            "items": {
                "type": "array",
                "items": {"type": "object", "properties": {"end": {"type": "array"}}},
            },
        },
        "facts": FACTS_SCHEMA,
        "coverage": {"type": "object"},
        "kernel": TEXT,
    },
}

Numbered = Sequence[tuple[int, Program]]


class Doing(Protocol):
    """A machine that does tasks; see kvmnest.fuzz.machines."""

    name: str

    def do(self, task: Task, on_event: OnEvent, journal: Path | None = None) -> str:
        """Do a task; "" or how it was lost."""
        ...


@dataclass
class Ran:
    """What became of one program: what was seen of each step, and what killed the rest."""

    seen: list[list[Seen]]
    crashed: str = ""
    warning: str = ""


class Place:
    """Runs programs on one machine.

    ``cpu`` names the reference CPU ("bochs", "model"); with ``moved`` the VM is saved, and restored
    into a new one, before each step; with ``quiet`` the host does nothing that L1 may not see;
    ``journal`` is where the steps of a machine that they can crash go.
    """

    def __init__(
        self,
        name: str,
        machine: Doing,
        cpu: Mapping[str, str] | None = None,
        *,
        moved: bool = False,
        quiet: bool = False,
        journal: Path | None = None,
    ) -> None:
        self.name, self._machine = name, machine
        self._cpu, self._journal = dict(cpu or {}), journal
        self._how = {"moved": moved, "quiet": quiet}
        self.facts: dict[str, Any] = {}

    def ask(self) -> dict[str, Any]:
        """What this machine is. Raises HarnessError if it does not say."""
        self._do({"programs": []}, lambda event: None)
        if not self.facts:
            raise HarnessError(f"{self.name} does not tell what it is")
        return self.facts

    def _do(self, work: Mapping[str, Any], on_event: OnEvent) -> str:
        content = json.dumps({**work, **self._cpu}).encode()

        def take(event: dict[str, Any]) -> None:
            if "facts" in event:
                self.facts = event["facts"]
            on_event(event)

        return self._machine.do(Task(MODULE, content, EVENT_SCHEMA), take, self._journal)

    def run(
        self,
        programs: Numbered,
        assumed: Mapping[str, Any],
        on_event: OnEvent = lambda event: None,
        *,
        steps: bool = False,
        enough: Callable[[int, Ran], bool] = lambda number, ran: False,
    ) -> dict[int, Ran]:
        """Run programs that assume some capabilities ("msrs", "cpuid"); what became of each.

        A program that kills the machine is an outcome, and the next gets a new one; not all are
        there if ``enough`` said so of one. Raises HarnessError if no program can be started.
        """
        found: dict[int, Ran] = {}
        left = list(programs)
        warnings: dict[int, str] = {}
        while left:
            running = step = -1

            def take(event: dict[str, Any]) -> None:
                nonlocal running, step
                on_event(event)
                if "start" in event:
                    running, step = event["start"], -1
                elif "step" in event:
                    step = event["step"]
                elif "kernel" in event and running >= 0:
                    warnings.setdefault(running, event["kernel"])
                elif "end" in event:
                    found[event["end"]] = ran = Ran(event["seen"])
                    if enough(event["end"], ran):
                        raise _Enough

            work: dict[str, Any] = {"programs": [[n, p.to_json()] for n, p in left]}
            work |= {"msrs": assumed["msrs"], "cpuid": assumed["cpuid"]}
            work |= {"steps": steps, **self._how}
            try:
                why = self._do(work, take)
            except _Enough:
                break
            if why:
                if running < 0 or running in found:
                    raise HarnessError(f"{self.name}: no program was started: {why}")
                found[running] = Ran([], f"step {step}: {why}" if step >= 0 else why)
            missing = [(n, program) for n, program in left if n not in found]
            if len(missing) == len(left):
                raise HarnessError(f"{self.name} ran none of {len(left)} programs")
            left = missing
        for number, text in warnings.items():
            if number in found:
                found[number].warning = text
        return found


def reference(program: str | None, model: str | None) -> Place:
    """The reference CPU, by the user's Bochs and CPU model if they are given.

    Raises LabSetupError if there is no such Bochs.
    """
    cpu = find(program, model)
    named = {"bochs": str(cpu.path), "model": cpu.model.name}
    return Place("the reference CPU", LocalMachine(), named)


class _Enough(Exception):
    """What was looked for is found."""


def common(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Facts of a machine that can what both can: what programs may assume.

    In the capability MSRs with two halves a control must be 1 if one machine says so, and may be
    if both do (SDM, appendix "VMX Capability Reporting Facility").
    """
    halves = {*range(0x481, 0x485), 0x48B, *range(0x48D, 0x491)}
    msrs = {}
    for name in first["msrs"].keys() & second["msrs"].keys():
        one, two = first["msrs"][name], second["msrs"][name]
        low = one & two
        if int(name) in halves:
            low = (one | two) & 0xFFFFFFFF | one & two & 0xFFFFFFFF << 32
        elif int(name) in (0x486, 0x488):  # bits of CR0 and CR4 that must be 1
            low = one | two
        elif int(name) in (0x480, 0x485, 0x48A):  # numbers and flags: the first machine's
            low = one
        msrs[name] = low
    seconds = {(leaf, sub): rest for leaf, sub, *rest in second["cpuid"]}
    cpuid = [
        [leaf, sub, *(_both(leaf, a, b) for a, b in zip(rest, seconds[leaf, sub], strict=True))]
        for leaf, sub, *rest in first["cpuid"]
        if (leaf, sub) in seconds
    ]
    return {**first, "msrs": msrs, "cpuid": cpuid}


def _both(leaf: int, one: int, two: int) -> int:
    # Leaf 80000008H holds numbers of bits.
    return one if leaf in (0x80000008, 0xA) else one & two
