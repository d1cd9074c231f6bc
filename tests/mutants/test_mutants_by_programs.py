"""Mutants hunted by programs: what is kept of it, and the hunt itself on stand-ins."""

import sys
from pathlib import Path
from typing import Any

import pytest

from kvmnest.cli.main import main
from kvmnest.fuzz.programs.places import Ran
from kvmnest.fuzz.programs.program import Program
from kvmnest.kernel.build import BuildError
from kvmnest.mutants import by_programs, catalogue
from kvmnest.mutants.by_programs import Hunter

SAME = Ran([[{"end": ["Succeed"]}]])
OTHER = Ran([[{"end": ["VMfailInvalid"]}]])


class Lab:
    """Shows something in the programs of ``broken``; dies in ``deadly``."""

    def __init__(self, broken: tuple[int, ...] = (), deadly: int = -1) -> None:
        self.broken, self.deadly = broken, deadly

    def run(self, programs: Any, assumed: Any, *, enough: Any = None) -> dict[int, Ran]:
        found = {}
        for number, _ in programs:
            found[number] = OTHER if number in self.broken else SAME
            if number == self.deadly:
                found[number] = Ran([], "step 1: kernel panic")
            elif enough and enough(number, found[number]):
                break
        return found


def hunter(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> tuple[Hunter, list[str]]:
    made, said = Hunter.__new__(Hunter), []
    made.release, made.seed, made._facts = "7.3.4", 1, {"kernel": "7.3.4"}
    made._known, made._on_line = (), said.append
    made._wanted = dict.fromkeys(range(250), SAME)
    # Programs 3 and 4 show something on the unmodified kernel.
    made._programs = [(n, Program(())) for n in range(250) if n not in (3, 4)]
    made.clean = len(made._programs)
    monkeypatch.setattr(made, "_lab", lambda modules: lab)
    monkeypatch.setattr(by_programs, "build_modules", lambda edits, release: Path("x"))
    return made, said


MUTANT = catalogue.select(catalogue.load(), "vmptrld-revision")[0]


@pytest.mark.parametrize(
    ("lab", "program", "tried", "shows"),
    [
        (Lab((7,)), 7, 6, "against reference: step 0: VMfailInvalid or Succeed"),
        (Lab((240,)), 240, 239, "against reference: step 0: VMfailInvalid or Succeed"),
        (Lab((3,)), -1, 248, ""),
        (Lab(deadly=130), 130, 129, "step 1: kernel panic"),
    ],
    ids=["first-boot", "third-boot", "never", "dies"],
)
def test_hunt(
    lab: Lab, program: int, tried: int, shows: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first program that shows something that it does not show without the mutant."""
    made, said = hunter(lab, monkeypatch)
    found = made.hunt(MUTANT)
    assert (found.program, found.tried, found.shows) == (program, tried, shows)
    assert len(said) == 1
    document = made.document([found])
    assert document["hunts"][0]["id"] == "vmptrld-revision"


def test_what_cannot_be_hunted(monkeypatch: pytest.MonkeyPatch) -> None:
    made, _ = hunter(Lab(), monkeypatch)

    def fail(edits: Any, release: str) -> Path:
        raise BuildError("no compiler")

    monkeypatch.setattr(by_programs, "build_modules", fail)
    assert made.hunt(MUTANT).why == "no compiler"
    with_parameters = next(m for m in catalogue.load() if m.params)
    assert made.hunt(with_parameters).why == "needs module parameters"


def test_kept_results_are_in_the_documentation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every mutant of the file is one of the catalogue, and has its row in the page."""
    found = by_programs.read()
    ids = {mutant.id for mutant in catalogue.load()}
    assert {each["id"] for each in found["hunts"]} <= ids
    pages = Path(by_programs.FILE).parents[1] / "docs"
    monkeypatch.syspath_prepend(str(pages / "extension"))
    import tables

    rows = tables.table(tables.MUTANTS).splitlines()
    assert len(rows) == 2 + len(found["hunts"])
    assert tables.MUTANTS in (pages / "fuzzing.md").read_text()
    sys.modules.pop("tables")


def test_wrong_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mutants", "--programs", "0", "--only", "vmptrld-revision"]) == 2
    assert "--programs must be at least 1" in capsys.readouterr().err
