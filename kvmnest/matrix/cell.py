"""One cell of a matrix, or one part of it: a kernel with parameters, run in the lab."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kvmnest.cases.events import Event
from kvmnest.errors import HarnessError, KvmnestError, first_line
from kvmnest.lab import cache
from kvmnest.lab.emulators import BOCHS, Choice
from kvmnest.reports import jsonfile
from kvmnest.reports.model import OUTCOMES, Loss, Run
from kvmnest.reports.progress import Progress
from kvmnest.run.judge import Judge
from kvmnest.run.lab_target import LabTarget
from kvmnest.run.loop import run_cases
from kvmnest.run.report import Report
from kvmnest.run.selection import Selection, pytest_arguments, split_selection

#: A results document (schema 1), as ``kvmnest run --json`` writes it.
Document = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """A kernel with parameters of its modules, on a CPU model of Bochs ("": the usual one)."""

    kernel: str
    params: tuple[tuple[str, str], ...] = ()
    cpu_model: str = ""

    @property
    def name(self) -> str:
        """For people: "6.1.0-56 broadwell_ult ept=0"."""
        settings = [f"{name}={value}" for name, value in self.params]
        return " ".join([self.kernel, *([self.cpu_model] if self.cpu_model else []), *settings])


@dataclass(frozen=True)
class Job:
    """What one task runs: part ``part`` of ``parts`` of the cases of a cell.

    ``suite`` names the state of the suite (``suite_state``) that the results are to belong to.
    """

    cell: Cell
    selected: tuple[str, ...]
    keyword: str
    emulator: Choice
    suite: str
    part: int = 0
    parts: int = 1

    @property
    def file(self) -> str:
        """Name of its results file: the same for the same work, another for any other."""
        words = [self.cell.name, *self.selected, self.keyword, self.suite]
        if self.emulator.boot != BOCHS.boot:
            words.append(self.emulator.boot)
        words += [word for word in (self.emulator.program, self.emulator.cpu_model) if word]
        if self.parts > 1:
            words.append(f"part {self.part} of {self.parts}")
        return f"{cache.digest(words)[:16]}.json"

    def arguments(self) -> list[str]:
        """Arguments for pytest. Raises UsageError if the selection names no case of the suite."""
        modules, paths = split_selection(self.selected)
        if paths:
            raise HarnessError("a matrix runs cases of the suite only")
        return pytest_arguments(Selection(keyword=self.keyword), self.emulator.boot, modules, [])


class Stopped(Exception):
    """The matrix as a whole is over: Ctrl-C, or nobody wants the result any more."""


class _Report(Report):
    """The report of one job, which ends when ``stopped`` says so."""

    def __init__(self, run: Run, path: Path, stopped: Callable[[], bool]) -> None:
        super().__init__(run, Progress(io.StringIO(), quiet=True), json_path=path)
        self._stopped = stopped

    def watch(self, event: Event) -> None:
        """Look whether to stop at an event."""
        if self._stopped():
            raise Stopped

    def lost(self, case_id: str, loss: Loss) -> None:
        """Look whether to stop before another kernel boots."""
        super().lost(case_id, loss)
        if self._stopped():
            raise Stopped


def run_job(job: Job, path: Path, stopped: Callable[[], bool] = lambda: False) -> Document:
    """Run a job; its document, which ``path`` also holds, whole after every case.

    A kernel that cannot be run gives a document with a problem and without cases. Raises Stopped
    after the next event once ``stopped()`` is true, HarnessError if ``path`` cannot be written.
    """
    options = {"kernel": job.cell.kernel, "part": job.part, "parts": job.parts}
    run = Run(job.emulator.boot, options=options)
    report = _Report(run, path, stopped)
    try:
        arguments = job.arguments()
        emulator = job.emulator
        if job.cell.cpu_model:
            emulator = replace(emulator, cpu_model=job.cell.cpu_model)
        target = LabTarget(
            kernel=job.cell.kernel, kvm_params=dict(job.cell.params), emulator=emulator
        )
        run.emulator = target.emulator
        # A selection that is too small for so many labs has fewer parts than were asked for.
        targets = target.split(arguments, job.parts) if job.parts > 1 else [target]
        if job.part < len(targets):
            part = Run(run.target, run.emulator, options=options)
            judge = Judge(part, report, own_clock=True, watch=report.watch)
            run_cases(targets[job.part], arguments, judge)
        else:
            run.complete = True
    except KvmnestError as error:
        run.problems.append(first_line(error))
    report.finish(summary=False)
    return jsonfile.load(path)


def trouble(job: Job, text: str) -> Document:
    """The document of a job that could not be run, and why."""
    run = Run(job.emulator.boot, options={"kernel": job.cell.kernel}, problems=[text])
    return {**jsonfile.document(run), "cases": []}


def merge(parts: Sequence[Document]) -> Document:
    """The document of a cell from those of all of its parts, the cases in their usual order.

    Cases are dealt one by one, so the first part has the first case, the second the second.
    """
    filled = [part for part in parts if part["cases"]]
    if len(parts) == 1 or not filled:
        problems = list(dict.fromkeys(text for part in parts for text in part["problems"]))
        return {**parts[0], "problems": problems}
    longest = max(len(part["cases"]) for part in filled)
    cases = [p["cases"][i] for i in range(longest) for p in filled if i < len(p["cases"])]
    return {
        **filled[0],
        "summary": {name: sum(p["summary"][name] for p in filled) for name in OUTCOMES},
        "complete": all(part["complete"] for part in parts),
        "planned": sum(part["planned"] for part in parts),
        "seconds": round(sum(part["seconds"] for part in parts), 3),
        "not_run": [name for part in parts for name in part["not_run"]],
        "no_longer_known": [entry for part in parts for entry in part["no_longer_known"]],
        "problems": list(dict.fromkeys(text for part in parts for text in part["problems"])),
        "cases": cases,
    }
