"""What programs showed, on disk: a run that was stopped, or took the host down, goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvmnest import reading
from kvmnest.errors import HarnessError
from kvmnest.fuzz import lines
from kvmnest.fuzz.programs.campaign import AGREE, CRASHED, DISAGREE, KNOWN, Verdict
from kvmnest.fuzz.programs.places import EVENT_SCHEMA
from kvmnest.schema import COUNT, TEXT, TEXTS, Schema, exactly

_WHAT = "journal of kvmnest fuzz programs"
_LINE: Schema = exactly(
    ["program", "verdict"],
    program=COUNT,
    verdict={"enum": [AGREE, KNOWN, DISAGREE, CRASHED]},
    shows=TEXT,
    reasons=TEXTS,
)


class Journal:
    """A file of JSON lines: first what the run is, then a line for each program.

    ``steps`` is a file beside it, where the executor notes each step before it runs, on a machine
    that a step can crash. ``done`` are the programs that need not run again; ``crashed`` is the one
    that was running when the host went down, with its step. Raises UsageError if the file belongs
    to another run, HarnessError if it is damaged or cannot be written.
    """

    def __init__(self, path: Path, run: dict[str, Any], *, go_on: bool) -> None:
        self.path, self.steps = path, path.with_name(f"{path.name}.steps")
        self.crashed: tuple[int, str] | None = None
        before = lines.begin(path, _WHAT, _LINE, run, go_on=go_on)
        self.done = {line["program"]: line for line in before}
        if go_on:
            self._find_crashed()
            return
        try:
            self.steps.unlink(missing_ok=True)
        except OSError as error:
            raise HarnessError(f"cannot use {self.steps}: {error.strerror or error}") from error

    def _find_crashed(self) -> None:
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
            line["shows"] = str(verdict)
        self.done[number] = line
        lines.add(self.path, line)
