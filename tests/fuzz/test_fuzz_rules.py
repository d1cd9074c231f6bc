"""Drawing, judging, the journal, shrinking and tests of findings: without a kernel."""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmnest.cli.main import main
from kvmnest.errors import HarnessError, UsageError
from kvmnest.fuzz import testfile
from kvmnest.fuzz.generate import Generator
from kvmnest.fuzz.journal import CRASHED, Journal
from kvmnest.fuzz.judge import AGREE, DISAGREE, KNOWN, Judge, load
from kvmnest.fuzz.model import FuzzCase
from kvmnest.fuzz.run import Finding, Fuzzer
from kvmnest.fuzz.shrink import NotAgain, Shrinker
from kvmnest.l1.baseline import L2Mode
from kvmnest.vmx import Field
from kvmnest.vmx.outcome import EntryFailure, VMfailValid

# A processor as the lab's: KVM's VMX MSRs of an L1 on Linux 6.1, and the CPUID leaves.
FACTS: dict[str, Any] = json.loads((Path(__file__).parent / "facts.json").read_text())
JUDGE = Judge(FACTS, "lab")
GENERATOR = Generator(JUDGE)


@settings(max_examples=150)
@given(st.randoms(use_true_random=False))
def test_every_draw_is_judged(chance: random.Random) -> None:
    """The rules have an answer for every case, and a case survives JSON."""
    case = GENERATOR.draw(chance)
    assert FuzzCase.from_json(json.loads(json.dumps(case.to_json()))) == case
    prediction = JUDGE.predict(case)
    seen: list[Any] = ["Exit", 52]
    if prediction.must_fail:
        assert JUDGE.verdict(case, seen).kind in (DISAGREE, KNOWN)
    else:
        assert JUDGE.verdict(case, seen).kind == AGREE


def test_a_case_belongs_to_its_seed() -> None:
    cases = [GENERATOR.numbered(1, number) for number in range(60)]
    assert cases == [GENERATOR.numbered(1, number) for number in range(60)]
    assert cases != [GENERATOR.numbered(2, number) for number in range(60)]
    stages = {JUDGE.predict(case).stage for case in cases}
    assert len(stages) >= 4, "controls, host, guest and success"


def case_of(field: Field, value: int) -> FuzzCase:
    return FuzzCase(L2Mode.LONG, {field: value})


@pytest.mark.parametrize(
    ("case", "seen", "kind"),
    [
        (case_of(Field.GUEST_RFLAGS, 0), ["EntryFailure", 33, 0], AGREE),
        (case_of(Field.GUEST_RFLAGS, 0), ["Exit", 52], DISAGREE),
        (case_of(Field.GUEST_RFLAGS, 0), ["EntryFailure", 33, 4], DISAGREE),
        (case_of(Field.GUEST_RFLAGS, 0), ["VMfailValid", 7], DISAGREE),
        (case_of(Field.HOST_CR3, 1 << 63), ["VMfailValid", 8], AGREE),
        (case_of(Field.HOST_CR3, 1 << 63), ["VMfailValid", 7], DISAGREE),
        (case_of(Field.GUEST_RFLAGS, 2), ["VMfailValid", 7], DISAGREE),
        (case_of(Field.GUEST_RFLAGS, 2), ["lost", "triple fault"], DISAGREE),
        # Known: the lab's CPU looks at 32 bits only, and KVM's VMWRITE drops reserved bits.
        (case_of(Field.GUEST_PENDING_DBG_EXCEPTIONS, 1 << 40), ["Exit", 52], KNOWN),
        (case_of(Field.GUEST_FS_ACCESS_RIGHTS, 0xC193), ["Exit", 52], KNOWN),
        (case_of(Field.GUEST_FS_ACCESS_RIGHTS, 0xC192), ["Exit", 52], DISAGREE),
    ],
)
def test_verdict(case: FuzzCase, seen: list[Any], kind: str) -> None:
    assert JUDGE.verdict(case, seen).kind == kind


