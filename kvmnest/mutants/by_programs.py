"""Does `kvmnest fuzz programs` find a broken KVM, and after how many programs?"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from kvmnest import reading
from kvmnest.fuzz.judge import Judge
from kvmnest.fuzz.machines import LabMachine
from kvmnest.fuzz.model import capabilities
from kvmnest.fuzz.programs import known
from kvmnest.fuzz.programs.campaign import CRASHED, DISAGREE, judge
from kvmnest.fuzz.programs.generate import ProgramGenerator
from kvmnest.fuzz.programs.places import Numbered, Place, Ran, common, reference
from kvmnest.kernel.build import BuildError, build_modules
from kvmnest.kernel.edits import EditError
from kvmnest.lab.emulators import Choice
from kvmnest.mutants.catalogue import Mutant
from kvmnest.schema import COUNT, TEXT, Schema, exactly

#: Results that are kept, for the documentation.
FILE = Path(__file__).parent.parent / "data" / "mutants-by-programs.json"
_REFERENCE = "reference"
#: Programs of one boot.
_BATCH = 100


@dataclass(frozen=True)
class Hunt:
    """One mutant: the program that showed it, -1 if none of ``tried`` did; what it showed.

    ``seconds`` are those of the lab, without the build of the modules. ``why``: it was not tried.
    """

    id: str
    title: str
    program: int = -1
    tried: int = 0
    seconds: float = 0.0
    shows: str = ""
    why: str = ""


_HUNT: Schema = exactly(
    ["id", "title", "program", "tried", "seconds", "shows", "why"],
    id=TEXT,
    title=TEXT,
    program={"type": "integer", "minimum": -1},
    tried=COUNT,
    seconds={"type": "number", "minimum": 0},
    shows=TEXT,
    why=TEXT,
)
_SCHEMA: Schema = exactly(
    ["schema", "kernel", "seed", "clean", "hunts"],
    schema={"const": 1},
    kernel=TEXT,
    seed=COUNT,
    clean=COUNT,
    hunts={"type": "array", "items": _HUNT},
)


class Hunter:
    """Hunts mutants of one kernel by the programs of a seed, on the reference CPU and in the lab.

    Only programs that show nothing new on the unmodified kernel count (``clean`` of them).
    Raises KvmnestError if one of the two machines cannot be started.
    """

    def __init__(
        self,
        release: str,
        seed: int,
        count: int,
        emulator: Choice,
        on_line: Callable[[str], None],
    ) -> None:
        self.release, self.seed = release, seed
        self._emulator, self._on_line = emulator, on_line
        plain = self._lab(None)
        bare = reference(emulator.program, emulator.cpu_model)
        self._facts = common(plain.ask(), bare.ask())
        self._known = known.load(str(self._facts["kernel"]), _REFERENCE)
        machines = [capabilities(place.facts) for place in (plain, bare)]
        drawn = ProgramGenerator(Judge(self._facts, "lab"), others=machines)
        programs = [(number, drawn.numbered(seed, number)) for number in range(count)]
        self._wanted = bare.run(programs, self._facts)
        bad: set[int] = set()
        for batch in _batches(programs):
            for number, ran in plain.run(batch, self._facts).items():
                if self._shows(number, ran):
                    bad.add(number)
            said = f"unmodified: {batch[-1][0] + 1} programs, {len(bad)} show something already"
            self._on_line(said)
        self._programs = [(number, program) for number, program in programs if number not in bad]
        self.clean = len(self._programs)

    def _lab(self, modules: str | None) -> Place:
        machine = LabMachine(self.release, modules=modules, emulator=self._emulator)
        return Place("lab", machine)

    def _shows(self, number: int, ran: Ran) -> str:
        verdict = judge(ran, self._wanted[number], self._known, _REFERENCE)
        return str(verdict) if verdict.kind in (DISAGREE, CRASHED) else ""

    def hunt(self, mutant: Mutant) -> Hunt:
        """Build a mutant, and run programs until one shows something new."""
        found = self._hunt(mutant)
        what = f"program {found.program}, {found.seconds:.0f} s: {found.shows}"
        missed = found.why or f"not found by {found.tried} programs in {found.seconds:.0f} s"
        self._on_line(f"{mutant.id}: {what if found.program >= 0 else missed}")
        return found

    def _hunt(self, mutant: Mutant) -> Hunt:
        nothing = Hunt(mutant.id, mutant.title)
        if mutant.params:
            return replace(nothing, why="needs module parameters")
        if not mutant.exists_on(self.release):
            return replace(nothing, why=f"Linux {mutant.since} and later only")
        try:
            folder = build_modules([mutant.edit_for(self.release)], self.release)
        except (EditError, BuildError) as error:
            return replace(nothing, why=str(error))
        lab, began = self._lab(str(folder)), time.monotonic()
        for batch in _batches(self._programs):
            seen: list[tuple[int, str]] = []

            def enough(number: int, ran: Ran, seen: list[tuple[int, str]] = seen) -> bool:
                shows = self._shows(number, ran)
                seen += [(number, shows)] if shows else []
                return bool(shows)

            for number, ran in lab.run(batch, self._facts, enough=enough).items():
                if not seen and (ran.crashed or ran.warning):
                    seen.append((number, self._shows(number, ran)))
            if seen:
                number, shows = seen[0]
                tried = sum(n <= number for n, _ in self._programs)
                took = round(time.monotonic() - began, 1)
                return replace(nothing, program=number, tried=tried, seconds=took, shows=shows)
        took = round(time.monotonic() - began, 1)
        return replace(nothing, tried=self.clean, seconds=took)

    def document(self, hunts: Sequence[Hunt]) -> dict[str, Any]:
        """For JSON: schema 1."""
        head = {"schema": 1, "kernel": self._facts["kernel"], "seed": self.seed}
        return {**head, "clean": self.clean, "hunts": [asdict(each) for each in hunts]}


def _batches(programs: Numbered) -> Iterator[Numbered]:
    for start in range(0, len(programs), _BATCH):
        yield programs[start : start + _BATCH]


def read(path: Path = FILE) -> Mapping[str, Any]:
    """Results that ``--json`` wrote. Raises HarnessError if they are damaged."""
    return reading.document(path, "file of kvmnest mutants --programs", _SCHEMA)


def rows(found: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """Rows of a table: id, title, programs, seconds, what was seen."""
    for each in found["hunts"]:
        tried, shows = str(each["tried"]), each["shows"]
        if each["program"] < 0:
            tried, shows = f"none of {tried}", ""
        if each["why"]:
            tried, shows = "", f"not tried: {each['why']}"
        yield each["id"], each["title"], tried, f"{each['seconds']:.0f}", shows
