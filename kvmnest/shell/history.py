"""The prompt's history on a terminal, kept from one session to the next."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

_LINES = 1000


def path() -> Path:
    """Where the history is kept: ``$XDG_STATE_HOME/kvmnest``, by default ``~/.local/state``."""
    base = os.environ.get("XDG_STATE_HOME") or os.path.join(
        os.path.expanduser("~"), ".local", "state"
    )
    return Path(base) / "kvmnest" / "shell-history"


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Load the history now and save it, for its owner alone, at the end.

    A prompt without history is as good: what cannot be read or written is left.
    """
    try:
        import readline
    except ImportError:
        yield
        return
    file = path()
    with contextlib.suppress(OSError):
        readline.read_history_file(file)
    try:
        yield
    finally:
        readline.set_history_length(_LINES)
        with contextlib.suppress(OSError):
            file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            file.touch(mode=0o600)
            readline.write_history_file(file)
