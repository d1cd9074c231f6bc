"""The steps of a bisection over git, on disk as JSON lines: each is there before the next begins.

git knows which commits are good and bad, but not why, nor what the ends were found to be.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kvmnest.bisect.probe import Answer
from kvmnest.errors import HarnessError

SCHEMA = 1


@dataclass(frozen=True)
class Header:
    """What is searched: the question as text, hashes of the ends, where HEAD was before."""

    question: str
    good: str
    bad: str
    came_from: str


@dataclass
class Journal:
    """Answers by commit hash, in order of the steps; ``path`` has one line for each."""

    path: Path
    header: Header
    answers: dict[str, Answer] = field(default_factory=dict)

    def add(self, commit: str, subject: str, answer: Answer) -> None:
        """Append a step; it is on the disk when this returns. Raises HarnessError."""
        self.answers[commit] = answer
        _append(self.path, {"commit": commit, "subject": subject, "at": _now(), **asdict(answer)})


def start(path: Path, header: Header) -> Journal:
    """Begin a journal, replacing an old one. Raises HarnessError if it cannot be written."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise HarnessError(f"cannot write {path}: {error.strerror}") from error
    _append(path, {"schema": SCHEMA, "at": _now(), **asdict(header)})
    return Journal(path, header)


def load(path: Path, question: str) -> Journal | None:
    """Read the journal of an interrupted bisection; None if there is none.

    A last line without its end was being written when the power failed: it is cut off. Raises
    HarnessError if the file is something else, or belongs to another search.
    """
    try:
        data = path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if whole != data:
            os.truncate(path, len(whole))
        first, *rest = (json.loads(line) for line in whole.splitlines())
        header = Header(*(first[name] for name in ("question", "good", "bad", "came_from")))
        answers = {}
        for step in rest:
            fields = {name: step[name] for name in ("verdict", "evidence", "kernel", "kind")}
            answers[step["commit"]] = Answer(**fields)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise HarnessError(f"{path} is no journal of kvmnest bisect: {error}") from error
    if header.question != question:
        raise HarnessError(f"{path} belongs to another search ({header.question})")
    return Journal(path, header, answers)


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _append(path: Path, line: dict[str, Any]) -> None:
    try:
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        with open(fd, "wb") as file:
            file.write(json.dumps(line).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise HarnessError(f"cannot write {path}: {error.strerror}") from error
