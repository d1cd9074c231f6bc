"""A new script, to start a reproducer from."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

from kvmnest.errors import HarnessError, UsageError
from kvmnest.repro import corpus

_TEMPLATE = Path(__file__).parent / "template.py"


def write(bug_id: str, folder: Path) -> Path:
    """Write the template as the script of ``bug_id`` into a folder; returns its path.

    Raises UsageError for an id that makes no module name or is taken, and if the file exists;
    HarnessError if it cannot be written.
    """
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", bug_id):
        raise UsageError(f"{bug_id!r} is not an id: small letters, digits and single hyphens")
    if any(bug_id == each.id for each in (*corpus.load(), *corpus.load(corpus.UNFIXED))):
        raise UsageError(f"there is a reproducer {bug_id}: kvmnest repro show {bug_id}")
    path = folder / f"{bug_id.replace('-', '_')}.py"
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(_TEMPLATE.read_text(encoding="utf-8"))
    except FileExistsError:
        raise UsageError(f"{path} exists already") from None
    except OSError as error:
        with contextlib.suppress(OSError):
            path.unlink()
        raise HarnessError(f"cannot write {path}: {error.strerror}") from error
    return path
