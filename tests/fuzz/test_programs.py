"""Programs: drawing, comparing, what may differ, shrinking. Without a kernel."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
from program_machines import FACTS, NOTHING, STEP

from kvmnest.cli import fuzz_programs
from kvmnest.cli.main import main
from kvmnest.errors import HarnessError, UsageError
from kvmnest.fuzz.judge import Judge
from kvmnest.fuzz.model import FuzzCase, capabilities
from kvmnest.fuzz.programs import corpus, testfile
from kvmnest.fuzz.programs.campaign import (
    Finding,
    Report,
    Verdict,
)
from kvmnest.fuzz.programs.compare import Difference
from kvmnest.fuzz.programs.generate import ProgramGenerator
from kvmnest.fuzz.programs.places import common
from kvmnest.fuzz.programs.program import HOST_ACTIONS, Program, problem
from kvmnest.vmx import Field

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
