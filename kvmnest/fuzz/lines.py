"""A journal as a file: lines of JSON, the first of which says what the run is."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from kvmnest import reading
from kvmnest.errors import HarnessError, UsageError
from kvmnest.schema import Schema

SCHEMA = 1
_HEAD: Schema = {
    "type": "object",
    "required": ["schema"],
    "properties": {"schema": {"const": SCHEMA}},
}


def begin(
    path: Path, what: str, schema: Schema, run: dict[str, Any], *, go_on: bool
) -> list[dict[str, Any]]:
    """Begin the file of a run, private to the user, or ``go_on`` with it: its lines so far.

    ``what`` names such a file, ``schema`` is that of its lines behind the first. A last line that
    is not whole is cut off, and told. Raises UsageError if the file belongs to another run,
    HarnessError if it cannot be read or written.
    """
    head = {"schema": SCHEMA, **run}
    try:
        if path.exists() and not path.is_file():
            raise UsageError(f"{path} is not a regular file, which a journal has to be")
        if path.exists() and path.stat().st_size:
            if not go_on:
                raise UsageError(f"{path} exists: --continue goes on with it, or name another")
            return _read(path, what, schema, head)
        if go_on:
            raise UsageError(f"no journal {path} to continue")
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600))
        _write(path, head)
    except OSError as error:
        raise HarnessError(f"cannot use {path}: {error.strerror or error}") from error
    return []


def _read(path: Path, what: str, schema: Schema, head: dict[str, Any]) -> list[dict[str, Any]]:
    lines, whole = reading.lines(path, what, lambda number: schema if number > 1 else _HEAD)
    if lines[0] != head:
        raise UsageError(f"{path} belongs to another run: {json.dumps(lines[0]):.200}")
    if whole != path.stat().st_size:
        os.truncate(path, whole)
        reading.tell_cut(path)
    return lines[1:]


def add(path: Path, line: dict[str, Any]) -> None:
    """Write a line behind the others. Raises HarnessError if that is impossible."""
    try:
        _write(path, line)
    except OSError as error:
        raise HarnessError(f"cannot write {path}: {error.strerror or error}") from error


def _write(path: Path, line: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
