"""Consumes the events of the processes that run cases and keeps every report up to date."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable
from pathlib import Path

from kvmnest import disassembly, kernel_reports, known
from kvmnest.cases.events import DamagedEvent, Event
from kvmnest.errors import HarnessError
from kvmnest.reports.jsonfile import JsonFile
from kvmnest.reports.junit import JUnitFile
from kvmnest.reports.model import Case, Loss, Run
from kvmnest.reports.progress import Progress

#: How the summary of a case begins in which the kernel or the process died.
CRASHED = "crashed: "


class Enough(Exception):
    """So many cases have failed that the run is to stop, as the user asked."""


class Reporter:
    """Results of one run, over as many processes as it takes.

    Args:
        run: what is known before the first event; the reporter fills it.
        progress: where the progress goes.
        json_path, junit_path: files to write, if any. HarnessError if one cannot be written.
        rerun: gives the command that runs one case again, from its id.
        strict_known: a listed deviation that no longer happens fails the run.
        maxfail: stop after so many failures and errors, 0 for never.
        own_clock: measure cases by this process' clock, for guests whose clock means nothing.
    """

    def __init__(
        self,
        run: Run,
        progress: Progress,
        *,
        json_path: Path | None = None,
        junit_path: Path | None = None,
        rerun: Callable[[str], str] = lambda case_id: "",
        strict_known: bool = False,
        maxfail: int = 0,
        own_clock: bool = False,
    ) -> None:
        self.run = run
        self.progress = progress
        self.strict_known = strict_known
        #: Cases that ended by themselves since the last lost process.
        self.finished_since_loss = 0
        #: Whether the present process reported its end, and pytest's exit status.
        self.ended: int | None = None
        #: What ended its session before the last case, "" if nothing did.
        self.why_ended = ""
        #: Whether cases will be planned that are not known yet.
        self.more_to_come = False
        #: Files that could not be collected: (where, text).
        self.broken: list[tuple[str, str]] = []
        self._maxfail = maxfail
        self.rerun = rerun
        self.own_clock = own_clock
        self._known: known.Known | None = None
        self._current: Event = {}
        self._began = self._started = time.monotonic()
        self._kernel_log = self._last_words = ""
        self._cases_read_log = False
        self._series: dict[str, int | None] = {}
        run.started = _now()
        self._files: list[JsonFile | JUnitFile] = []
        if json_path:
            self._files.append(JsonFile(json_path))
        if junit_path:
            self._files.append(JUnitFile(junit_path))
        for file in self._files:
            file.start(run)

    # --- events ---

    def event(self, event: Event) -> None:
        """Take one event. Raises HarnessError if it contradicts the ones before."""
        kind = event.get("e")
        if kind == "session":
            self._session(event)
        elif kind == "collected":
            self._collected(event)
        elif kind == "start":
            self._start(event)
        elif kind == "result":
            self._result(event)
        elif kind == "broken":
            self.broken.append((event["where"], event["detail"]))
        elif kind == "kernel":
            self._kernel(event)
        elif kind in ("trace", "listed", "coverage"):
            pass  # for those who watch
        elif kind == "end":
            self.ended, self.why_ended = event["status"], event["why"]
        else:
            raise HarnessError(f"unknown event from the cases' process: {event!r:.200}")

    def _kernel(self, event: Event) -> None:
        """Messages of the kernel: as the cases' process reads them, or the lab's PID 1.

        The former belong to the case whose result comes next. The latter may come early or late;
        they are needed where the process cannot read the log, or does not live to tell.
        """
        if event.get("from_lab"):
            self._last_words += event["text"]
        else:
            self._kernel_log += event["text"]

    def _session(self, event: Event) -> None:
        self.ended = None
        self._cases_read_log = bool(event.get("kernel_log"))
        if not self.run.facts:
            self.run.facts = {name: value for name, value in event.items() if name != "e"}
            # An option of the run counts as a parameter: some deviations need it.
            moved = "Y" if self.run.options.get("nested_roundtrip") else "N"
            params = {**event["kvm_params"], "nested_roundtrip": moved}
            self._known = known.load(
                self.run.target,
                event["kernel"],
                params,
                emulator=self.run.emulator,
                cpu_flags=event.get("cpu_flags", ""),
            )
        elif event["kernel"] != self.run.kernel:
            raise HarnessError(f"the kernel changed from {self.run.kernel} to {event['kernel']}")

    def _collected(self, event: Event) -> None:
        if event["first"] == 0:
            self.run.planned = [case[0] for case in event["cases"]]
            self._series = {case[0]: case[1] for case in event["cases"]}
            self._started = time.monotonic()
            self.progress.planned(len(self.run.planned))
        elif event["count"] != len(self.run.planned):
            raise HarnessError(
                f"a restart found {event['count']} cases instead of {len(self.run.planned)}"
            )

    def _start(self, event: Event) -> None:
        done = len(self.run.cases)
        if self.run.running or [event["id"]] != self.run.planned[done : done + 1]:
            raise DamagedEvent(f"the cases' process starts {event['id']:.200}, which is not next")
        self._current = event
        self._began = time.monotonic()
        self.run.running = event["id"]
        self.progress.running(self.run, event["id"])

    def _result(self, event: Event) -> None:
        if event["id"] != self.run.running:
            raise DamagedEvent(f"a result of {event['id']:.200}, which does not run")
        seconds = time.monotonic() - self._began if self.own_clock else event["seconds"]
        self._add(
            Case(
                id=event["id"],
                series=event["series"],
                sdm=event["sdm"],
                outcome=event["outcome"],
                seconds=round(seconds, 6),
                detail=disassembly.expand(event["detail"]),
                summary=event.get("summary", ""),
            )
        )
        if event["outcome"] != "skipped":
            self.finished_since_loss += 1

    def _add(self, case: Case) -> None:
        deviation = self._known.match(case.id) if self._known else None
        if deviation and self.run.lost.get(case.id) == "crash" and not deviation.crash:
            deviation = None  # what is known of it is no such end
        if deviation and case.outcome in ("failed", "error"):
            case.outcome = "known"
            case.detail = f"{deviation.text}\n\n{case.detail}"
            case.summary = deviation.text
        elif deviation and case.outcome == "passed":
            self.run.no_longer.append((case.id, deviation.text))
        case.kernel_log = self._kernel_log
        if not self._cases_read_log or case.id in self.run.lost:
            case.kernel_log += self._last_words
        self._kernel_log = self._last_words = ""
        self._judge_messages(case)
        if case.outcome in ("failed", "error"):
            case.rerun = self.rerun(case.id)
        self._current = {}
        self.store(case)

    def _judge_messages(self, case: Case) -> None:
        """Fail a case during which the kernel reported a defect that is not known."""
        found = kernel_reports.reports(case.kernel_log)
        if not found or case.outcome == "error":
            return
        listed = [self._known.match_message(case.id, text) if self._known else None
                  for text in found]  # fmt: skip
        news = [text for text, entry in zip(found, listed, strict=True) if entry is None]
        entry = next((entry for entry in listed if entry is not None), None)
        what = f"the kernel reported: {news[0]}" if news else entry.text if entry else ""
        if news and case.outcome != "failed":
            case.outcome, case.summary = "failed", what
        elif not news and case.outcome in ("passed", "skipped"):
            case.outcome, case.summary = "known", what
        said = kernel_reports.told(case.kernel_log)
        case.detail = f"{what}\n{said}\n\n{case.detail}".rstrip()

    def store(self, case: Case) -> None:
        """Add a case that is judged already to the reports. Raises Enough, see ``maxfail``."""
        self.run.running = None
        self.run.cases.append(case)
        done = len(self.run.cases) == len(self.run.planned)
        self.run.complete = done and not self.more_to_come
        self._write()
        # Told after it is stored: what the user has seen must not be lost.
        self.progress.ended(self.run, case)
        counts = self.run.summary()
        bad = counts["failed"] + counts["error"]
        if self._maxfail and bad >= self._maxfail and not self.run.complete:
            self.run.stopped = f"stopped after {bad} failure{'s' * (bad != 1)}, as asked"
            raise Enough

    # --- a process that did not get to its end ---

    def lost(self, why: str, loss: Loss = "crash") -> None:
        """Record the loss of the process: the case that ran, or was next, is in error."""
        self.finished_since_loss = 0
        if self.run.planned and not self.run.complete:
            self.run.lost[self._present()] = loss
            self._lose(f"{CRASHED}{why.partition(chr(10))[0]}", why)

    def interrupted(self, why: str) -> None:
        """Record that the session ended in the middle: the case that ran, or was next, did it."""
        self.finished_since_loss = 0
        name = self._present()
        self.run.interrupted.append(name)
        self._lose(f"ended the session: {why}", why)
        self.problem(f"{name} ended the session: {why}")

    def _present(self) -> str:
        return self.run.running or self.run.planned[len(self.run.cases)]

    def _lose(self, summary: str, why: str) -> None:
        name = self._present()
        seconds = time.monotonic() - self._began if self._current else 0.0
        self._add(
            Case(
                id=name,
                series=self._series.get(name),
                sdm=self._current.get("sdm"),
                outcome="error",
                seconds=round(seconds, 6),
                detail=why,
                summary=summary,
            )
        )

    def problem(self, text: str) -> None:
        """Record something outside of the cases that went wrong, and write it down."""
        self.run.problems.append(text)
        self._write()

    def note(self, text: str) -> None:
        """Show a line to the user."""
        self.progress.line(text)

    # --- the end ---

    def finish(self, *, summary: bool = True) -> int:
        """Write every report for the last time; return the exit code of the run."""
        self.run.finished = _now()
        self.run.running = None
        self._write()
        self.run.problems += [file.problem for file in self._files if file.problem]
        if summary:
            self.progress.finish(self.run)
        return exit_code(self.run, strict_known=self.strict_known)

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
