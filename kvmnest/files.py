"""Files to write: tried before a long run, and there as a whole or not at all."""

from __future__ import annotations

import errno
import glob
import json
import os
import stat
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvmnest.errors import HarnessError, KvmnestError, UsageError

# What the disk has against it, not the name.
_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)


def require_writable(*paths: Path | None) -> None:
    """Find out whether files can be written, without a trace; None stands for no file.

    Raises UsageError for a name that cannot be, HarnessError for a full or broken disk.
    """
    for path in paths:
        if path is None:
            continue
        try:
            _try(path)
        except OSError as error:
            raise _refusal(path, error) from error


def require_folder(folder: Path) -> None:
    """Make a folder if need be, private to the user. Raises as ``require_writable``."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _try(folder / "file")
    except OSError as error:
        raise _refusal(folder, error) from error


def _refusal(path: Path, error: OSError) -> KvmnestError:
    kind = HarnessError if error.errno in _OF_THE_DISK else UsageError
    return kind(f"cannot write {path}: {error.strerror or error}")


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


def write_text(path: Path, text: str) -> None:
    """Replace a file as a whole, or write into a device or pipe such as /dev/stdout.

    A link stays one. Raises HarnessError if that is impossible.
    """
    try:
        if path.exists() and not path.is_file():
            path.write_text(text, encoding="utf-8")
        else:
            target = Path(os.path.realpath(path))
            sweep(target)
            replace(target, text.encode())
    except OSError as error:
        raise HarnessError(f"cannot write {path}: {error.strerror or error}") from error


def replace(path: Path, content: bytes, mode: int = 0o666, *, durable: bool = False) -> None:
    """Replace a file as a whole: after a crash it holds the old content or the new.

    ``mode`` is that of a new file, before the umask. With ``durable`` the new content is on the
    disk when the call returns, even if the power fails then. Raises OSError.
    """
    # What a loss of power leaves behind is overwritten next time; other files may have two writers.
    suffix = "new" if durable else f"{os.getpid()}.tmp"
    temporary = path.with_name(f".{path.name}.{suffix}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
    try:
        with open(os.open(temporary, flags, mode), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        sync_folder(path)


def sync_folder(path: Path) -> None:
    """Wait until the names in the folder of ``path`` are on the disk. Raises OSError."""
    fd = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sweep(path: Path) -> None:
    """Remove what processes left beside a file that were killed while they replaced it."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        owner = left.name.removeprefix(f".{path.name}.").removesuffix(".tmp")
        if owner.isdecimal() and not Path("/proc", owner).exists():
            left.unlink(missing_ok=True)


def write_json(path: Path, document: Mapping[str, Any] | Sequence[Any]) -> None:
    """``write_text`` of a JSON document."""
    write_text(path, f"{json.dumps(document, indent=1)}\n")
