"""A program in a case: what is seen of it on one machine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvmnest.errors import UsageError
from kvmnest.fuzz.programs import program as programs
from kvmnest.fuzz.programs.compare import values
from kvmnest.fuzz.programs.places import Ran
from kvmnest.fuzz.programs.steps import Doer, run
from kvmnest.l1 import L1
from kvmnest.reference.kvm import ReferenceKvm


def replay(l1: L1, steps: Sequence[programs.Step]) -> list[list[dict[str, Any]]]:
    """Do the steps on ``l1``; for each step, what was seen of it, by the names of differences.

    Raises UsageError if these are no steps of a program.
    """
    program = programs.Program(tuple(steps))
    problem = programs.problem(program.to_json())
    if problem:
        raise UsageError(f"no program: {problem}")
    doer = Doer(l1, l1.caps, bare=isinstance(l1.kvm, ReferenceKvm))
    try:
        seen = list(run(program, doer, lambda number: None))
    finally:
        doer.host.finish()
    return values(Ran(seen))
