"""Files that survive a loss of power: what a call wrote is on the disk when it returns."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvmnest import files
from kvmnest.errors import HarnessError


def append(path: Path, line: Mapping[str, Any]) -> None:
    """Append a line of JSON to a private file. Raises HarnessError."""
    try:
        new = not path.exists()
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        with open(fd, "wb") as file:
            file.write(json.dumps(line).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        if new:
            files.sync_folder(path)
    except OSError as error:
        raise HarnessError(f"cannot write {path}: {error.strerror}") from error


def replace(path: Path, text: str, mode: int = 0o600) -> None:
    """Replace a file as a whole: it holds the old text or the new. Raises HarnessError."""
    try:
        files.replace(path, text.encode(), mode, durable=True)
    except OSError as error:
        raise HarnessError(f"cannot write {path}: {error.strerror}") from error


def truncate(path: Path, size: int) -> None:
    """Cut a file off after ``size`` bytes. Raises HarnessError."""
    try:
        with open(path, "r+b") as file:
            file.truncate(size)
            os.fsync(file.fileno())
    except OSError as error:
        raise HarnessError(f"cannot write {path}: {error.strerror}") from error


def remove(path: Path) -> None:
    """Remove a file if it is there. Raises HarnessError."""
    try:
        path.unlink(missing_ok=True)
        files.sync_folder(path)
    except FileNotFoundError:
        return  # not even its folder is there
    except OSError as error:
        raise HarnessError(f"cannot remove {path}: {error.strerror}") from error
