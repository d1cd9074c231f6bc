"""The lab's cache: entries named by a digest of what they are made from.

An entry is a directory that appears whole or not at all (built beside, then renamed), so a run
that is killed, or two runs at once, never leave or see half of one.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from kvmnest.lab.errors import LabSetupError

_KEEP = 6  # entries of one kind; the oldest used go first


def root() -> Path:
    """The cache directory, created private to the user. Raises LabSetupError if it cannot be."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    path = Path(base) / "kvmnest"
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if path.stat().st_uid != os.getuid():
            raise LabSetupError(
                f"cache directory {path} belongs to another user; set XDG_CACHE_HOME"
            )
        path.chmod(0o700)
    except OSError as e:
        raise LabSetupError(f"cannot use cache directory {path}: {e.strerror}") from e
    return path


def digest(parts: Iterable[object]) -> str:
    """Key of an entry: hash of the text or bytes of ``parts``, in order."""
    state = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode()
        state.update(len(data).to_bytes(8, "little"))
        state.update(data)
    return state.hexdigest()[:32]


@contextlib.contextmanager
def locked(name: str) -> Iterator[None]:
    """Hold the cache's lock ``name``: one builder of a thing at a time."""
    path = root() / f"{name}.lock"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def describe(error: OSError, doing: str) -> str:
    """One line for an OSError while ``doing`` something; a full disk is named as such."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no space left on the disk while {doing}: {error.filename or ''}".rstrip(": ")
    return f"{doing}: {error.strerror or error}" + (f": {error.filename}" if error.filename else "")


def entry(kind: str, key: str, build: Callable[[Path], None], *, keep: int = _KEEP) -> Path:
    """Directory of entry ``key``; if absent, ``build(empty directory)`` makes it.

    Of this kind the ``keep`` entries used last stay.

    Raises LabSetupError when the disk is full or the cache is not writable; whatever ``build``
    raises leaves no entry behind.
    """
    final = root() / kind / key
    if not final.is_dir():
        with locked(kind):
            if not final.is_dir():
                _make(final, build, keep)
    with contextlib.suppress(OSError):
        os.utime(final)
    return final


def existing(kind: str, key: str) -> Path | None:
    """Directory of entry ``key`` if it is there; it counts as used."""
    folder = root() / kind / key
    if not folder.is_dir():
        return None
    with contextlib.suppress(OSError):
        os.utime(folder)
    return folder


def drop(folder: Path) -> None:
    """Remove an entry that turned out to be useless."""
    shutil.rmtree(folder, ignore_errors=True)


def _make(final: Path, build: Callable[[Path], None], keep: int) -> None:
    try:
        final.parent.mkdir(mode=0o700, exist_ok=True)
        _expire(final.parent, keep)
        work = Path(tempfile.mkdtemp(prefix=".new-", dir=final.parent))
        try:
            build(work)
            work.rename(final)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
    except OSError as e:
        raise LabSetupError(describe(e, f"preparing {final.parent.name} in the cache")) from e


def _expire(folder: Path, keep: int) -> None:
    """Drop leftovers of killed builds and all but the latest used entries."""
    for stale in folder.glob(".new-*"):
        shutil.rmtree(stale, ignore_errors=True)
    entries = sorted(folder.iterdir(), key=lambda p: p.stat().st_mtime, reverse=True)
    for old in entries[keep:]:
        shutil.rmtree(old, ignore_errors=True)
