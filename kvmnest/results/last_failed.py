"""Which cases failed the last time they ran: what ``kvmnest run --lf`` runs again."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from kvmnest.errors import KvmnestError
from kvmnest.lab import cache
from kvmnest.results.model import Run


def narrow(selected: Sequence[str]) -> list[str]:
    """Of ``selected`` (empty: the suite) the ids that failed last; all of it if none did."""
    failed = _load()
    if selected:
        failed = [name for name in failed if name.startswith(tuple(selected))]
    else:
        failed = [name for name in failed if "/" not in name.partition("::")[0]]
    return failed or list(selected)


def remember(run: Run) -> None:
    """Note the failures of a run; those of cases that it did not run stay noted.

    A cache that cannot be written forgets: that must not fail a run.
    """
    ran = {case.id for case in run.cases}
    failed = [name for name in _load() if name not in ran]
    failed += [case.id for case in run.cases if case.outcome in ("failed", "error")]
    with contextlib.suppress(OSError, KvmnestError):
        path = _path()
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(failed, file)
        os.replace(file.name, path)


def _path() -> Path:
    return cache.root() / "last-failed.json"


def _load() -> list[str]:
    try:
        found = json.loads(_path().read_text(encoding="utf-8"))
    except (OSError, ValueError, KvmnestError, RecursionError):
        return []
    good = isinstance(found, list) and all(isinstance(name, str) for name in found)
    return found if good else []
