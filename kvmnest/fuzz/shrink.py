"""The smallest difference from the base VMCS that still shows what a finding shows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from kvmnest.fuzz.judge import DISAGREE, Judge
from kvmnest.fuzz.machines import Machine, try_all
from kvmnest.fuzz.model import FuzzCase
from kvmnest.fuzz.run import Finding, name_of
from kvmnest.l1.baseline import L2Mode


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
        yield replace(case, mode=L2Mode.LONG)
    for field, value in case.changes.items():
        differing = (value ^ base.get(field, 0)) & field.width.mask
        if differing & (differing - 1):
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
    return len(case.changes), len(case.memory), bits, case.mode is not L2Mode.LONG, not case.bare


def shrink(machine: Machine, judge: Judge, finding: Finding) -> Finding:
    """Simplify as long as the outcome and the disagreement stay; each round is one run.

    The broken rules may become fewer, but must be some of those of the beginning (or none, if
    there were none).
    """
    rules = {str(violation) for violation in judge.violations(finding.case)}
    best = finding
    while True:
        candidates = sorted(
            {str(case.to_json()): case for case in smaller(judge, best.case)}.values(),
            key=lambda case: size(judge, case),
        )
        now = size(judge, best.case)
        candidates = [case for case in candidates if size(judge, case) < now]
        worthwhile = []
        for case in candidates:
            left = {str(violation) for violation in judge.violations(case)}
            if left <= rules and bool(left) == bool(rules):
                worthwhile.append(case)
        for case, seen in zip(worthwhile, try_all(machine, worthwhile), strict=True):
            if seen is None or name_of(seen) != name_of(finding.seen):
                continue
            verdict = judge.verdict(case, seen)
            if verdict.kind == DISAGREE:
                best = replace(best, case=case, seen=seen, verdict=verdict)
                break
        else:
            return best
