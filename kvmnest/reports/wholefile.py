"""A report file that is whole at any moment, whatever happens to the process that writes it."""

from __future__ import annotations

import sys
from pathlib import Path

from kvmnest import files
from kvmnest.errors import HarnessError


class WholeFile:
    """Writes ``what`` ("results", "the JUnit report") to a path by replacing the whole file.

    A write that fails (full disk) leaves the last good file; ``problem`` then says why, and the
    next write tries again. Raises HarnessError at once if the path can hold no file.
    """

    def __init__(self, path: Path, what: str) -> None:
        # Neither a device (/dev/null, for root) nor a link may be replaced by a file.
        if path.exists() and not path.is_file():
            kind = "it is a directory" if path.is_dir() else "it is not a regular file"
            raise HarnessError(f"cannot write {what} to {path}: {kind}")
        self.path = path.resolve() if path.is_symlink() else path
        self.problem = ""
        self._what = what

    def start(self, content: bytes) -> None:
        """Write for the first time. Raises HarnessError if that fails."""
        try:
            files.sweep(self.path)
            files.replace(self.path, content)
        except OSError as error:
            raise HarnessError(self._reason(error)) from error

    def write(self, content: bytes) -> None:
        """Replace the file; the first of several failures is told on stderr."""
        try:
            files.replace(self.path, content)
            self.problem = ""
        except OSError as error:
            reason = self._reason(error)
            if not self.problem:
                print(f"kvmnest: {reason}", file=sys.stderr, flush=True)
            self.problem = reason

    def _reason(self, error: OSError) -> str:
        return f"cannot write {self._what} to {self.path}: {error.strerror or error}"
