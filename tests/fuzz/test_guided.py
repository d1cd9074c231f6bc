"""Programs that coverage keeps: which, what is made of them, what a corpus can do without."""

import json
import random
import threading
from pathlib import Path
from typing import Any

import pytest

from kvmnest.cli.main import main
from kvmnest.coverage.collect import Collector
from kvmnest.coverage.guide import Guide
from kvmnest.coverage.record import Record, Source
from kvmnest.errors import HarnessError
from kvmnest.fuzz.judge import Judge
from kvmnest.fuzz.programs import corpus, guided
from kvmnest.fuzz.programs.contents import STORE
from kvmnest.fuzz.programs.generate import FLUSH, ProgramGenerator
from kvmnest.fuzz.programs.program import Program, problem

FACTS: dict[str, Any] = json.loads((Path(__file__).parent / "facts.json").read_text())
GENERATOR = ProgramGenerator(Judge(FACTS, "lab"))
OFF = {"do": "alone", "name": "vmxoff"}


class Blocks(Collector):
    """Blocks 0 to 9 of nested.c are at addresses 100 to 109."""

    def __init__(self) -> None:
        source = Source([(1, "f")], [*range(1, 11)], [""] * 10)
        self.record = Record("7.3", "1", {"arch/x86/kvm/vmx/nested.c": source})
        self.told = False
        self._lock = threading.Lock()

    def numbered(self, sections: dict[str, dict[str, int]]) -> dict[int, tuple[str, int]]:
        return {100 + n: ("arch/x86/kvm/vmx/nested.c", n) for n in range(10)}


def told(*addresses: int, boot: bool = False, lost: str = "") -> dict[str, Any]:
    return {"coverage": {"new": [*addresses], "lost": lost, "sections": {"m": {}} if boot else {}}}


def test_who_reached_a_block_first() -> None:
    """A block counts once, also if another boot of the lab tells it again; others do not count."""
    blocks = Blocks()
    guide = Guide(blocks, 5)
    assert guide.told() == ""
    events: list[dict[str, Any]] = [told(100, boot=True), {"start": 0}, told(100, 101, 102, 7)]
    events += [{"start": 1}, told(103), {"start": 2}, told(100, 103, boot=True)]
    for event in events:
        guide.take(event)
    assert guide.new == {0: 2, 1: 1}
    (source,) = blocks.record.sources.values()
    by = ["(before the first case)", *["fuzz programs --seed 5, program 0"] * 2]
    assert source.first[:5] == [*by, "fuzz programs --seed 5, program 1", ""]
    assert guide.told() == "nested.c 4 of 10 lines"
    with pytest.raises(HarnessError, match="does not tell all blocks"):
        guide.take(told(lost="full"))


def test_what_is_made_of_kept_programs() -> None:
    """It belongs to its seed and what is kept, is a program, and shares steps with both."""
    kept = [GENERATOR.numbered(1, number) for number in range(4)]
    fresh = GENERATOR.numbered(2, 0)
    made = [guided.made_of(random.Random(n), fresh, kept) for n in range(200)]
    assert made == [guided.made_of(random.Random(n), fresh, kept) for n in range(200)]
    assert len({str(each) for each in made}) > 150
    for each in made:
        assert problem(each.to_json()) == ""
    old = {str(step) for program in kept for step in program.steps}
    new = {str(step) for step in fresh.steps} - old
    assert any(str(step) in new for each in made for step in each.steps)


def test_what_is_made_keeps_its_outcome_defined() -> None:
    """No VMCS is active at VMXOFF, and changed EPT entries are invalidated."""
    ept = {"do": "l1", "code": STORE.hex(), "regs": {"rdi": 8}}
    made = guided.made_of(random.Random(1), Program(()), [Program((ept, OFF))])
    for number, step in enumerate(made.steps):
        if step == ept:
            assert made.steps[number + 1] == FLUSH
        if step == OFF:
            before = made.steps[number - 3 : number]
            assert [each["name"] for each in before] == ["vmclear"] * 3
    assert {str(ept), str(OFF)} <= {str(step) for step in made.steps}


def test_programs_are_fresh_until_some_are_kept() -> None:
    """What is kept is asked for again behind every hundred."""
    kept: list[Program] = []
    drawn = guided.programs(GENERATOR, 3, lambda: [*kept], 10)
    first = [program for _, program in (next(drawn) for _ in range(9))]
    assert first == [GENERATOR.numbered(3, number) for number in range(9)]
    kept.append(GENERATOR.numbered(9, 9))
    rest = [next(drawn) for _ in range(40)]
    fresh = [program == GENERATOR.numbered(3, number) for number, program in rest]
    assert fresh[0]
    assert 5 < sum(fresh) < 35


def test_a_corpus_loses_what_others_reach(tmp_path: Path) -> None:
    """The shortest go first; what shows a finding stays whatever it reaches."""
    steps = [({"do": "vmread", "field": n},) * (n + 1) for n in range(4)]
    shows = [f"{corpus.REACHES}3 blocks first"] * 3 + ["against moved: step 1: x"]
    for each, why in zip(steps, shows, strict=True):
        corpus.save(tmp_path, Program(each), why)
    order: list[int] = []

    def reached(programs: Any) -> list[int]:
        order.extend(len(program.steps) for program in programs)
        return [5, 0, 1, 0]

    assert corpus.smaller(tmp_path, reached) == (3, 4)
    assert order == [1, 2, 3, 4]
    assert sorted(len(program.steps) for program in corpus.load(tmp_path)) == [1, 3, 4]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--guided"], "--guided needs --corpus"),
        (["--guided", "--corpus", ".", "--target", "kvm"], "for the lab"),
        (["--minimize", "--corpus", "."], "--minimize needs --guided"),
    ],
)
def test_wrong_arguments(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fuzz", "programs", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
