"""The JSON results file: whole after every case, whatever happens to the process."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kvmnest.errors import HarnessError, KvmnestError
from kvmnest.results.model import OUTCOMES, SCHEMA, Case, Run


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
        "facts": {name: value for name, value in facts.items() if name != "kernel"},
        "options": run.options,
    }


def whole(run: Run) -> dict[str, Any]:
    """The document with its cases."""
    return {**document(run), "cases": [_case(case) for case in run.cases]}


class JsonFile:
    """Writes a Run to a path, each time by replacing the file as a whole.

    A write that fails (full disk) leaves the last good file; ``problem`` then says why, and the
    next write tries again. Raises HarnessError at once if the path cannot be written at all.
    """

    def __init__(self, path: Path) -> None:
        # Neither a device (/dev/null, for root) nor a link may be replaced by a file.
        if path.exists() and not path.is_file():
            what = "it is a directory" if path.is_dir() else "it is no regular file"
            raise HarnessError(f"cannot write results to {path}: {what}")
        self.path = path.resolve() if path.is_symlink() else path
        self.problem = ""
        self._cases: list[str] = []
        self._temporary = self.path.with_name(f".{path.name}.{os.getpid()}.tmp")

    def write(self, run: Run) -> None:
        """Replace the file by one with all that is known now."""
        for case in run.cases[len(self._cases) :]:
            self._cases.append(json.dumps(_case(case)))
        head = json.dumps(document(run), indent=1)
        text = head[: head.rindex("\n}")] + ',\n "cases": [\n  ' + ",\n  ".join(self._cases)
        try:
            self._replace((text.rstrip() + "\n ]\n}\n").encode())
            self.problem = ""
        except OSError as error:
            reason = f"cannot write results to {self.path}: {error.strerror or error}"
            if not self.problem:
                print(f"kvmnest: {reason}", file=sys.stderr, flush=True)
            self.problem = reason

    def start(self, run: Run) -> None:
        """Write the first, empty document. Raises HarnessError if that fails."""
        try:
            text = json.dumps({**document(run), "cases": []}, indent=1)
            self._replace(text.encode() + b"\n")
        except OSError as error:
            raise HarnessError(
                f"cannot write results to {self.path}: {error.strerror or error}"
            ) from error

    def _replace(self, content: bytes) -> None:
        try:
            with open(self._temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(self._temporary, self.path)
        except BaseException:
            self._temporary.unlink(missing_ok=True)
            raise


def _case(case: Case) -> dict[str, Any]:
    return {name: value for name, value in asdict(case).items() if value != "" or name == "detail"}


def load(path: Path) -> dict[str, Any]:
    """Read a results file. Raises KvmnestError with one line if it is not one of schema 1."""
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
    except OSError as error:
        raise KvmnestError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise KvmnestError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict) or "schema" not in found or "cases" not in found:
        raise KvmnestError(f"{path} is not a results file of kvmnest run --json")
    if found["schema"] != SCHEMA:
        raise KvmnestError(
            f"{path} has schema {found['schema']!r}, this kvmnest reads schema {SCHEMA}"
        )
    for case in found["cases"]:
        if not isinstance(case, dict) or case.get("outcome") not in OUTCOMES:
            raise KvmnestError(f"{path} holds a case without a known outcome: {case!r:.80}")
    return found