@pytest.mark.parametrize("end", ["triple fault", "hang"])
@pytest.mark.parametrize("field", [Field.HOST_RIP, Field.HOST_CR3, Field.HOST_RSP])
def test_an_l1_that_dies_of_its_host_state_was_entered_and_left(field: Field, end: str) -> None:
    """A VMCS that must be refused was not; one that is legal may be entered."""
    refused = {field: 0x1000, Field.CR3_TARGET_COUNT: 0x80000000}
    verdict = JUDGE.verdict(FuzzCase(changes=refused), ["lost", end])
    assert verdict.kind == DISAGREE
    assert "VM entry succeeded" in verdict.text
    assert JUDGE.verdict(FuzzCase(changes={field: 0x1000}), ["lost", end]).kind == AGREE
    # Without such a change there is no reason to die.
    dead = JUDGE.verdict(case_of(Field.GUEST_RFLAGS, 0x46), ["lost", "triple fault"])
    assert dead.kind == DISAGREE


def test_known_on_the_lab_only() -> None:
    """On real VT-x what Bochs does is a finding."""
    case = case_of(Field.GUEST_PENDING_DBG_EXCEPTIONS, 1 << 40)
    assert Judge(FACTS, "kvm").verdict(case, ["Exit", 52]).kind == DISAGREE


