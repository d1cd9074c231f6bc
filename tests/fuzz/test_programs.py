"""Programs: drawing, comparing, what may differ, shrinking. Without a kernel."""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from program_machines import FACTS, NOTHING, STEP, Machine

from kvmnest.cli import fuzz_programs
from kvmnest.cli.main import main
from kvmnest.errors import HarnessError, KvmnestError, UsageError
from kvmnest.fuzz.judge import Judge
from kvmnest.fuzz.model import FuzzCase, capabilities
from kvmnest.fuzz.programs import corpus, defined, known, testfile
from kvmnest.fuzz.programs.campaign import (
    AGREE,
    CRASHED,
    DISAGREE,
    KNOWN,
    Campaign,
    Finding,
    Oracle,
    Report,
    Verdict,
    judge,
    worst,
)
from kvmnest.fuzz.programs.compare import Difference, differences
from kvmnest.fuzz.programs.generate import ProgramGenerator
from kvmnest.fuzz.programs.journal import Journal
from kvmnest.fuzz.programs.places import Place, Ran, common
from kvmnest.fuzz.programs.program import HOST_ACTIONS, Program, problem
from kvmnest.fuzz.programs.shrink import shrink
from kvmnest.vmx import ExitReason, Field

GENERATOR = ProgramGenerator(Judge(FACTS, "lab"))


def test_programs_belong_to_their_seed_and_are_programs() -> None:
    """The same again from the same seed, others from another; every one meets the schema."""
    drawn = [GENERATOR.numbered(1, number) for number in range(80)]
    assert drawn == [GENERATOR.numbered(1, number) for number in range(80)]
    assert drawn != [GENERATOR.numbered(2, number) for number in range(80)]
    for program in drawn:
        document = json.loads(json.dumps(program.to_json()))
        assert problem(document) == ""
        assert Program.from_json(document) == program
    kinds = {step["do"] for program in drawn for step in program.steps}
    assert kinds >= {"address", "alone", "invalidate", "base", "fields", "code", "enter", "host"}


@pytest.mark.parametrize(
    "document",
    [
        {},
        {"schema": 2, "steps": []},
        {"schema": 1, "steps": [{"do": "sing"}]},
        {"schema": 1, "steps": [{"do": "enter", "name": "vmlaunch"}]},
        {"schema": 1, "steps": [{"do": "code", "parts": ["9"]}]},
        {"schema": 1, "steps": [{"do": "fields", "fields": {"GUEST_NOTHING": 1}}]},
        {"schema": 1, "steps": [{"do": "vmread", "field": 1 << 64}]},
        {"schema": 1, "steps": [{"do": "host", "what": "reboot"}]},
        {"schema": 1, "steps": [{"do": "event", "what": "NMI", "vector": 3}]},
        {"schema": 1, "steps": [{"do": "cpu", "index": 2}]},
        {"schema": 1, "steps": [{"do": "nested", "offset": 0}]},
        {
            "schema": 1,
            "steps": [
                {"do": "enter", "name": "vmlaunch", "regs": {}, "most": 1, "pauses": [NOTHING]}
            ],
        },
    ],
)
def test_what_is_no_program(document: dict[str, Any], tmp_path: Path) -> None:
    assert problem(document)
    (tmp_path / "x.json").write_text(json.dumps(document))
    with pytest.raises(HarnessError, match=r"x\.json.* is not a program"):
        list(corpus.load(tmp_path))


def test_corpus(tmp_path: Path) -> None:
    """A program is kept once; what comes back is the same."""
    folder = tmp_path / "corpus"
    program = GENERATOR.numbered(3, 0)
    assert corpus.save(folder, program, "x") == corpus.save(folder, program, "y")
    assert list(corpus.load(folder)) == [program]
    with pytest.raises(UsageError, match="not a folder"):
        list(corpus.load(tmp_path / "none"))


