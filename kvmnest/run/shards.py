"""One run dealt out to several targets at once: their results join in one report."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from kvmnest.cases.events import Event
from kvmnest.run.judge import Judge
from kvmnest.run.loop import run_cases
from kvmnest.run.report import Report
from kvmnest.run.targets import Target

#: Makes a judge that tells the report; the argument is for the judge's ``watch``.
MakeJudge = Callable[[Callable[[Event], None]], Judge]


class _Stopped(Exception):
    """The run as a whole is over: another part of it failed, or Ctrl-C."""


class Shards:
    """Runs a part of the cases on each target, in a thread each.

    Each thread has a judge of its own, which ``make_judge`` makes.
    """

    def __init__(self, report: Report, make_judge: MakeJudge) -> None:
        self._report = report
        self._make_judge = make_judge
        self._stopped = False
        self._errors: list[BaseException] = []

    def run(self, targets: Sequence[Target], arguments: Sequence[str]) -> None:
        """Run to the end; raises what ``run_cases`` raises for any of the targets."""
        threads = [
            # Daemons: after Ctrl-C nobody waits for a guest that says nothing.
            threading.Thread(target=self._run_part, args=(target, arguments), daemon=True)
            for target in targets
        ]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        finally:
            self._stopped = True
            for thread in threads:
                thread.join(timeout=3)
        if self._errors:
            raise self._errors[0]

    def _run_part(self, target: Target, arguments: Sequence[str]) -> None:
        try:
            run_cases(target, arguments, self._make_judge(self._watch))
        except _Stopped:
            pass
        except BaseException as error:
            self._errors.append(error)
            self._stopped = True

    def _watch(self, event: Event) -> None:
        if self._stopped or self._report.run.stopped:
            raise _Stopped
