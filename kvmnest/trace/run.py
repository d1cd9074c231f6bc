"""Run one case and collect its commands."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from kvmnest.errors import HarnessError, UsageError
from kvmnest.results.model import Case, Run
from kvmnest.results.progress import Progress
from kvmnest.results.reporter import Reporter
from kvmnest.results.runner import Plan, pytest_arguments, run_cases, split_selection
from kvmnest.results.targets import Ended, OnEvent, Target

Command = dict[str, Any]


class _Listening:
    """A target whose trace events are kept aside."""

    def __init__(self, target: Target, commands: list[Command]) -> None:
        self._target, self._commands = target, commands
        self.name, self.emulator = target.name, target.emulator
        self.guest_clock = target.guest_clock

    def place(self, paths: Sequence[str]) -> list[str]:
        return self._target.place(paths)

    def run(self, arguments: Sequence[str], on_event: OnEvent, first: int = 0) -> Ended:
        def take(event: dict[str, Any]) -> None:
            if event["e"] == "trace":
                self._commands.append(event)
            else:
                on_event(event)

        return self._target.run(arguments, take, first)


def trace(target: Target, case: str) -> tuple[Run, Case, list[Command]]:
    """Run ``case`` (an id of the suite, or FILE::NAME): what became of it, and its commands.

    Raises UsageError if that is not exactly one case, HarnessError if it could not be run, and
    what the target raises.
    """
    modules, paths = split_selection([case])
    if "::" not in case:
        raise UsageError(f"{case} is no single case: FILE::NAME (see kvmnest list)")
    commands: list[Command] = []
    listening = _Listening(target, commands)
    reporter = Reporter(
        Run(target.name, target.emulator), Progress(io.StringIO(), quiet=True), own_clock=True
    )
    arguments = [*pytest_arguments(Plan(), target.name, modules, target.place(paths))]
    run_cases(listening, ["--kvmnest-trace", *arguments], reporter)
    cases = reporter.run.cases
    if not cases:
        raise HarnessError(f"{case} did not run: {'; '.join(reporter.run.problems) or 'nothing'}")
    if len(cases) > 1:
        names = ", ".join(found.id for found in cases[:3])
        raise UsageError(f"{case} is {len(cases)} cases, name one: {names}, ...")
    return reporter.run, cases[0], commands
