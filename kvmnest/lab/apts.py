"""Who knows Debian's kernels: the archive through an apt of its own, and this system's apt."""

from __future__ import annotations

import functools
from pathlib import Path

from kvmnest.lab import archive, cache, debian
from kvmnest.lab.errors import LabSetupError


def archive_folder() -> Path:
    """Where the archive's apt has its configuration and lists."""
    return cache.root() / "archive"


def system() -> debian.Apt:
    """The apt of this machine; what it said is kept until its lists change."""
    notes = cache.root() / "debian" / f"system-{archive.system_stamp()}"
    if not notes.is_file():
        notes.parent.mkdir(mode=0o700, exist_ok=True)
        for old in notes.parent.glob("system-*"):
            cache.drop(old)
    return debian.Apt(notes=notes)


def every() -> list[debian.Apt]:
    """Who knows Debian's kernels: the archive as it is now, and the system's apt.

    Raises LabSetupError if neither can be asked.
    """
    found, why = [], None
    try:
        with cache.locked("archive"):
            found.append(archive.ask(archive_folder()))
    except LabSetupError as error:
        why = error
    own = system()
    try:
        if own.offers:
            found.append(own)
    except LabSetupError as error:
        why = why or error
    if not found:
        raise why or LabSetupError("apt knows no kernel")
    if why is not None:
        _tell_once(f"only kernels of this system's own apt can be had: {why}")
    return found


@functools.cache
def _tell_once(text: str) -> None:
    cache.tell(text)


def of(release: str) -> debian.Apt:
    """The apt that knows a kernel release; the archive's if none does.

    Raises LabSetupError if apt cannot be asked.
    """
    asked = every()
    return next((apt for apt in asked if release in apt.offers), asked[0])