def exit_seen(reason: ExitReason, guest: dict[str, int], **parts: int) -> dict[str, Any]:
    seen: dict[str, Any] = {"end": ["Exit", int(reason)], "parts": parts, "regs": {}, "cr2": 0}
    return {**seen, "host": [], "guest": guest, "memory": {"l2_data": 1}}


def test_the_first_difference_is_told_and_a_lasting_one_once() -> None:
    """A field that only one machine changed differs until it is equal again."""
    one = Ran([[exit_seen(ExitReason.CPUID, {"GUEST_CR0": 1})], [exit_seen(ExitReason.HLT, {})]])
    other = Ran([[exit_seen(ExitReason.CPUID, {"GUEST_CR0": 3})], [exit_seen(ExitReason.HLT, {})]])
    (found,) = differences(one, other)
    assert found == Difference(0, 0, "guest.GUEST_CR0", "Exit(CPUID)", 1, 3)
    other.seen[1][0]["guest"] = {"GUEST_CR0": 7}
    assert [(d.step, d.other) for d in differences(one, other)] == [(0, 3), (1, 7)]
    assert not list(differences(one, one))


def test_an_other_end_is_the_last_difference() -> None:
    one = Ran([[exit_seen(ExitReason.CPUID, {})], [{"end": ["Succeed"]}]])
    other = Ran([[{"end": ["VMfailValid", 7]}], [{"end": ["VMfailInvalid"]}]])
    (found,) = differences(one, other)
    assert str(found) == ("step 0: Exit(CPUID) or VMfailValid(7: ENTRY_INVALID_CONTROL_FIELD)")
    (found,) = differences(one, Ran(one.seen[:1]))
    assert (found.step, found.what, found.other) == (1, "end", ["ended"])


@pytest.mark.parametrize(
    ("reason", "seen", "wanted"),
    [
        (ExitReason.CPUID, {"length": 2, "linear": 9}, {"length": 2}),
        (ExitReason.EXTERNAL_INTERRUPT, {"length": 2, "info": 9}, {}),
        # Software interrupts and exceptions have a length, others not.
        (ExitReason.EXCEPTION_NMI, {"length": 1, "intr_info": 0x80000603}, {"length": 1}),
        (ExitReason.EXCEPTION_NMI, {"length": 1, "intr_info": 0x80000306}, {}),
        # A string instruction has a linear address and an address size.
        (ExitReason.IO_INSTRUCTION, {"qualification": 0x10, "linear": 9}, {"linear": 9}),
        (ExitReason.IO_INSTRUCTION, {"qualification": 8, "linear": 9, "info": 0x380}, {}),
        (ExitReason.EPT_VIOLATION, {"qualification": 0x81, "linear": 5, "physical": 5},
         {"linear": 5, "physical": 5}),
        (ExitReason.EPT_VIOLATION, {"qualification": 1, "linear": 5}, {}),
        # The error code counts only where bit 11 says so.
        (ExitReason.EXCEPTION_NMI, {"intr_info": 0x80000306, "intr_error": 5}, {}),
        (ExitReason.EXCEPTION_NMI, {"intr_info": 0x80000B0D, "intr_error": 5}, {"intr_error": 5}),
        # VMREAD to a register: no address, but two registers.
        (ExitReason.VMREAD, {"info": 0x20000400 | 0x3F << 18}, {"info": 0x20000400}),
    ],
)  # fmt: skip
def test_only_what_is_defined_counts(
    reason: ExitReason, seen: dict[str, int], wanted: dict[str, int]
) -> None:
    found = defined.parts(reason, seen)
    for name in ("length", "linear", "info", "physical", "intr_error"):
        assert found.get(name, 0) == wanted.get(name, 0), name


def test_an_unusable_segment_has_no_limit() -> None:
    state = {"GUEST_ES_ACCESS_RIGHTS": 0x1C093, "GUEST_ES_LIMIT": 5, "GUEST_FS_BASE": 7}
    assert defined.guest(state) == {"GUEST_ES_ACCESS_RIGHTS": 0x10000, "GUEST_FS_BASE": 7}


