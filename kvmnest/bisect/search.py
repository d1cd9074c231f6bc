"""The search itself, over an ordered list of kernels, with every answer kept on disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvmnest.bisect.journal import Journal, Step
from kvmnest.bisect.probe import BAD, GOOD, SKIP, Answer
from kvmnest.errors import KvmnestError


class NotBisectable(KvmnestError):
    """The ends do not differ as stated, so there is nothing to search."""

    exit_code = 2


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
    journal: Journal,
    on_step: Callable[[Step], None],
) -> Found:
    """Find the first bad of ``names``, which start with a good one and end with a bad one.

    What the journal has the answer to is not asked again. Raises NotBisectable if the ends are
    not good and bad.
    """

    def answer(name: str) -> str:
        if name not in journal.answers:
            journal.add(name, "", ask(name))
        step = next(step for step in journal.steps if step.name == name)
        on_step(step)
        return step.answer.verdict

    first, last = answer(names[0]), answer(names[-1])
    if (first, last) == (BAD, GOOD):
        raise NotBisectable(
            f"good and bad are swapped: {names[0]} is bad and {names[-1]} is good (to find a fix,"
            " give the fixed kernel as --bad with --find fix)"
        )
    for name, verdict, wanted in ((names[0], first, GOOD), (names[-1], last, BAD)):
        if verdict != wanted:
            shown = "cannot be tested" if verdict == SKIP else f"is {verdict}"
            raise NotBisectable(f"{name} {shown}, expected {wanted}: {journal.answers[name].text}")
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
