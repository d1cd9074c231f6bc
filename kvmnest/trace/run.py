"""Run one case and collect its commands."""

from __future__ import annotations

from typing import Any

from kvmnest.cases.events import Event
from kvmnest.errors import HarnessError, UsageError
from kvmnest.reports.model import Case, Run
from kvmnest.run.loop import outcome
from kvmnest.run.names import functions
from kvmnest.run.selection import Selection, split_selection
from kvmnest.run.targets import Target

Command = dict[str, Any]


def check(case: str) -> None:
    """Raise UsageError if ``case`` cannot be one case; that needs no target."""
    split_selection([case])
    if "::" not in case and case not in functions():
        raise UsageError(f"{case} is not one case: FILE::NAME (see kvmnest list)")


def trace(target: Target, case: str) -> tuple[Run, Case, list[Command]]:
    """Run ``case`` (an id of the suite, or FILE::NAME): what became of it, and its commands.

    Raises UsageError if that is not exactly one case, HarnessError if it could not be run, and
    what the target raises.
    """
    check(case)
    commands: list[Command] = []

    def take(event: Event) -> None:
        if event["e"] == "trace":
            commands.append(event)

    run = outcome(target, Selection([case]), ["--kvmnest-trace"], take)
    cases = run.cases
    if not cases:
        raise HarnessError(f"{case} did not run: {'; '.join(run.problems) or 'nothing'}")
    if len(cases) > 1:
        names = ", ".join(found.id for found in cases[:3])
        raise UsageError(f"{case} is {len(cases)} cases, name one: {names}, ...")
    return run, cases[0], commands
