"""Where a bisection by restarts stands, on disk before anything is done about it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import stat
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from kvmnest import reading
from kvmnest.bisect import disk
from kvmnest.bisect.journal import ANSWER_SCHEMA
from kvmnest.bisect.plan import Plan
from kvmnest.bisect.probe import Answer
from kvmnest.errors import HarnessError, UsageError
from kvmnest.schema import COUNT, TEXT, TEXTS, by_name, exactly

SCHEMA = 1
FOLDER = Path("/var/lib/kvmnest-bisect")

# Phases of the whole.
PREPARE, SEARCH, FINISH, DONE = "prepare", "search", "finish", "done"
# Phases of one kernel's trial.
INSTALL, BOOT, ARMED, TEST = "install", "boot", "armed", "test"


@dataclass
class Trial:
    """The trial of one kernel, by the name that the search has for it (a release or a commit).

    Attributes:
        phase: INSTALL: to be built and installed. BOOT: to be booted, or to be tested if it runs.
            ARMED: the next boot goes into it. TEST: the case was begun.
        boot_id: the boot in which ARMED or TEST was entered.
        boots: restarts into it; ``missed`` are those in which another kernel came up.
        lost: runs of the case in which the machine went down.
        runs: answers of the runs that ended.
    """

    name: str
    phase: str = INSTALL
    release: str = ""
    boot_id: str = ""
    boots: int = 0
    missed: int = 0
    lost: int = 0
    runs: list[Answer] = field(default_factory=list)


@dataclass
class State:
    """All that a restart must not lose, besides the journal of the steps.

    Attributes:
        home: the kernel that ran at the start, which is the default meanwhile.
        default: what the boot menu had saved as its default before.
        prepared_in: the boot in which the menu was changed: its kernel runs without our parameters.
        installed: releases that we installed, or began to.
        homeward: restarts into ``home`` at the end.
        result: lines of the result, and its exit ``code``.
    """

    folder: Path
    plan: Plan
    home: str
    default: str
    prepared_in: str
    keep_kernels: bool = False
    stay: bool = False
    phase: str = PREPARE
    installed: list[str] = field(default_factory=list)
    trial: Trial | None = None
    homeward: int = 0
    result: list[str] = field(default_factory=list)
    code: int = 0

    @property
    def journal(self) -> Path:
        """The steps of the search."""
        return journal_in(self.folder)

    def save(self) -> None:
        """Write it; it is on the disk when this returns. Raises HarnessError."""
        content = {**asdict(self), "folder": None, "schema": SCHEMA}
        disk.replace(_file(self.folder), json.dumps(content, indent=1) + "\n")

    def note_installed(self, release: str) -> None:
        """Note that this kernel is ours to remove, before it is installed."""
        if release not in self.installed:
            self.installed.append(release)
            self.save()


def journal_in(folder: Path) -> Path:
    """The journal in a state folder."""
    return folder / "steps.jsonl"


def _file(folder: Path) -> Path:
    return folder / "state.json"


def load(folder: Path) -> State | None:
    """Read the state of a bisection; None if there is none. Raises HarnessError."""
    path = _file(folder)
    try:
        content = reading.document(path, "state of kvmnest bisect", _SCHEMA)
    except reading.NoSuchFile:
        return None
    del content["schema"]
    content |= {"folder": folder, "plan": Plan(**content["plan"])}
    if content.get("trial"):
        runs = [Answer(**run) for run in content["trial"].pop("runs", ())]
        content["trial"] = Trial(**content["trial"], runs=runs)
    return State(**content)


_FLAG = {"type": "boolean"}
_TEXT_OR_NONE = {"type": ["string", "null"]}
_SCHEMA = exactly(
    ["schema", "plan", "home", "default", "prepared_in"],
    schema={"const": SCHEMA},
    folder={"type": "null"},
    plan=exactly(
        ["case", "params"],
        params=by_name(TEXT),
        find={"enum": ["bug", "fix"]},
        repeat={"type": "integer", "minimum": 1},
        kernels=TEXTS,
        limit={"type": ["number", "null"], "minimum": 0},
        boot={"enum": ["lab", "qemu", "reboot"]},
        **dict.fromkeys(("case", "good", "bad", "git", "build", "install", "release"), TEXT),
        **dict.fromkeys(("kernel", "kvm_modules", "emulator"), _TEXT_OR_NONE),
    ),
    phase={"enum": [PREPARE, SEARCH, FINISH, DONE]},
    installed=TEXTS,
    trial={
        "anyOf": [
            {"type": "null"},
            exactly(
                ["name"],
                phase={"enum": [INSTALL, BOOT, ARMED, TEST]},
                runs={"type": "array", "items": ANSWER_SCHEMA},
                **dict.fromkeys(("name", "release", "boot_id"), TEXT),
                **dict.fromkeys(("boots", "missed", "lost"), COUNT),
            ),
        ]
    },
    homeward=COUNT,
    result=TEXTS,
    code={"type": "integer", "minimum": 0, "maximum": 255},
    **dict.fromkeys(("home", "default", "prepared_in"), TEXT),
    **dict.fromkeys(("keep_kernels", "stay"), _FLAG),
)


def _require_own(folder: Path) -> None:
    """Commands in it are run by us: nobody else may be able to replace it. Raises HarnessError."""
    for path in (folder, *folder.parents):
        status = path.stat()
        open_to_others = status.st_mode & 0o022 and not status.st_mode & stat.S_ISVTX
        if status.st_uid not in (0, os.geteuid()) or open_to_others:
            raise HarnessError(f"cannot use {folder}: {path} can be changed by other users")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder, made private if it is not there.

    Raises UsageError if another does, HarnessError if it is not private.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _require_own(folder)
        folder.chmod(0o700)
        fd = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise HarnessError(f"cannot use {folder}: {error.strerror}") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise UsageError(
            f"a bisection is at work in {folder} (journalctl -u kvmnest-bisect)"
        ) from None
    finally:
        os.close(fd)
