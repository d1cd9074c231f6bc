"""How fast the emulators at hand are: CPU seconds of a cold boot, and of VM entries in L1.

CPU seconds of the emulator's process, not time: a busy machine changes them little.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kvmnest.lab.emulators import Choice
from kvmnest.lab.machine import Lab

#: Every figure is the least of so many rounds: what disturbs only makes slower.
ROUNDS = 3
_BOOT = ("python3", "-c", "0")
#: Thousands of commands, VM entries and exits of an L1, after the same boot.
_WORK = ("python3", "-m", "kvmnest.bench.measure")


@dataclass(frozen=True)
class Speed:
    """CPU seconds of one emulator: a cold boot to the first command, and the work after it."""

    path: str
    boot: float
    work: float


def speeds(
    programs: Sequence[str], kernel: str | None = None, rounds: int = ROUNDS
) -> Iterator[Speed]:
    """Measure each Bochs, in order. Raises what a lab raises."""
    for program in programs:
        choice = Choice(program=program)
        _run(choice, kernel, _BOOT)  # what is prepared once is not measured
        boot = min(_run(choice, kernel, _BOOT) for _ in range(rounds))
        both = min(_run(choice, kernel, _WORK) for _ in range(rounds))
        yield Speed(program, boot, both - boot)


def _run(choice: Choice, kernel: str | None, command: Sequence[str]) -> float:
    """Boot from cold and run a command; CPU seconds of the processes that this started."""
    began = _children()
    Lab(kernel, emulator=choice, snapshots=False).output(command, " ".join(command), idle_limit=600)
    return _children() - began


def _children() -> float:
    """CPU seconds of all children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