ENTRY = known.Known(
    "guest.GUEST_RFLAGS", "Bochs", "RF", after="Exit(EXCEPTION_NMI) | Exit(HLT)", bits=1 << 16
)


@pytest.mark.parametrize(
    ("end", "one", "other", "explained"),
    [
        ("Exit(HLT)", 2, 0x10002, True),
        ("Exit(HLT)", 2, 0x10003, False),
        ("Exit(CPUID)", 2, 0x10002, False),
        ("Exit(HLT)", None, 0x10002, False),
    ],
)
def test_known_difference(end: str, one: Any, other: Any, explained: bool) -> None:
    difference = Difference(1, 0, "guest.GUEST_RFLAGS", end, one, other)
    assert ENTRY.explains(difference) is explained


@pytest.mark.parametrize(
    ("one", "other", "explained"),
    [
        (["EntryFailure", 33, 0], ["EntryFailure", 33, 4], True),
        (["VMfailValid", 7], ["VMfailValid", 8], True),
        (["EntryFailure", 33, 0], ["EntryFailure", 34, 1], False),
        (["VMfailValid", 7], ["EntryFailure", 33, 0], False),
        (["Exit", 10], ["EntryFailure", 33, 0], False),
    ],
)
def test_checks_of_one_stage_have_no_order(
    one: list[Any], other: list[Any], explained: bool
) -> None:
    difference = Difference(1, 0, "end", "", one, other)
    entries = known.load("7.3.4", "reference")
    assert any(entry.explains(difference) for entry in entries) is explained


def test_a_difference_that_follows_from_another() -> None:
    """It is explained behind the other one only."""
    entry = known.Known("memory.*", "KVM", "x", follows="guest.GUEST_RFLAGS")
    difference = Difference(1, 0, "memory.l2_stack", "Exit(HLT)", 1, 2)
    assert not entry.explains(difference)
    assert entry.explains(difference, {"guest.GUEST_RFLAGS"})


