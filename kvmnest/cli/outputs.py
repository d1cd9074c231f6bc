"""Files to write: what is wrong with their names is found before the long run."""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from pathlib import Path

from kvmnest.errors import HarnessError, UsageError

# What the disk has against it, not the name.
_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)


def require_writable(*paths: Path | None) -> None:
    """Raise UsageError, or HarnessError for a full or broken disk, if a file cannot be written."""
    for path in paths:
        if path is None:
            continue
        try:
            _try(path)
        except OSError as error:
            shown = str(path) if len(str(path)) < 200 else f"{str(path)[:100]}..."
            kind = HarnessError if error.errno in _OF_THE_DISK else UsageError
            raise kind(f"cannot write {shown}: {error.strerror or error}") from error


def _try(path: Path) -> None:
    try:
        status = os.stat(path)
    except FileNotFoundError:
        status = None  # to be made; or a link to what is not there
    if status is not None and stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, "it is a directory")
    if status is not None and not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    if status is None or stat.S_ISREG(status.st_mode):
        with tempfile.TemporaryFile(dir=os.path.dirname(os.path.realpath(path))):
            pass
