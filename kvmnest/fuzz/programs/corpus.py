"""A folder of programs, each a small JSON file named by its content."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from kvmnest import files, reading
from kvmnest.errors import UsageError
from kvmnest.fuzz.programs.program import SCHEMA, Program
from kvmnest.lab.cache import digest


def load(folder: Path) -> Iterator[Program]:
    """Programs of a folder, in the order of their names. Raises UsageError, HarnessError."""
    if not folder.is_dir():
        raise UsageError(f"{reading.shown(folder)} is not a folder of programs")
    for path in sorted(folder.glob("*.json")):
        yield Program.from_json(reading.document(path, "program of kvmnest fuzz programs", SCHEMA))


def save(folder: Path, program: Program, shows: str) -> Path:
    """Put a program into a folder, once; ``shows`` says why it is kept."""
    document = program.to_json()
    path = folder / f"{digest([document])[:16]}.json"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        files.replace(path, json.dumps({**document, "shows": shows}).encode() + b"\n")
    return path
