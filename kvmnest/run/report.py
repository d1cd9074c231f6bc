"""The report of a whole run: what its judges find, joined, on the terminal and in files."""

from __future__ import annotations

import datetime
import threading
import time
from pathlib import Path
from typing import Any

from kvmnest.reports.jsonfile import JsonFile
from kvmnest.reports.junit import JUnitFile
from kvmnest.reports.model import Case, Loss, Run
from kvmnest.reports.progress import Progress
from kvmnest.run.judge import Enough, Listener


class Report(Listener):
    """Keeps one ``Run`` and every report of it up to date; judges may tell it from many threads.

    Args:
        run: what is known before the first case; the report fills it.
        progress: where the progress goes.
        json_path, junit_path: files to write, if any. HarnessError if one cannot be written.
        strict_known: a listed deviation that no longer happens fails the run.
        maxfail: stop after so many failures and errors, 0 for never.
    """

    def __init__(
        self,
        run: Run,
        progress: Progress,
        *,
        json_path: Path | None = None,
        junit_path: Path | None = None,
        strict_known: bool = False,
        maxfail: int = 0,
    ) -> None:
        self.run = run
        self.progress = progress
        #: Whether cases will be planned that are not known yet.
        self.more_to_come = False
        self._strict_known = strict_known
        self._maxfail = maxfail
        self._lock = threading.RLock()
        self._started = time.monotonic()
        run.started = _now()
        self._files: list[JsonFile | JUnitFile] = []
        if json_path:
            self._files.append(JsonFile(json_path))
        if junit_path:
            self._files.append(JUnitFile(junit_path))
        for file in self._files:
            file.start(run)

    def facts(self, facts: dict[str, Any]) -> None:
        """Those of the first machine are those of the run."""
        with self._lock:
            self.run.facts = self.run.facts or facts

    def planned(self, ids: list[str]) -> None:
        """Add cases to the plan."""
        with self._lock:
            again = bool(self.run.planned)
            if not again:
                self._started = time.monotonic()
            self.run.planned = [*self.run.planned, *ids]
            self._look_whether_complete()
            self.progress.planned(len(self.run.planned), again=again)

    def started(self, case_id: str) -> None:
        """Show that a case starts."""
        with self._lock:
            self.run.running = case_id
            self.progress.running(self.run, case_id)

    def lost(self, case_id: str, loss: Loss) -> None:
        """Remember how the process was lost."""
        with self._lock:
            self.run.lost[case_id] = loss

    def interrupted(self, case_id: str) -> None:
        """Remember which case ended its session."""
        with self._lock:
            self.run.interrupted.append(case_id)

    def no_longer(self, case_id: str, why: str) -> None:
        """Remember a known deviation that did not happen."""
        with self._lock:
            self.run.no_longer.append((case_id, why))

    def ended(self, case: Case) -> None:
        """Add a case to the reports. Raises Enough, see ``maxfail``."""
        with self._lock:
            self.run.running = None
            self.run.cases.append(case)
            self._look_whether_complete()
            self._write()
            # Told after it is stored: what the user has seen must not be lost.
            self.progress.ended(self.run, case)
            counts = self.run.summary()
            bad = counts["failed"] + counts["error"]
            if self._maxfail and bad >= self._maxfail and not self.run.complete:
                self.run.stopped = f"stopped after {bad} failure{'s' * (bad != 1)}, as asked"
                raise Enough

    def _look_whether_complete(self) -> None:
        done = len(self.run.cases) == len(self.run.planned)
        self.run.complete = done and not self.more_to_come

    def no_more(self) -> None:
        """All cases are planned: the run is complete once each has ended."""
        with self._lock:
            self.more_to_come = False
            self._look_whether_complete()

    def problem(self, text: str) -> None:
        """Record something outside of the cases that went wrong, and write it down."""
        with self._lock:
            self.run.problems.append(text)
            self._write()

    def note(self, text: str) -> None:
        """Show a line to the user."""
        with self._lock:
            self.progress.line(text)

    # --- the end ---

    def finish(self, *, summary: bool = True) -> int:
        """Write every report for the last time; return the exit code of the run."""
        with self._lock:
            self.run.finished = _now()
            self.run.running = None
            self._write()
            self.run.problems += [file.problem for file in self._files if file.problem]
            if summary:
                self.progress.finish(self.run)
            return exit_code(self.run, strict_known=self._strict_known)

    def _write(self) -> None:
        self.run.seconds = round(time.monotonic() - self._started, 3)
        for file in self._files:
            file.write(self.run)


def exit_code(run: Run, *, strict_known: bool = False) -> int:
    """0 all passed or known, 1 a case failed, 3 harness or environment error, 4 nothing ran."""
    counts = run.summary()
    if counts["failed"] or (strict_known and run.no_longer):
        return 1
    if counts["error"] or run.problems:
        return 3
    if counts["passed"] + counts["known"] == 0:
        return 4
    return 0


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
