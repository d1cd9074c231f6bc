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


def read(path: Path) -> Run:
    """The run in a results file. Raises as ``load``."""
    return run_of(load(path))


def run_of(document: dict[str, Any]) -> Run:
    """The run that a document of schema 1 was written from, as far as the document tells."""
    cases = [Case(**case) for case in document["cases"]]
    return Run(
        target=document["target"],
        emulator=document.get("emulator") or "",
        facts={
            **document["facts"],
            "kvm_params": document["kvm_params"],
            **({"kernel": document["kernel"]} if document["kernel"] else {}),
        },
        options=document["options"],
        started=document["started"],
        finished=document["finished"],
        cases=cases,
        running=document["running"],
        planned=[*(case.id for case in cases), *document["not_run"]],
        no_longer=[(entry["id"], entry["reason"]) for entry in document["no_longer_known"]],
        problems=document["problems"],
        stopped=document.get("stopped", ""),
        complete=document["complete"],
        seconds=document["seconds"],
    )


@functools.cache
def schema() -> dict[str, Any]:
    """The published schema of a results file."""
    content = files("kvmnest.data").joinpath("results.schema.json").read_text(encoding="utf-8")
    return dict(json.loads(content))
