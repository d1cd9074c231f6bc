"""What was tried and what came of it, on disk, so that a crash of the host loses one case."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

from kvmnest import reading
from kvmnest.errors import HarnessError, UsageError
from kvmnest.fuzz.execute import Seen
from kvmnest.schema import COUNT, TEXT, Schema, by_name, exactly

SCHEMA = 1
CRASHED = "crashed"


def _outcome(names: list[str], *numbers: Schema) -> dict[str, Any]:
    every = [{"enum": names}, *numbers]
    count = len(every)
    return {"type": "array", "prefixItems": every, "minItems": count, "maxItems": count}


#: What a machine is and has.
FACTS_SCHEMA: Schema = {
    "type": "object",
    "required": ["kernel", "msrs", "cpuid"],
    "properties": {
        "kernel": TEXT,
        "cpu": TEXT,
        "params": by_name(TEXT),
        "msrs": {
            "type": "object",
            "propertyNames": {"pattern": "^[0-9]{1,10}$"},
            "additionalProperties": COUNT,
        },
        "cpuid": {
            "type": "array",
            "items": {"type": "array", "items": COUNT, "minItems": 6, "maxItems": 6},
        },
    },
}
#: What the executor says, see kvmnest.fuzz.execute, and what the journal notes beside.
EVENT_SCHEMA = {
    "type": "object",
    "additionalProperties": False,
    "dependentRequired": {"outcome": ["end"], "end": ["outcome"]},
    "properties": {
        "start": COUNT,
        "end": COUNT,
        "outcome": {
            "anyOf": [
                _outcome(["Exit", "VMfailValid", "Fault"], COUNT),
                _outcome(["EntryFailure"], COUNT, COUNT),
                _outcome(["VMfailInvalid", CRASHED]),
                _outcome(["HostExit", "other", "lost", CRASHED], TEXT),
            ]
        },
        "stopped": {"type": "array", "items": COUNT},
        "coverage": exactly(
            ["new", "sections", "lost"],
            new={"type": "array", "items": COUNT},
            sections=by_name(by_name(COUNT)),
            lost=TEXT,
        ),
        "facts": FACTS_SCHEMA,
    },
}


def _schema(number: int) -> Schema:
    """Of the line with this number: first what the run is."""
    if number > 1:
        return EVENT_SCHEMA
    return {"type": "object", "required": ["schema"], "properties": {"schema": {"const": SCHEMA}}}


class Journal:
    """A file of JSON lines: first what the run is, then the executor's events.

    ``outcomes`` maps case numbers to outcomes. A case that was started and never ended, in a run
    that was not stopped in order, has the outcome ["crashed"]. Raises UsageError if the file
    belongs to another run, HarnessError if it cannot be read or written.
    """

    def __init__(self, path: Path, run: dict[str, Any], *, go_on: bool) -> None:
        self.path = path
        self.facts: dict[str, Any] = {}
        self.outcomes: dict[int, Seen] = {}
        self._lock = threading.Lock()
        self._running: set[int] = set()
        head = {"schema": SCHEMA, **run}
        try:
            if path.exists() and not path.is_file():
                raise UsageError(f"{path} is not a regular file, which a journal has to be")
            if path.exists() and path.stat().st_size:
                if not go_on:
                    raise UsageError(f"{path} exists: --continue goes on with it, or name another")
                self._read(head)
            elif go_on:
                raise UsageError(f"no journal {path} to continue")
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
                os.close(descriptor)
                self._append(head)
        except OSError as error:
            raise HarnessError(f"cannot use {path}: {error.strerror or error}") from error
        for number in sorted(self._running):
            self.add({"end": number, "outcome": [CRASHED]})

    def _read(self, head: dict[str, Any]) -> None:
        lines, whole = reading.lines(self.path, "journal of kvmnest fuzz", _schema)
        if lines[0] != head:
            raise UsageError(f"{self.path} belongs to another run: {json.dumps(lines[0]):.200}")
        for event in lines[1:]:
            self._note(event)
        if whole != self.path.stat().st_size:
            os.truncate(self.path, whole)
            reading.tell_cut(self.path)

    def _note(self, event: dict[str, Any]) -> None:
        if "facts" in event:
            self.facts = event["facts"]
        elif "start" in event:
            self._running.add(event["start"])
        elif "stopped" in event:
            self._running.difference_update(event["stopped"])
        elif "end" in event:
            self._running.discard(event["end"])
            self.outcomes[event["end"]] = event["outcome"]

    def _append(self, event: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")
            if "start" not in event:
                return
            file.flush()

    def add(self, event: dict[str, Any], *, written: bool = False) -> None:
        """Take an event of the executor; ``written`` if that has put it into the file itself."""
        with self._lock:
            self._note(event)
            if not written and "kernel" not in event:
                try:
                    self._append(event)
                except OSError as error:
                    raise HarnessError(f"cannot write {self.path}: {error.strerror}") from error

    def stop(self) -> None:
        """Note that the run is stopped in order: what was running did not crash anything."""
        if self._running:
            self.add({"stopped": sorted(self._running)})
