"""Programs that are made of those which were kept, because they reached new blocks of KVM."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

from kvmnest.fuzz.programs.contents import STORE
from kvmnest.fuzz.programs.generate import FLUSH, ProgramGenerator
from kvmnest.fuzz.programs.l1code import REGIONS
from kvmnest.fuzz.programs.program import Program, Step

#: Steps of a program that is made of others, at most.
_MOST = 120
#: How much of what is drawn is made of others, once there are some.
_SHARE = 0.5


def programs(
    generator: ProgramGenerator, seed: int, kept: Callable[[], Sequence[Program]], every: int
) -> Iterator[tuple[int, Program]]:
    """Numbered programs without end: fresh ones, and, as soon as some are kept, made of those.

    ``kept`` is asked again before every ``every``-th program.
    """
    number, some = 0, kept()
    while True:
        chance = random.Random(f"kvmnest guided program {seed} {number}")
        fresh = generator.numbered(seed, number)
        yield number, made_of(chance, fresh, some) if chance.random() < _SHARE and some else fresh
        number += 1
        if number % every == 0:
            some = kept()


def made_of(chance: random.Random, fresh: Program, kept: Sequence[Program]) -> Program:
    """A kept program with parts of others, or of a fresh one, put in, taken out and repeated."""
    steps = [*chance.choice(kept).steps]
    for _ in range(chance.randint(1, 3)):
        at = chance.randrange(len(steps) + 1)
        if chance.random() < 0.3 and len(steps) > 4:
            del steps[at : at + chance.randint(1, 4)]
            continue
        other = chance.choice((fresh, chance.choice(kept))).steps
        start = chance.randrange(len(other)) if other else 0
        steps[at:at] = other[start : start + chance.randint(1, 12)]
    return Program(tuple(_sound(steps))[:_MOST])


def _sound(steps: Sequence[Step]) -> Iterator[Step]:
    """The steps, with what keeps their outcome defined.

    Changed EPT entries are invalidated, and no VMCS is active at VMXOFF (SDM, "Operations that
    Invalidate Cached Mappings"; "VMXOFF").
    """
    for step in steps:
        if step["do"] == "alone" and step["name"] == "vmxoff":
            for region in REGIONS:
                yield {"do": "address", "name": "vmclear", "place": region, "offset": 0}
        yield step
        if step["do"] == "l1" and step["code"] == STORE.hex():
            yield FLUSH
