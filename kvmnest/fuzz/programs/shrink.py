"""The fewest steps, parts of L2's code and fields that still show what a program shows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from kvmnest.fuzz.programs.program import Program, Step
from kvmnest.fuzz.shrink import without

#: Programs that are tried at once, in one boot.
_ROUND = 40

Shows = Callable[[Sequence[Program]], list[bool]]


def _smaller_steps(step: Step) -> Iterator[Step]:
    """A step, a little simpler."""
    for name in ("fields", "regs"):
        names = [*step.get(name, ())]
        for kept in without(names):
            yield {**step, name: {each: step[name][each] for each in kept}}
    for parts in without(step.get("parts", ())):
        yield {**step, "parts": [*parts]}
    if step.get("most", 1) > 1:
        yield {**step, "most": 1}
    if step["do"] == "base" and step["mode"] != "LONG":
        yield {**step, "mode": "LONG"}


def smaller(program: Program) -> Iterator[Program]:
    """Programs a little simpler, the biggest cuts first."""
    steps = program.steps
    for kept in without(steps):
        if kept:
            yield Program(kept)
    for number, step in enumerate(steps):
        for other in _smaller_steps(step):
            yield Program((*steps[:number], other, *steps[number + 1 :]))


def shrink(program: Program, shows: Shows, rounds: int = 40) -> Program | None:
    """The smallest program found that shows it; None if this one does not show it again.

    ``shows`` runs programs and tells which of them show it. Each round is one call.
    """
    best = program
    if not shows([best])[0]:
        return None
    tried: set[str] = set()
    for _ in range(rounds):
        candidates = [each for each in smaller(best) if str(each) not in tried][:_ROUND]
        if not candidates:
            break
        tried.update(map(str, candidates))
        found = shows(candidates)
        best = next((c for c, ok in zip(candidates, found, strict=True) if ok), best)
    return best
