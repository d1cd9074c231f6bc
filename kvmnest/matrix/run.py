"""Runs the suite on kernels x settings, several at a time; goes on where it was stopped."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvmnest.errors import HarnessError, KvmnestError
from kvmnest.lab import cache
from kvmnest.mutants.record import suite_state
from kvmnest.results import jsonfile
from kvmnest.results.lab_target import LabTarget
from kvmnest.results.model import Run
from kvmnest.results.progress import Progress
from kvmnest.results.reporter import Reporter
from kvmnest.results.runner import Plan, pytest_arguments, run_cases, split_selection


@dataclass(frozen=True)
class Cell:
    """A kernel with parameters of its modules."""

    kernel: str
    params: tuple[tuple[str, str], ...] = ()

    @property
    def name(self) -> str:
        """For people: "6.1.0-56 ept=0"."""
        return " ".join([self.kernel, *(f"{name}={value}" for name, value in self.params)])


@dataclass
class Matrix:
    """What to run, and where results are kept: ``folder`` gets a results file for each cell."""

    folder: Path
    selected: Sequence[str] = ()
    keyword: str = ""
    bochs: str | None = None
    on_line: Callable[[str], None] = lambda line: None
    stopped: bool = field(default=False, init=False)

    def run(self, cells: Sequence[Cell], jobs: int) -> dict[str, dict[str, Any]]:
        """Run every cell, ``jobs`` at a time; results documents (schema 1) by cell name.

        A cell whose file is complete and of the same cases is not run again; a kernel that
        cannot be run has a document with a problem and without cases. After Ctrl-C what was
        finished is in ``folder``.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        documents: dict[str, dict[str, Any]] = {}
        with ThreadPoolExecutor(max_workers=jobs) as pool:
            running = {cell.name: pool.submit(self._cell, cell) for cell in cells}
            try:
                for name, future in running.items():
                    documents[name] = future.result()
            except BaseException:
                self.stopped = True
                for future in running.values():
                    future.cancel()
                raise
        return documents

    def _path(self, cell: Cell) -> Path:
        key = cache.digest([cell.name, *self.selected, self.keyword, suite_state()])
        return self.folder / f"{key[:16]}.json"

    def _cell(self, cell: Cell) -> dict[str, Any]:
        path = self._path(cell)
        if path.is_file():
            found = jsonfile.load(path)
            if found["complete"]:
                self.on_line(f"{cell.name}: had been run")
                return found
        modules, paths = split_selection(self.selected)
        if paths:
            raise HarnessError("a matrix runs cases of the suite only")
        progress = Progress(io.StringIO(), quiet=True)
        reporter = Reporter(
            Run("lab", options={"kernel": cell.kernel}),
            progress,
            json_path=path,
            own_clock=True,
        )
        try:
            target = LabTarget(kernel=cell.kernel, kvm_params=dict(cell.params), bochs=self.bochs)
            run_cases(
                target, pytest_arguments(Plan(keyword=self.keyword), "lab", modules, []), reporter
            )
        except KvmnestError as error:
            reporter.run.problems.append(str(error).partition("\n")[0])
        reporter.finish(summary=False)
        counts = reporter.run.summary()
        shown = ", ".join(f"{number} {name}" for name, number in counts.items() if number)
        problem = reporter.run.problems[0] if reporter.run.problems else "nothing ran"
        self.on_line(f"{cell.name}: {shown or problem}")
        return jsonfile.load(path)


def differences(documents: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """Cases whose outcome is not the same everywhere: (id, outcome by column, "" for not run)."""
    columns = [
        {case["id"]: case["outcome"] for case in document["cases"]}
        for document in documents.values()
    ]
    ids = dict.fromkeys(name for column in columns for name in column)
    rows = [(name, [column.get(name, "") for column in columns]) for name in ids]
    return [row for row in rows if len(set(row[1])) > 1]


def changes(documents: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str, list[str]]]:
    """Between which two neighbours cases changed: (left, right, lines)."""
    names = list(documents)
    found = []
    rows = differences(documents)
    for index in range(1, len(names)):
        lines = [
            f"{case}: {outcomes[index - 1] or '-'} -> {outcomes[index] or '-'}"
            for case, outcomes in rows
            if outcomes[index - 1] != outcomes[index]
        ]
        if lines:
            found.append((names[index - 1], names[index], lines))
    return found
