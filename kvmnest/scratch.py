"""Private folders, in the temporary directory or another, which no run leaves for good.

A folder is locked for as long as its process works with it. Its end removes it, be it after two
Ctrl-C; what a process left that was killed, the next one that makes a folder there removes.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

PREFIX = "kvmnest-lab-"
_MAKING = 60.0  # seconds that nobody takes from making a folder to locking it


def sweep(place: Path) -> None:
    """Remove folders whose owner was killed: the lock inside is free again, or gone already.

    A folder has its lock before it gets its name, and loses it only while it is removed.
    """
    for folder in (*place.glob(f"{PREFIX}*"), *place.glob(f".{PREFIX}*")):
        with contextlib.suppress(OSError):
            status = folder.stat()
            if status.st_uid != os.getuid():
                continue
            if folder.name.startswith(".") and time.time() - status.st_mtime < _MAKING:
                continue
            try:
                fd = os.open(folder / "lock", os.O_RDWR | os.O_CLOEXEC)
            except FileNotFoundError:
                shutil.rmtree(folder, ignore_errors=True)
                continue
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(fd)


class Folder:
    """An empty folder of its own, in ``place`` (default: the temporary directory).

    ``before_removal`` is called if the process ends before. Raises OSError if it cannot be made.
    """

    def __init__(
        self, before_removal: Callable[[], None] = lambda: None, place: Path | None = None
    ) -> None:
        where = place or Path(tempfile.gettempdir())
        sweep(where)
        # It gets the name that sweep looks for when its lock is held, not before.
        made = Path(tempfile.mkdtemp(prefix=f".{PREFIX}", dir=where))
        self._lock = os.open(made / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self.path = made.rename(made.with_name(made.name.removeprefix(".")))
        self.before_removal = before_removal
        self._owner = os.getpid()
        _live.add(self)

    @property
    def ours(self) -> bool:
        """Whether this process made it, not the one that it was forked from."""
        return self._owner == os.getpid()

    def remove(self) -> None:
        """Remove it with all that it holds."""
        shutil.rmtree(self.path, ignore_errors=True)
        _live.discard(self)
        os.close(self._lock)


_live: set[Folder] = set()


@atexit.register
def _remove_all() -> None:
    """What an end in the middle left: of other threads, or since a removal was interrupted."""
    mine = [folder for folder in _live if folder.ours]
    if not mine:
        return
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    for folder in mine:
        with contextlib.suppress(Exception):
            folder.before_removal()
        folder.remove()


@contextlib.contextmanager
def folder(place: Path | None = None) -> Iterator[str]:
    """A folder for as long as the context lasts; its name. See Folder."""
    made = Folder(place=place)
    try:
        yield str(made.path)
    finally:
        made.remove()
