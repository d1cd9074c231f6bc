"""The steps of a bisection on disk as JSON lines: each is there before the next begins.

A search over kernels goes on from it alone. git knows which commits are good and bad, but not
why, nor what the ends were found to be.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kvmnest import reading
from kvmnest.bisect import disk
from kvmnest.bisect.probe import BAD, GOOD, SKIP, Answer
from kvmnest.errors import HarnessError
from kvmnest.schema import TEXT, Schema, exactly

SCHEMA = 2
WHAT = "journal of kvmnest bisect"
#: What an Answer looks like in a file.
ANSWER_SCHEMA = exactly(
    ["verdict", "evidence"],
    verdict={"enum": [GOOD, BAD, SKIP]},
    **dict.fromkeys(("evidence", "kernel", "kind"), TEXT),
)


@dataclass(frozen=True)
class Header:
    """What is searched: the question as text, the ends, where HEAD was before (git only)."""

    question: str
    good: str
    bad: str
    came_from: str = ""


@dataclass(frozen=True)
class Step:
    """One answer: of which kernel or commit (hash and subject), and when (UTC)."""

    name: str
    subject: str
    at: str
    answer: Answer

    @property
    def line(self) -> str:
        """For people."""
        shown = f"{self.name[:12]} {self.subject}" if self.subject else self.name
        return f"{self.answer.verdict:4}  {shown}: {self.answer.text}"


@dataclass
class Journal:
    """The steps in their order; ``path`` has one line for each."""

    path: Path
    header: Header
    steps: list[Step] = field(default_factory=list)

    @property
    def answers(self) -> dict[str, Answer]:
        """Answers by the name of a kernel, or the hash of a commit."""
        return {step.name: step.answer for step in self.steps}

    def add(self, name: str, subject: str, answer: Answer) -> None:
        """Append a step; it is on the disk when this returns. Raises HarnessError."""
        step = Step(name, subject, _now(), answer)
        disk.append(self.path, asdict(step))
        self.steps.append(step)

    @property
    def summary(self) -> str:
        """How many steps of which kind, in one line."""
        counts = Counter(step.answer.verdict for step in self.steps)
        words = [f"{counts[verdict]} {verdict}" for verdict in (GOOD, BAD, SKIP) if counts[verdict]]
        kinds = Counter(step.answer.kind for step in self.steps if step.answer.kind)
        told = ", ".join(f"{kind} {number}" for kind, number in sorted(kinds.items()))
        return f"{len(self.steps)} tested: {', '.join(words)}" + (f" ({told})" if told else "")


def start(path: Path, header: Header) -> Journal:
    """Begin a journal, replacing an old one. Raises HarnessError if it cannot be written."""
    disk.replace(path, json.dumps({"schema": SCHEMA, "at": _now(), **asdict(header)}) + "\n")
    return Journal(path, header)


def load(path: Path, question: str | None = None) -> Journal | None:
    """Read a journal, of this ``question`` if one is given; None if there is none.

    A last line that is not whole was being written when the power failed: it is cut off, which
    stderr is told, once the rest is known to be a journal. Raises HarnessError if the file is
    something else, or belongs to another search.
    """
    try:
        lines, whole = reading.lines(path, WHAT, _schema)
    except reading.NoSuchFile:
        return None
    first, *rest = lines
    header = Header(*(first[name] for name in ("question", "good", "bad", "came_from")))
    if question is not None and header.question != question:
        raise HarnessError(f"{path} belongs to another search ({header.question})")
    if whole != path.stat().st_size:
        disk.truncate(path, whole)
        reading.tell_cut(path)
    return Journal(path, header, [_step(line) for line in rest])


def _schema(number: int) -> Schema:
    """Of the line with this number."""
    if number == 1:
        names = ("question", "good", "bad", "came_from")
        properties: dict[str, Any] = {"schema": {"const": SCHEMA}, **dict.fromkeys(names, TEXT)}
        return {"type": "object", "required": [*properties], "properties": properties}
    step = {**dict.fromkeys(("name", "subject", "at"), TEXT), "answer": ANSWER_SCHEMA}
    return {"type": "object", "required": [*step], "properties": step}


def _step(line: dict[str, Any]) -> Step:
    return Step(line["name"], line["subject"], line["at"], Answer(**line["answer"]))


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
