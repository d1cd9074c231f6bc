"""What was tried and what came of it, on disk, so that a crash of the host loses one case."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from kvmnest.fuzz import lines
from kvmnest.fuzz.execute import Seen
from kvmnest.schema import COUNT, TEXT, Schema, by_name, exactly

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
        for event in lines.begin(path, "journal of kvmnest fuzz", EVENT_SCHEMA, run, go_on=go_on):
            self._note(event)
        for number in sorted(self._running):
            self.add({"end": number, "outcome": [CRASHED]})

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

    def add(self, event: dict[str, Any], *, written: bool = False) -> None:
        """Take an event of the executor; ``written`` if that has put it into the file itself."""
        with self._lock:
            self._note(event)
            if not written and "kernel" not in event:
                lines.add(self.path, event)

    def stop(self) -> None:
        """Note that the run is stopped in order: what was running did not crash anything."""
        if self._running:
            self.add({"stopped": sorted(self._running)})
