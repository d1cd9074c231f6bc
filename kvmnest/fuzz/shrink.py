"""The smallest difference from the base VMCS that still shows what a finding shows.

Most findings show in a new L1. One that depends on what KVM remembers of earlier entries needs
some of those too: a sequence of cases, of which the last is the finding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

from kvmnest.fuzz.execute import Seen
from kvmnest.fuzz.judge import DISAGREE, Judge
from kvmnest.fuzz.machines import FuzzMachine, try_sequences
from kvmnest.fuzz.model import FuzzCase
from kvmnest.fuzz.run import Finding, name_of
from kvmnest.l1.baseline import L2Mode

_MOST_BITS = 32

Steps = tuple[FuzzCase, ...]
Item = TypeVar("Item")


class NotAgain(Exception):
    """The finding does not show when its cases are tried again."""


def smaller(judge: Judge, case: FuzzCase) -> Iterator[FuzzCase]:
    """Cases one step simpler: a change less, less memory, one bit instead of many, 64-bit L2."""
    base = judge.base(case)
    for field in case.changes:
        # Alone, and everything but this.
        yield replace(case, changes={field: case.changes[field]})
        rest = {other: value for other, value in case.changes.items() if other is not field}
        yield replace(case, changes=rest)
    for label in case.memory:
        yield replace(case, memory={k: v for k, v in case.memory.items() if k != label})
    if case.mode is not L2Mode.LONG:
        yield replace(case, mode=L2Mode.LONG, v8086=False)
    if case.v8086:
        yield replace(case, v8086=False)
    for field, value in case.changes.items():
        differing = (value ^ base.get(field, 0)) & field.width.mask
        # A value with more other bits is another one altogether, not one with bits flipped.
        if 1 < differing.bit_count() <= _MOST_BITS:
            for bit in range(field.width.bits):
                if differing >> bit & 1:
                    # One bit less, and this bit alone.
                    yield replace(case, changes={**case.changes, field: value ^ 1 << bit})
                    alone = base.get(field, 0) ^ 1 << bit
                    yield replace(case, changes={**case.changes, field: alone})
                    yield replace(case, changes={field: alone})
    if not case.bare:
        yield replace(case, bare=True)


def size(judge: Judge, case: FuzzCase) -> tuple[int, ...]:
    """What makes a case simple, the most important first."""
    base = judge.base(case)
    bits = sum(
        ((value ^ base.get(field, 0)) & field.width.mask).bit_count()
        for field, value in case.changes.items()
    )
    base_of = case.v8086, case.mode is not L2Mode.LONG, not case.bare
    return len(case.changes), len(case.memory), bits, *base_of


def without(items: Sequence[Item]) -> Iterator[tuple[Item, ...]]:
    """Without half, a quarter... of the items, down to one at a time."""
    part = (len(items) + 1) // 2
    while part:
        for start in range(0, len(items), part):
            yield (*items[:start], *items[start + part :])
        part = part // 2 if part > 1 else 0


def shorter(steps: Steps) -> Iterator[Steps]:
    """Without some of the cases before the last."""
    for before in without(steps[:-1]):
        yield (*before, steps[-1])


def simpler(judge: Judge, steps: Steps) -> Iterator[Steps]:
    """As long, with one of the cases a step simpler."""
    for index, case in enumerate(steps):
        now = size(judge, case)
        found = {str(other.to_json()): other for other in smaller(judge, case)}
        for other in sorted(found.values(), key=lambda other: size(judge, other)):
            if size(judge, other) < now:
                yield (*steps[:index], other, *steps[index + 1 :])


class Shrinker:
    """Simplifies one finding on ``machine``."""

    def __init__(self, machine: FuzzMachine, judge: Judge, finding: Finding) -> None:
        self._machine, self._judge, self._finding = machine, judge, finding
        self._rules = {str(violation) for violation in judge.violations(finding.case)}
        self._best = finding

    def run(self) -> Finding:
        """Simplify as long as the outcome and the disagreement stay; each round is one run.

        The broken rules may become fewer, but must be some of those of the beginning (or none, if
        there were none). Raises NotAgain if the finding does not show again.
        """
        if not self._take(self._beginnings()):
            raise NotAgain
        self._shorten()
        while self._take(simpler(self._judge, self._steps)):
            pass
        self._shorten()
        return self._best

    @property
    def _steps(self) -> Steps:
        return (*self._best.before, self._best.case)

    def _beginnings(self) -> Iterator[Steps]:
        """The finding by itself, then after more and more of the latest cases before it."""
        last, before = self._finding.case, self._finding.before
        count = 0
        while count < len(before):
            yield (*before[len(before) - count :], last)
            count = min(len(before), 2 * count or 1)
        yield (*before, last)

    def _shorten(self) -> None:
        while self._best.before and self._take(shorter(self._steps)):
            pass

    def _take(self, candidates: Iterable[Steps]) -> bool:
        """Try all, and go on with the first that shows the finding; False if none does."""
        worthwhile = [steps for steps in candidates if self._same_rules(steps[-1])]
        found: Finding | None = None

        def shows(index: int, seen: Seen) -> bool:
            nonlocal found
            if name_of(seen) != name_of(self._finding.seen):
                return False
            *before, case = worthwhile[index]
            verdict = self._judge.verdict(case, seen)
            if verdict.kind == DISAGREE:
                found = replace(
                    self._best, case=case, before=tuple(before), seen=seen, verdict=verdict
                )
            return found is not None

        try_sequences(self._machine, worthwhile, shows)
        self._best = found or self._best
        return found is not None

    def _same_rules(self, case: FuzzCase) -> bool:
        left = {str(violation) for violation in self._judge.violations(case)}
        return left <= self._rules and bool(left) == bool(self._rules)
