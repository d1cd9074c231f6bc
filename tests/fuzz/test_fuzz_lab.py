"""kvmnest fuzz against the lab's kernel."""

import json
from pathlib import Path

import pytest

from kvmnest.cli.main import main
from kvmnest.fuzz import testfile
from kvmnest.fuzz.journal import Journal
from kvmnest.fuzz.judge import DISAGREE
from kvmnest.fuzz.machines import LabMachine, try_sequences
from kvmnest.fuzz.model import FuzzCase
from kvmnest.fuzz.run import Finding, Fuzzer
from kvmnest.fuzz.shrink import Shrinker
from kvmnest.l1.payload import default
from kvmnest.vmx import Field


def test_the_kernel_agrees(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """250 cases: all agree, or disagree in a known way, and every kind of outcome is seen."""
    report = tmp_path / "report.json"
    journal = tmp_path / "journal"
    arguments = ["--target", "lab", "--seed", "1", "--cases", "250", "--jobs", "1"]
    status = main(["fuzz", *arguments, "--journal", str(journal), "--json", str(report)])
    assert status == 0, capsys.readouterr().out
    found = json.loads(report.read_text())
    assert found["tried"] == 250
    assert found["agree"] > 225
    assert set(found["outcomes"]) >= {
        "Exit",
        "VMfailValid(7)",
        "VMfailValid(8)",
        "EntryFailure(33)",
    }


def test_a_finding_that_needs_earlier_entries(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """KVM refuses a good VMCS link pointer after one that leads nowhere: three entries remain.

    The disagreement is a recorded one; here it is made to look new.
    """
    machine = LabMachine()
    judge = Fuzzer(machine, Journal(tmp_path / "j", {}, go_on=False), 1, print).judge
    judge.known = [entry for entry in judge.known if entry.fields != ("VMCS_LINK_POINTER",)]
    link, value = Field.VMCS_LINK_POINTER, default()["vmcs_b"]
    region = {"vmcs_b": judge.caps.basic.revision_id.to_bytes(4, "little")}
    good = FuzzCase(changes={link: value}, memory=region, bare=True)
    # One bit, so that there is little to try; the good pointer cannot become simpler.
    bad = FuzzCase(changes={link: 1 << 31}, bare=True)
    noise = FuzzCase(changes={Field.GUEST_FS_LIMIT: 0x123}, bare=True)
    steps = (noise, noise, good, noise, bad, noise, good)
    (seen,) = try_sequences(machine, [steps])
    assert seen is not None
    verdict = judge.verdict(good, seen)
    assert verdict.kind == DISAGREE
    finding = Finding(7, good, seen, verdict, before=steps[:-1])
    small = Shrinker(machine, judge, finding).run()
    assert [case.changes for case in (*small.before, small.case)] == [
        {link: value},
        {link: 1 << 31},
        {link: value},
    ]
    test = tmp_path / "test_link.py"
    test.write_text(testfile.write(small, judge, 1, "lab"))
    assert main(["run", "--target", "lab", str(test)]) == 1
    said = capsys.readouterr().out
    assert "isinstance(outcome, Exit)" in said
    assert "no rule of VM entry objects" in said
