"""A folder of programs, each a small JSON file named by its content."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from kvmnest import files, reading
from kvmnest.errors import UsageError
from kvmnest.fuzz.programs.program import SCHEMA, Program
from kvmnest.lab.cache import digest

_WHAT = "program of kvmnest fuzz programs"


def load(folder: Path) -> Iterator[Program]:
    """Programs of a folder, in the order of their names. Raises UsageError, HarnessError."""
    if not folder.is_dir():
        raise UsageError(f"{reading.shown(folder)} is not a folder of programs")
    for path in sorted(folder.glob("*.json")):
        yield Program.from_json(reading.document(path, _WHAT, SCHEMA))


def save(folder: Path, program: Program, shows: str) -> Path:
    """Put a program into a folder, once; ``shows`` says why it is kept."""
    document = program.to_json()
    path = folder / f"{digest([document])[:16]}.json"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        files.replace(path, json.dumps({**document, "shows": shows}).encode() + b"\n")
    return path


#: How the reason of a program begins that is kept for what it reaches.
REACHES = "reaches "


def smaller(folder: Path, reached: Callable[[Sequence[Program]], Sequence[int]]) -> tuple[int, int]:
    """Remove programs that are kept for lines which those before them reach; the shortest go first.

    ``reached`` runs programs, and tells how many new blocks each reached. What shows a finding
    stays. Returns how many are left, and how many there were.
    """
    paths = sorted(folder.glob("*.json"))
    found = [(reading.document(path, _WHAT, SCHEMA), path) for path in paths]
    found.sort(key=lambda each: (len(each[0]["steps"]), each[1]))
    new = reached([Program.from_json(document) for document, _ in found])
    left = len(found)
    for (document, path), count in zip(found, new, strict=True):
        if not count and str(document.get("shows", "")).startswith(REACHES):
            path.unlink()
            left -= 1
    return left, len(found)
