"""One run dealt out to several targets at once: their results join in one report."""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence

from kvmnest.cases.events import Event
from kvmnest.reports.model import Case, Run
from kvmnest.reports.progress import Progress
from kvmnest.run.loop import run_cases
from kvmnest.run.reporter import Enough, Reporter
from kvmnest.run.targets import Target


class _Stopped(Exception):
    """The run as a whole is over: another part of it failed, or Ctrl-C."""


class _Part(Reporter):
    """Judges the events of one target and passes what it finds on to the whole run."""

    def __init__(self, whole: Shards) -> None:
        run = Run(
            whole.reporter.run.target,
            whole.reporter.run.emulator,
            options=whole.reporter.run.options,
        )
        super().__init__(
            run, Progress(sys.stdout, quiet=True), rerun=whole.reporter.rerun, own_clock=True
        )
        self._whole = whole

    def event(self, event: Event) -> None:
        """Take one event, and pass on what concerns the whole run."""
        if self._whole.stopped:
            raise _Stopped
        super().event(event)
        self._whole.event(self.run, event)

    def store(self, case: Case) -> None:
        """Add a case here and to the whole run."""
        super().store(case)
        self._whole.store(case)

    def problem(self, text: str) -> None:
        """Record a problem of the whole run."""
        self._whole.problem(text)

    def note(self, text: str) -> None:
        """Show a line to the user."""
        self._whole.note(text)


class Shards:
    """Runs a part of the cases on each target, in a thread each."""

    def __init__(self, reporter: Reporter) -> None:
        self.reporter = reporter
        self.stopped = False
        self._lock = threading.Lock()
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
            self.stopped = True
            for thread in threads:
                thread.join(timeout=3)
        if self._errors:
            raise self._errors[0]
        run = self.reporter.run
        run.complete = len(run.cases) == len(run.planned)

    def _run_part(self, target: Target, arguments: Sequence[str]) -> None:
        part = _Part(self)
        try:
            run_cases(target, arguments, part)
        except _Stopped:
            pass
        except BaseException as error:
            with self._lock:
                self._errors.append(error)
            self.stopped = True
        with self._lock:
            self.reporter.run.no_longer += part.run.no_longer
            self.reporter.run.lost |= part.run.lost
            self.reporter.run.interrupted += part.run.interrupted

    def event(self, run: Run, event: Event) -> None:
        """Take over what a part learned from an event."""
        with self._lock:
            whole = self.reporter.run
            if event["e"] == "session" and not whole.facts:
                whole.facts = run.facts
            elif event["e"] == "collected" and event["first"] == 0:
                whole.planned += run.planned
                self.reporter.progress.planned(len(whole.planned))
            elif event["e"] == "start":
                whole.running = event["id"]
                self.reporter.progress.running(whole, event["id"])

    def store(self, case: Case) -> None:
        """Add a case to the reports of the whole run."""
        with self._lock:
            try:
                self.reporter.store(case)
            except Enough:
                self.stopped = True
                raise

    def problem(self, text: str) -> None:
        """Record a problem."""
        with self._lock:
            self.reporter.problem(text)

    def note(self, text: str) -> None:
        """Show a line to the user."""
        with self._lock:
            self.reporter.note(text)
