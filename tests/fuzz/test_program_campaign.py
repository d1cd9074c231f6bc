"""A run of programs: verdicts, groups, machines that die, the journal. Without a kernel."""

import json
from pathlib import Path
from typing import Any

import pytest
from program_machines import FACTS, NOTHING, STEP, Machine, exit_seen

from kvmnest.errors import HarnessError, KvmnestError, UsageError
from kvmnest.fuzz.programs import known
from kvmnest.fuzz.programs.campaign import (
    AGREE,
    CRASHED,
    DISAGREE,
    KNOWN,
    Campaign,
    Oracle,
    Report,
    Verdict,
    judge,
    worst,
)
from kvmnest.fuzz.programs.compare import Difference
from kvmnest.fuzz.programs.journal import Journal
from kvmnest.fuzz.programs.places import Place, Ran, common
from kvmnest.fuzz.programs.program import Program
from kvmnest.fuzz.programs.shrink import shrink
from kvmnest.vmx import ExitReason

RF = known.Known("guest.GUEST_RFLAGS", "Bochs", "RF", after="Exit(HLT)", bits=1 << 16)
SAID = {"lab": "Succeed", "ept=0": "VMfailInvalid", "moved": "Succeed", "6.1": "VMfailInvalid"}


def test_verdicts() -> None:
    same = Ran([[exit_seen(ExitReason.HLT, {"GUEST_RFLAGS": 2})]])
    flag = Ran([[exit_seen(ExitReason.HLT, {"GUEST_RFLAGS": 0x10002})]])
    assert judge(same, same, [RF]).kind == AGREE
    assert judge(same, flag, [RF]).kind == KNOWN
    assert judge(same, flag, []).kind == DISAGREE
    assert judge(Ran([], "kernel panic"), same, []).kind == CRASHED
    warned = Ran(same.seen, warning="WARNING: CPU: 0 PID: 1 at arch/x86/kvm/x86.c:1 f+0x1/0x2\n")
    assert judge(warned, same, []).kind == CRASHED


def campaign(deadly: int = -1) -> Campaign:
    kvm = Place("lab", Machine("lab", "VMfailInvalid", deadly))
    other = Place("reference", Machine("reference", "Succeed"))
    return Campaign(kvm, [Oracle("reference", other, [])], common(kvm.ask(), other.ask()))


def test_a_campaign_groups_and_shrinks() -> None:
    """Two programs disagree in the same way; one step is left of the first."""
    good, bad = Program((NOTHING,)), Program((NOTHING, NOTHING, STEP, NOTHING))
    tried = campaign()
    report = tried.run(enumerate([good, bad, bad]))
    assert (report.kinds[AGREE], report.kinds[DISAGREE]) == (1, 2)
    (finding,) = report.findings.values()
    assert (finding.number, finding.count) == (1, 2)
    signature = finding.verdict.signature
    small = shrink(bad, lambda ps: [v.signature == signature for (v,) in tried.verdicts(ps)])
    assert small == Program(({**STEP, "regs": {}},))
    assert shrink(good, lambda ps: [False for _ in ps]) is None


def test_what_several_machines_say_is_told_apart() -> None:
    """Each has its verdict and its findings; the worst verdict is that of the program."""
    places = {name: Place(name, Machine(name, outcome)) for name, outcome in SAID.items()}
    oracles = [Oracle(name, place, []) for name, place in places.items() if name != "lab"]
    report = Campaign(places["lab"], oracles, FACTS).run([(0, Program((STEP,)))])
    assert report.kinds == {DISAGREE: 1}
    assert report.by == {"ept=0": {DISAGREE: 1}, "moved": {AGREE: 1}, "6.1": {DISAGREE: 1}}
    assert sorted(f.verdict.against for f in report.findings.values()) == ["6.1", "ept=0"]
    assert report.document()["findings"][0]["against"] == "ept=0"
    verdicts = [Verdict(("a",)), Verdict(("b",)), Verdict()]
    assert worst(verdicts) == Verdict(("a", "b"))
    assert worst([*verdicts, Verdict(crashed="dead")]).kind == CRASHED


def test_known_reasons_are_counted_once_for_a_program() -> None:
    report = Report()
    verdicts = [Verdict(("a",), against="x"), Verdict(("a", "b"), against="y")]
    for number in range(2):
        report.add(number, Program(()), Ran([]), verdicts)
    assert report.known == {"a": 2, "b": 2}


def test_a_program_that_kills_the_lab_is_a_finding_and_the_rest_runs() -> None:
    report = campaign(deadly=1).run(enumerate([Program((NOTHING,))] * 3))
    assert report.programs == 3
    assert report.kinds[CRASHED] == 1
    assert "kernel panic" in next(iter(report.findings))


def test_a_lab_that_starts_nothing() -> None:
    class Dead(Machine):
        def do(self, task: Any, on_event: Any, journal: Path | None = None) -> str:
            on_event({"facts": FACTS})
            return "kernel panic" if json.loads(task.work)["programs"] else ""

    place = Place("lab", Dead("lab", ""))
    with pytest.raises(HarnessError, match="no program was started: kernel panic"):
        place.run([(0, Program((NOTHING,)))], FACTS)


def test_journal_of_a_run_that_goes_on(tmp_path: Path) -> None:
    """What was judged is not run again; a cut line and the program that was running are known."""
    path, run = tmp_path / "j", {"programs": 1}
    journal = Journal(path, run, go_on=False)
    journal.add(0, Verdict())
    journal.add(
        1,
        Verdict(("KVM: x",), Difference(2, 0, "regs.rax", "Exit(HLT)", 1, 2), against="reference"),
    )
    with path.open("a") as file:
        file.write('{"program": 2, "ver')
    events = [{"start": 0}, {"step": 0}, {"end": 0, "seen": []}, {"start": 3}, {"step": 4}]
    journal.steps.write_text("".join(json.dumps(event) + "\n" for event in events))
    again = Journal(path, run, go_on=True)
    assert sorted(again.done) == [0, 1]
    shows = "against reference: step 2: regs.rax 0x1 or 0x2 (Exit(HLT))"
    assert again.done[1]["shows"] == shows
    assert again.crashed == (3, "step 4: the host went down")


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"schema": 1, "programs": 2}', "another run"),
        ('{"schema": 2, "programs": 1}', "schema 2"),
        (
            '{"schema": 1, "programs": 1}\n{"program": 1, "verdict": "fine"}',
            "line 2 is not a journal",
        ),
        ("[", "is not a journal"),
    ],
)
def test_journal_that_is_another(tmp_path: Path, line: str, problem: str) -> None:
    path = tmp_path / "j"
    path.write_text(f"{line}\n")
    with pytest.raises(KvmnestError, match=problem):
        Journal(path, {"programs": 1}, go_on=True)
    with pytest.raises(UsageError, match="--continue"):
        Journal(path, {"programs": 1}, go_on=False)
