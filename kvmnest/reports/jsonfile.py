"""The JSON results file: whole after every case, whatever happens to the process."""

from __future__ import annotations

import functools
import json
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

from kvmnest import reading
from kvmnest.reports.model import SCHEMA, Case, Run
from kvmnest.reports.wholefile import WholeFile

WHAT = "results file of kvmnest run --json"


def document(run: Run) -> dict[str, Any]:
    """The document without its cases, which stand last in the file."""
    facts = dict(run.facts)
    return {
        "schema": SCHEMA,
        "target": run.target,
        "emulator": run.emulator or None,
        "kernel": run.kernel or None,
        "kvm_params": facts.pop("kvm_params", {}),
        "summary": run.summary(),
        "complete": run.complete,
        "started": run.started,
        "finished": run.finished,
        "seconds": run.seconds,
        "running": run.running,
        "planned": len(run.planned),
        "not_run": run.not_run() if run.finished else [],
        "no_longer_known": [{"id": name, "reason": why} for name, why in run.no_longer],
        "problems": run.problems,
        **({"stopped": run.stopped} if run.stopped else {}),
        "facts": {name: value for name, value in facts.items() if name != "kernel"},
        "options": run.options,
    }


def whole(run: Run) -> dict[str, Any]:
    """The document with its cases."""
    return {**document(run), "cases": [_case(case) for case in run.cases]}


class JsonFile:
    """Keeps a Run in a file, whole after every case; see WholeFile for errors."""

    def __init__(self, path: Path) -> None:
        self._file = WholeFile(path, "results")
        self._cases: list[str] = []

    @property
    def problem(self) -> str:
        """Why the last write failed, "" if it did not."""
        return self._file.problem

    def start(self, run: Run) -> None:
        """Write the first, empty document. Raises HarnessError if that fails."""
        self._file.start(json.dumps({**document(run), "cases": []}, indent=1).encode() + b"\n")

    def write(self, run: Run) -> None:
        """Replace the file by one with all that is known now."""
        for case in run.cases[len(self._cases) :]:
            self._cases.append(json.dumps(_case(case)))
        head = json.dumps(document(run), indent=1)
        text = head[: head.rindex("\n}")] + ',\n "cases": [\n  ' + ",\n  ".join(self._cases)
        self._file.write((text.rstrip() + "\n ]\n}\n").encode())


def _case(case: Case) -> dict[str, Any]:
    return {name: value for name, value in asdict(case).items() if value != "" or name == "detail"}


def load(path: Path) -> dict[str, Any]:
    """Read a results file. Raises KvmnestError with one line if it is not one of schema 1."""
    return reading.document(path, WHAT, schema())


@functools.cache
def schema() -> dict[str, Any]:
    """The published schema of a results file."""
    content = files("kvmnest.data").joinpath("results.schema.json").read_text(encoding="utf-8")
    return dict(json.loads(content))
