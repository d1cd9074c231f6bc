"""Judges what runs on one target: events in, the outcome of each case out."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from kvmnest import disassembly, kernel_reports, known
from kvmnest.cases.events import DamagedEvent, Event
from kvmnest.errors import HarnessError, first_line
from kvmnest.reports.model import FAILED, Case, Loss, Run
from kvmnest.run import under_settings
from kvmnest.settings import DEFAULT, Setting

#: How the summary of a case begins in which the kernel or the process died.
CRASHED = "crashed: "


class Enough(Exception):
    """Raised by a listener that wants no more of a run: ``run_cases`` then ends it."""


class Listener:
    """Is told what a judge finds, as it finds it; each method does nothing unless it is replaced.

    Ids are those of the whole run: CASE@SETTING for a case that runs under a setting. What a method
    raises ends the run.
    """

    def facts(self, facts: dict[str, Any]) -> None:
        """What the machine under test says of itself."""

    def planned(self, ids: list[str]) -> None:
        """These cases will run."""

    def started(self, case_id: str) -> None:
        """A case starts."""

    def lost(self, case_id: str, loss: Loss) -> None:
        """The process or the kernel is lost in this case, which ends then, if it can."""

    def interrupted(self, case_id: str) -> None:
        """This case ended the session of pytest it ran in."""

    def no_longer(self, case_id: str, why: str) -> None:
        """A case of a known deviation passed; ``why`` it is known."""

    def ended(self, case: Case) -> None:
        """A case has its outcome."""

    def problem(self, text: str) -> None:
        """Something outside of the cases went wrong."""

    def note(self, text: str) -> None:
        """A line for the user."""


class Judge:
    """Folds the events of one target's processes, as many as it takes, into a ``Run``.

    Args:
        run: what is known before the first event; the judge fills it.
        listener: is told of everything that is added to it.
        setting: of KVM, under which the cases run here.
        rerun: gives the command that runs one case again, from its id.
        own_clock: measure cases by this process' clock, for guests whose clock means nothing.
        watch: gets each event first; what it raises ends the run.
    """

    def __init__(
        self,
        run: Run,
        listener: Listener | None = None,
        *,
        setting: Setting = DEFAULT,
        rerun: Callable[[str], str] = lambda case_id: "",
        own_clock: bool = False,
        watch: Callable[[Event], None] = lambda event: None,
    ) -> None:
        self.run = run
        #: Losses in a row that nobody expected, with no finished case in between.
        self.losses_in_a_row = 0
        #: Whether the present process reported its end, and pytest's exit status.
        self.ended: int | None = None
        #: What ended its session before the last case, "" if nothing did.
        self.why_ended = ""
        #: Files that could not be collected: (where, text).
        self.broken: list[tuple[str, str]] = []
        self._listener = listener or Listener()
        self._setting = setting
        self._rerun = rerun
        self._own_clock = own_clock
        self._watch = watch
        self._known: known.Known | None = None
        self._current: Event = {}
        self._began = time.monotonic()
        self._kernel_log = self._last_words = ""
        self._cases_read_log = False
        self._series: dict[str, int | None] = {}

    def _called(self, case_id: str) -> str:
        return under_settings.name(case_id, self._setting)

    # --- events ---

    def event(self, event: Event) -> None:
        """Take one event. Raises HarnessError if it contradicts the ones before."""
        self._watch(event)
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
            self._listener.facts(self.run.facts)
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
        if not self.run.planned and event["first"] == 0:
            self.run.planned = [case[0] for case in event["cases"]]
            self._series = {case[0]: case[1] for case in event["cases"]}
            self._listener.planned([self._called(name) for name in self.run.planned])
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
        self._listener.started(self._called(event["id"]))

    def _result(self, event: Event) -> None:
        if event["id"] != self.run.running:
            raise DamagedEvent(f"a result of {event['id']:.200}, which does not run")
        seconds = time.monotonic() - self._began if self._own_clock else event["seconds"]
        # Before the listener hears of it: what it raises is no end of the process.
        if event["outcome"] != "skipped":
            self.losses_in_a_row = 0
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

    # --- judging ---

    def _add(self, case: Case) -> None:
        self._judge_by_record(case)
        case.kernel_log = self._kernel_log
        if not self._cases_read_log or case.id in self.run.lost:
            case.kernel_log += self._last_words
        self._kernel_log = self._last_words = ""
        self._judge_messages(case)
        if case.outcome in FAILED:
            case.rerun = self._rerun(case.id)
        self._current = {}
        self.run.running = None
        self.run.cases.append(case)
        self.run.complete = len(self.run.cases) == len(self.run.planned)
        self._listener.ended(replace(case, id=self._called(case.id)))

    def _judge_by_record(self, case: Case) -> None:
        """Make a failure "known" that is recorded, and note a recorded one that is none."""
        deviation = self._known.match(case.id) if self._known else None
        if deviation and self.run.lost.get(case.id) == "crash" and not deviation.crash:
            deviation = None  # what is known of it is no such end
        if deviation and case.outcome in FAILED:
            case.outcome = "known"
            case.detail = f"{deviation.text}\n\n{case.detail}"
            case.summary = deviation.text
        elif deviation and case.outcome == "passed":
            self.run.no_longer.append((case.id, deviation.text))
            self._listener.no_longer(self._called(case.id), deviation.text)

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

    # --- a process that did not get to its end ---

    def lost(self, why: str, loss: Loss = "crash") -> None:
        """Record the loss of the process: the case that ran, or was next, is in error.

        Unless that case is known to be lost: then the loss is a result like others.
        """
        self.losses_in_a_row += 1
        if self.run.planned and not self.run.complete:
            self._note_loss(self._present(), loss)
            self._lose(f"{CRASHED}{first_line(why)}", why)
            if self.run.cases[-1].outcome == "known":
                self.losses_in_a_row = 0

    def stuck(self, why: str) -> None:
        """Record that the process cannot be ended: the case that runs never gets a result."""
        if self.run.running:
            self._note_loss(self.run.running, "hang")
        self.problem(why)

    def interrupted(self, why: str) -> None:
        """Record that the session ended in the middle: the case that ran, or was next, did it."""
        self.losses_in_a_row += 1
        name = self._present()
        self.run.interrupted.append(name)
        self._listener.interrupted(self._called(name))
        self._lose(f"ended the session: {why}", why)
        self.problem(f"{name} ended the session: {why}")

    def _note_loss(self, name: str, loss: Loss) -> None:
        self.run.lost[name] = loss
        self._listener.lost(self._called(name), loss)

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
        """Record something outside of the cases that went wrong."""
        self.run.problems.append(text)
        self._listener.problem(f"{self._setting.name}: {text}" if self._setting.name else text)

    def note(self, text: str) -> None:
        """Show a line to the user."""
        self._listener.note(text)
