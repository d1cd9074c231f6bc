"""Runs the suite on kernels x settings, several at a time; goes on where it was stopped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from kvmnest.errors import KvmnestError, first_line
from kvmnest.files import require_folder, write_json
from kvmnest.lab.emulators import BOCHS, Choice
from kvmnest.matrix.cell import Cell, Document, Job, merge, run_job, trouble
from kvmnest.reports import jsonfile
from kvmnest.run.collect import collect
from kvmnest.run.suite_state import suite_state

__all__ = ["Cell", "Local", "Matrix"]


class Engine(Protocol):
    """What runs jobs."""

    def run(self, jobs: Sequence[Job], folder: Path, done: Callable[[Job, Document], None]) -> None:
        """Run all, calling ``done`` in this thread for each one that ended, in any order.

        A job that cannot be run ends with a document that says why. After an exception nothing
        goes on running.
        """


@dataclass(frozen=True)
class Local:
    """Labs on this machine, ``at_once`` at a time."""

    at_once: int

    def run(self, jobs: Sequence[Job], folder: Path, done: Callable[[Job, Document], None]) -> None:
        """See Engine. Each file in ``folder`` is whole after every case."""
        stopped = False
        with ThreadPoolExecutor(max_workers=self.at_once) as pool:
            running = {
                pool.submit(run_job, job, folder / job.file, lambda: stopped): job for job in jobs
            }
            try:
                for future in as_completed(running):
                    job = running[future]
                    try:
                        document = future.result()
                    except KvmnestError as error:
                        document = trouble(job, first_line(error))
                    done(job, document)
            except BaseException:
                stopped = True
                for future in running:
                    future.cancel()
                raise


@dataclass
class Matrix:
    """What to run, and where results are kept: ``folder`` gets a results file for each part."""

    folder: Path
    selected: Sequence[str] = ()
    keyword: str = ""
    emulator: Choice = BOCHS
    on_line: Callable[[str], None] = lambda line: None
    parts: int = 1
    _found: dict[Job, Document] = field(default_factory=dict, init=False)

    def run(self, cells: Sequence[Cell], engine: Engine) -> dict[str, Document]:
        """Run every cell; results documents (schema 1) by cell name, in the order of ``cells``.

        A part whose file is complete and of the same cases is not run again; a kernel that cannot
        be run has a document with a problem and without cases. After Ctrl-C what was finished is
        in ``folder``. Raises UsageError or NothingSelected before anything is booted.
        """
        require_folder(self.folder)
        suite = suite_state()
        jobs = {cell: self._jobs(cell, suite) for cell in cells}
        if cells:
            collect(jobs[cells[0]][0].arguments()).require_cases(self.selected, self.keyword)
        for cell, parts in jobs.items():
            for job in parts:
                document = _load(self.folder / job.file)
                if document:
                    self._found[job] = document
            if all(job in self._found for job in parts):
                self.on_line(f"{cell.name}: had been run")
        left = [job for parts in jobs.values() for job in parts if job not in self._found]
        if left:
            engine.run(left, self.folder, self._done)
        return {cell.name: self._merged(parts) for cell, parts in jobs.items()}

    def _jobs(self, cell: Cell, suite: str) -> list[Job]:
        return [
            Job(cell, tuple(self.selected), self.keyword, self.emulator, suite, part, self.parts)
            for part in range(self.parts)
        ]

    def _done(self, job: Job, document: Document) -> None:
        if document["complete"]:
            write_json(self.folder / job.file, document)
        self._found[job] = document
        parts = self._jobs(job.cell, job.suite)
        if all(part in self._found for part in parts):
            self.on_line(f"{job.cell.name}: {in_words(self._merged(parts))}")

    def _merged(self, parts: Sequence[Job]) -> Document:
        return merge([self._found[part] for part in parts])


def in_words(document: Document) -> str:
    """What came of a cell in one line."""
    counts = [f"{number} {name}" for name, number in document["summary"].items() if number]
    problems = document["problems"][:1] or ([] if counts else ["nothing ran"])
    return "; ".join([*([", ".join(counts)] if counts else []), *problems])


def _load(path: Path) -> Document | None:
    """A complete results file, None if it is not there or not usable (then it is run again)."""
    try:
        found = jsonfile.load(path)
    except KvmnestError:
        return None
    return found if found.get("complete") else None
