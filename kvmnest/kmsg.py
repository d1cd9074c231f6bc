"""The kernel's messages, read from /dev/kmsg (admin-guide "dev-kmsg"): also in the lab's PID 1."""

from __future__ import annotations

import errno
import os

PATH = "/dev/kmsg"
#: Names of the levels, the most severe first; a message's number is its place here.
LEVELS = ("emerg", "alert", "crit", "err", "warning", "notice", "info", "debug")
WARNING = LEVELS.index("warning")


def read(fd: int, max_level: int = WARNING) -> bytes:
    """Messages of the kernel that came since the last call: ``[   12.345678] text`` each.

    ``fd`` is open without blocking. Messages less severe than ``max_level`` are left out, and so
    are those that programs write to /dev/kmsg (their facility is never 0, the kernel's).
    Raises OSError.
    """
    found: list[bytes] = []
    while True:
        try:
            record = os.read(fd, 8192)
        except BlockingIOError:
            return b"".join(found)
        except OSError as e:
            if e.errno == errno.EPIPE:  # overwritten before it was read: go on with the next
                continue
            raise
        if not record:  # no /dev/kmsg: it has no end
            return b"".join(found)
        head, _, text = record.partition(b";")
        priority, _, stamp, *_ = head.split(b",")
        if int(priority) <= max_level:  # facility 0, so the number is the level
            line = text.split(b"\n", 1)[0]
            found.append(b"[%12.6f] %s\n" % (int(stamp) / 1e6, line))


class KernelLog:
    """Messages from now on. Where /dev/kmsg cannot be read there are none, ``readable`` is False.

    It needs root or CAP_SYSLOG where the sysctl kernel.dmesg_restrict is 1.
    """

    def __init__(self, max_level: int = WARNING, path: str = PATH) -> None:
        self._max_level = max_level
        self._fd = -1
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            os.lseek(self._fd, 0, os.SEEK_END)
        except OSError:
            self.close()

    @property
    def readable(self) -> bool:
        """Whether there is a log to read."""
        return self._fd >= 0

    def drain(self) -> str:
        """The messages since the last call, "" for none."""
        if self._fd < 0:
            return ""
        try:
            return read(self._fd, self._max_level).decode(errors="replace")
        except (OSError, ValueError):
            return ""

    def close(self) -> None:
        """Close it; a second call does nothing."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
