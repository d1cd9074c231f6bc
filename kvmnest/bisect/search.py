"""The search itself, over an ordered list of kernels, with every answer kept on disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from kvmnest.bisect.probe import BAD, GOOD, SKIP, Answer
from kvmnest.errors import HarnessError, KvmnestError
from kvmnest.mutants.record import write_json

SCHEMA = 1


class NotBisectable(KvmnestError):
    """The ends do not differ as stated, so there is nothing to search."""

    exit_code = 2


@dataclass
class Log:
    """Answers so far, by kernel; written to ``path`` after each."""

    path: Path | None
    question: str
    answers: dict[str, Answer] = field(default_factory=dict)

    def add(self, name: str, answer: Answer) -> None:
        """Note an answer."""
        self.answers[name] = answer
        if self.path:
            write_json(
                self.path,
                {
                    "schema": SCHEMA,
                    "question": self.question,
                    "answers": {name: asdict(answer) for name, answer in self.answers.items()},
                },
            )


def load_log(path: Path, question: str) -> Log:
    """Read the answers of an interrupted search. Raises HarnessError if they are of another."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        answers = {name: Answer(**answer) for name, answer in found["answers"].items()}
        asked = found["question"]
    except FileNotFoundError:
        return Log(path, question)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise HarnessError(f"{path} is no state of kvmnest bisect: {error}") from error
    if asked != question:
        raise HarnessError(f"{path} belongs to another search ({asked}): name another --state")
    return Log(path, question, answers)


@dataclass(frozen=True)
class Found:
    """Where the outcome changes: between ``last_good`` and ``first_bad``.

    ``skipped`` holds the kernels between the two that could not be tested.
    """

    last_good: str
    first_bad: str
    skipped: tuple[str, ...]


def search(
    names: Sequence[str],
    ask: Callable[[str], Answer],
    log: Log,
    on_answer: Callable[[str, Answer], None],
) -> Found:
    """Find the first bad of ``names``, which start with a good one and end with a bad one.

    Raises NotBisectable if they do not.
    """

    def answer(name: str) -> str:
        if name not in log.answers:
            log.add(name, ask(name))
        on_answer(name, log.answers[name])
        return log.answers[name].verdict

    first, last = answer(names[0]), answer(names[-1])
    if (first, last) == (BAD, GOOD):
        raise NotBisectable(
            f"good and bad are swapped: {names[0]} is bad and {names[-1]} is good (to find a fix,"
            " give the fixed kernel as --bad with --find fix)"
        )
    for name, verdict, wanted in ((names[0], first, GOOD), (names[-1], last, BAD)):
        if verdict != wanted:
            shown = "cannot be tested" if verdict == SKIP else f"is {verdict}"
            evidence = log.answers[name].evidence
            raise NotBisectable(f"{name} {shown}, expected {wanted}: {evidence}")
    low, high = 0, len(names) - 1
    skipped: set[int] = set()
    while True:
        left = [index for index in range(low + 1, high) if index not in skipped]
        if not left:
            between = tuple(names[index] for index in range(low + 1, high))
            return Found(names[low], names[high], between)
        middle = min(left, key=lambda index: abs(2 * index - low - high))
        verdict = answer(names[middle])
        if verdict == SKIP:
            skipped.add(middle)
        elif verdict == GOOD:
            low = middle
        else:
            high = middle