def test_damaged_list_of_differences(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_text('[[difference]]\nwhat = "end"\nwhose = "nobody"\nreason = "x"\n')
    with pytest.raises(HarnessError, match="nobody"):
        known.load("6.1", "reference", path)
    for entry in known.load("7.3.4", "*"):
        assert entry.reason


def test_verdicts() -> None:
    same = Ran([[exit_seen(ExitReason.HLT, {"GUEST_RFLAGS": 2})]])
    flag = Ran([[exit_seen(ExitReason.HLT, {"GUEST_RFLAGS": 0x10002})]])
    assert judge(same, same, [ENTRY]).kind == AGREE
    assert judge(same, flag, [ENTRY]).kind == KNOWN
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


def test_bits_of_several_known_differences() -> None:
    """Each bit has an entry that knows it; one without makes it new."""
    entries = [known.Known("guest.GUEST_CR0", "KVM", str(bit), bits=1 << bit) for bit in (4, 30)]
    both = Difference(1, 0, "guest.GUEST_CR0", "Exit(HLT)", 0x31, 0x40000021)
    assert known.explained(both, entries, ()) == entries
    assert known.explained(replace(both, other=0x21), entries, ()) == (entries[0],)
    assert not known.explained(replace(both, other=0x40000020), entries, ())


def test_a_vmcs_that_is_legal_on_one_machine_only_is_left_out() -> None:
    """A control that one machine lacks makes the rules say something else there."""
    judge_of = Judge(FACTS, "lab")
    msrs = {name: FACTS["msrs"][name] & ~(1 << 39) for name in ("1154", "1166")}  # HLT exiting
    other = capabilities({**FACTS, "msrs": {**FACTS["msrs"], **msrs}})
    hlt = FuzzCase(changes={Field.CPU_BASED_VM_EXEC_CONTROL: 0x401E172 | 1 << 7})
    plain = FuzzCase(changes={Field.GUEST_CR3: 1 << 63})
    for others, wanted in (([], True), ([judge_of.caps], True), ([other], False)):
        assert ProgramGenerator(judge_of, others=others).alike(hlt) is wanted
        assert ProgramGenerator(judge_of, others=others).alike(plain)


SAID = {"lab": "Succeed", "ept=0": "VMfailInvalid", "moved": "Succeed", "6.1": "VMfailInvalid"}


@pytest.mark.parametrize("host", [False, True])
def test_what_a_host_does(host: bool) -> None:
    """L2 waits for a host, and L1 has a second CPU, only where all machines are KVM."""
    generator = ProgramGenerator(Judge(FACTS, "lab"), host=host)
    drawn = [step for n in range(150) for step in generator.numbered(1, n).steps]
    kinds = {step["do"] for step in drawn}
    assert kinds >= {"event", "nested", "host"}
    assert ("cpu" in kinds) is host
    assert any(step.get("pauses") for step in drawn) is host
    assert {step["what"] for step in drawn if step["do"] == "host"} == {*HOST_ACTIONS}


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


def test_a_finding_as_a_test() -> None:
    """It compiles, and wants what the other machine gave."""
    difference = Difference(2, 0, "regs.rax", "Exit(HLT)", 1, 0x77)
    finding = Finding(5, Program((NOTHING, STEP)), Verdict((), difference))
    source = testfile.write(finding, "--seed 1")
    compile(source, "test", "exec")
    assert "assert seen[2][0]['regs.rax'] == 119" in source


def test_assumed_is_what_both_can() -> None:
    """A control must be 1 where one machine wants it, and may be where both allow it."""
    one = {"kernel": "x", "msrs": {"1155": 0xFF << 32 | 1, "1162": 8}, "cpuid": []}
    two = {"kernel": "y", "msrs": {"1155": 0x0F << 32 | 2, "1163": 1}, "cpuid": []}
    assert common(one, two)["msrs"] == {"1155": 0x0F << 32 | 3}


@pytest.mark.parametrize(
    "arguments",
    [
        ["--cases", "0"],
        ["--target", "lab", "--against", "nothing"],
        ["--target", "lab", "--against", "ept="],
        ["--target", "kvm", "--against", "ept=0"],
        ["--target", "kvm", "--against", "6.1"],
        ["--corpus", "/nowhere"],
        ["--jobs", "2"],
        ["--continue", "--seed", "1", "--journal", "/nowhere/j"],
    ],
)
def test_wrong_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fuzz", "programs", *arguments]) == 2
    assert len(capsys.readouterr().err.splitlines()) >= 1


def test_corpus_and_drawn_programs_have_numbers_of_their_own(tmp_path: Path) -> None:
    corpus.save(tmp_path, Program((NOTHING,)), "x")
    options = argparse.Namespace(corpus=tmp_path, cases=2, seconds=None, guided=False)
    numbers = [number for number, _ in fuzz_programs._programs(options, GENERATOR, 1)]
    assert len(set(numbers)) == 3
    assert numbers[1:] == [0, 1]


def test_a_finding_goes_to_the_corpus(tmp_path: Path) -> None:
    """With what it shows, and as a test where tests are wanted."""
    difference = Difference(0, 0, "regs.rax", "Exit(HLT)", 1, 2)
    finding = Finding(5, Program((STEP,)), Verdict((), difference, against="reference"))
    options = argparse.Namespace(corpus=tmp_path, json=None, tests=tmp_path)
    fuzz_programs._write(options, Report(), [finding], "--seed 1")
    (path,) = tmp_path.glob("*.json")
    assert json.loads(path.read_text())["shows"] == f"against reference: {difference}"
    assert list(corpus.load(tmp_path)) == [finding.program]
    assert (tmp_path / "test_program_5.py").exists()