def test_damaged_list_of_disagreements(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_text('[[disagreement]]\nkind = "other"\nreason = "x"\n')
    with pytest.raises(HarnessError, match="unknown kind"):
        load(path)


class Broken:
    """A machine whose VM entries ignore a field, and die of ``deadly`` cases."""

    name = "lab"

    def __init__(self, deadly: int | None = None, ignored: Field = Field.GUEST_RFLAGS) -> None:
        self.deadly, self.ignored = deadly, ignored

    def run(self, cases: Any, on_event: Any, journal: Any) -> str:
        on_event({"facts": FACTS})
        for number, case in cases:
            on_event({"start": number})
            if number == self.deadly:
                return "kernel panic"
            changes = {f: v for f, v in case.changes.items() if f is not self.ignored}
            fine = replace(case, changes=changes)
            failures = JUDGE.predict(fine).failures
            seen: list[Any] = ["Exit", 52]
            if failures and isinstance(failures[0], VMfailValid):
                seen = ["VMfailValid", int(failures[0].error)]
            elif failures and isinstance(failures[0], EntryFailure):
                seen = ["EntryFailure", int(failures[0].reason), failures[0].qualification]
            on_event({"end": number, "outcome": seen})
        return ""


RUN = {"seed": 5}


def test_a_missed_check_is_found_shrunk_and_written(tmp_path: Path) -> None:
    """The rest of the case disappears; the test compiles and states the rule."""
    machine = Broken()
    journal = Journal(tmp_path / "j", RUN, go_on=False)
    report = Fuzzer(machine, journal, 5, print).run(400, None)
    assert report.tried == 400
    found = [f for f in report.findings.values() if Field.GUEST_RFLAGS in f.case.changes]
    assert found
    assert all(f.seen[0] != "VMfailValid" for f in found)
    changes = {Field.GUEST_FS_LIMIT: 0xFFFFF, Field.GUEST_RFLAGS: 0x28, Field.EXCEPTION_BITMAP: 0}
    case = FuzzCase(L2Mode.PAE, changes, {"virtual_apic": bytes(4)})
    many = Finding(1, case, ["Exit", 52], JUDGE.verdict(case, ["Exit", 52]))
    assert many.verdict.kind == DISAGREE
    small = Shrinker(machine, JUDGE, many).run()
    assert set(small.case.changes) == {Field.GUEST_RFLAGS}
    assert small.case.bare
    assert small.case.mode is L2Mode.LONG
    source = testfile.write(small, JUDGE, 5, "lab")
    compile(source, "test", "exec")
    assert "RFLAGS" in source
    assert "assert outcome == EntryFailure(ExitReason.INVALID_GUEST_STATE, 0)" in source


def test_a_finding_in_virtual_8086_mode_shrinks_to_its_field() -> None:
    """What makes the mode is no change; the test that is written states it."""
    limit = Field.GUEST_FS_LIMIT
    changes = {limit: 0xFFFFF, Field.EXCEPTION_BITMAP: 0, Field.GUEST_SS_BASE: 0x20000}
    changes[Field.GUEST_SS_SELECTOR] = 0x2000
    case = FuzzCase(L2Mode.PROTECTED, changes, v8086=True)
    assert FuzzCase.from_json(case.to_json()) == case
    machine = Broken(ignored=limit)
    many = Finding(1, case, ["Exit", 52], JUDGE.verdict(case, ["Exit", 52]))
    assert many.verdict.kind == DISAGREE
    small = Shrinker(machine, JUDGE, many).run()
    assert (set(small.case.changes), small.case.v8086) == ({limit}, True)
    source = testfile.write(small, JUDGE, 5, "lab")
    compile(source, "test", "exec")
    assert "vmcs[Field.GUEST_RFLAGS] = 0x20002" in source


def test_a_finding_that_does_not_show_again() -> None:
    case = FuzzCase(L2Mode.LONG, {Field.CR3_TARGET_COUNT: 1})
    seen = ["VMfailValid", 7]
    with pytest.raises(NotAgain):
        Shrinker(Broken(), JUDGE, Finding(1, case, seen, JUDGE.verdict(case, seen))).run()


def test_test_of_a_refusal_without_rule() -> None:
    """Where no rule objects, the test wants the entry to succeed."""
    case = FuzzCase(L2Mode.LONG, {Field.GUEST_RFLAGS: 2}, bare=True)
    seen = ["VMfailValid", 7]
    finding = Finding(3, case, seen, JUDGE.verdict(case, seen))
    source = testfile.write(finding, JUDGE, 5, "kvm")
    compile(source, "test", "exec")
    assert "assert isinstance(outcome, Exit)" in source


def test_crash_is_a_finding_and_the_run_goes_on(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j", RUN, go_on=False)
    report = Fuzzer(Broken(deadly=7), journal, 5, print).run(30, None)
    assert report.tried == 30
    assert journal.outcomes[7] == [CRASHED, "kernel panic"]
    assert any(finding.seen[0] == CRASHED for finding in report.findings.values())


def test_continue_after_the_host_went_down(tmp_path: Path) -> None:
    """Case 2 was running, and a line was cut: the rest is done, nothing twice."""
    path = tmp_path / "j"
    journal = Journal(path, RUN, go_on=False)
    for event in ({"facts": FACTS}, {"start": 0}, {"end": 0, "outcome": ["Exit", 1]}, {"start": 2}):
        journal.add(event)
    with path.open("a") as file:
        file.write('{"end": 9, "outc')
    again = Journal(path, RUN, go_on=True)
    assert again.outcomes == {0: ["Exit", 1], 2: [CRASHED]}
    report = Fuzzer(Broken(), again, 5, print).run(12, None)
    assert report.tried == 12
    assert Journal(path, RUN, go_on=True).outcomes == again.outcomes


def test_stopped_in_order_is_no_crash(tmp_path: Path) -> None:
    path = tmp_path / "j"
    journal = Journal(path, RUN, go_on=False)
    journal.add({"start": 4})
    journal.stop()
    assert Journal(path, RUN, go_on=True).outcomes == {}


def test_journal_of_another_run(tmp_path: Path) -> None:
    Journal(tmp_path / "j", RUN, go_on=False)
    with pytest.raises(UsageError, match="another run"):
        Journal(tmp_path / "j", {"seed": 6}, go_on=True)
    with pytest.raises(UsageError, match="--continue"):
        Journal(tmp_path / "j", RUN, go_on=False)
    with pytest.raises(UsageError, match="no journal"):
        Journal(tmp_path / "none", RUN, go_on=True)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--cases", "0"],
        ["--seconds", "-1"],
        ["--continue"],
        ["--tests", "/nowhere"],
        ["--json", "/nowhere/x.json"],
        ["--target", "kvm", "--kernel", "6.1"],
    ],
)
def test_wrong_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fuzz", *arguments]) == 2
    assert capsys.readouterr().err.count("\n") == 1
