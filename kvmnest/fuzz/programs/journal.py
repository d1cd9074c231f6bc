"""What programs showed, on disk: a run that was stopped, or took the host down, goes on."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from kvmnest import reading
from kvmnest.errors import HarnessError, UsageError
from kvmnest.fuzz.programs.campaign import AGREE, CRASHED, DISAGREE, KNOWN, Verdict
from kvmnest.fuzz.programs.places import EVENT_SCHEMA
from kvmnest.schema import COUNT, TEXT, TEXTS, Schema, exactly

SCHEMA = 1
_WHAT = "journal of kvmnest fuzz programs"
_LINE: Schema = exactly(
    ["program", "verdict"],
    program=COUNT,
    verdict={"enum": [AGREE, KNOWN, DISAGREE, CRASHED]},
    shows=TEXT,
    reasons=TEXTS,
)


def _schema(number: int) -> Schema:
    if number > 1:
        return _LINE
    return {"type": "object", "required": ["schema"], "properties": {"schema": {"const": SCHEMA}}}


class Journal:
    """A file of JSON lines: first what the run is, then a line for each program.

    ``steps`` is a file beside it, where the executor notes each step before it runs, on a machine
    that a step can crash. ``done`` are the programs that need not run again; ``crashed`` is the one
    that was running when the host went down, with its step. Raises UsageError if the file belongs
    to another run, HarnessError if it is damaged or cannot be written.
    """

    def __init__(self, path: Path, run: dict[str, Any], *, go_on: bool) -> None:
        self.path, self.steps = path, path.with_name(f"{path.name}.steps")
        self.done: dict[int, dict[str, Any]] = {}
        self.crashed: tuple[int, str] | None = None
        head = {"schema": SCHEMA, **run}
        if go_on:
            self._read(head)
            return
        if path.exists() and path.stat().st_size:
            raise UsageError(f"{path} exists: --continue goes on with it, or name another")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.steps.unlink(missing_ok=True)
        except OSError as error:
            raise HarnessError(f"cannot use {path}: {error.strerror or error}") from error
        self._append(head)

    def _read(self, head: dict[str, Any]) -> None:
        lines, whole = reading.lines(self.path, _WHAT, _schema)
        if lines[0] != head:
            raise UsageError(f"{self.path} belongs to another run: {json.dumps(lines[0]):.200}")
        self.done = {line["program"]: line for line in lines[1:]}
        if whole != self.path.stat().st_size:
            os.truncate(self.path, whole)
            reading.tell_cut(self.path)
        if not self.steps.exists() or not self.steps.stat().st_size:
            return
        events, _ = reading.lines(self.steps, "file of steps", lambda number: EVENT_SCHEMA)
        running, step = -1, -1
        for event in events:
            if "start" in event:
                running, step = event["start"], -1
            step = event.get("step", step)
            running = -1 if event.get("end") == running else running
        if running >= 0 and running not in self.done:
            self.crashed = running, f"step {step}: the host went down"

    def add(self, number: int, verdict: Verdict) -> None:
        """Note what a program showed."""
        line: dict[str, Any] = {"program": number, "verdict": verdict.kind}
        if verdict.reasons:
            line["reasons"] = [*verdict.reasons]
        if verdict.new or verdict.crashed:
            line["shows"] = str(verdict.new or verdict.crashed)
        self.done[number] = line
        self._append(line)

    def _append(self, line: dict[str, Any]) -> None:
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise HarnessError(f"cannot write {self.path}: {error.strerror or error}") from error
