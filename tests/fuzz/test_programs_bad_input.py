"""Damaged corpora, a full disk, a lab that dies: `kvmnest fuzz programs` says so in one line."""

import json
from pathlib import Path
from typing import Any

import pytest
from program_machines import FACTS, NOTHING, STEP, Machine

from kvmnest.cli import fuzz_common, fuzz_programs
from kvmnest.cli.main import main
from kvmnest.errors import HarnessError
from kvmnest.fuzz import lines
from kvmnest.fuzz.programs import corpus
from kvmnest.fuzz.programs.campaign import CRASHED, Campaign, Oracle
from kvmnest.fuzz.programs.places import Place
from kvmnest.fuzz.programs.program import Program


def test_a_lab_that_dies_in_every_program() -> None:
    """Each is a finding of its own machine; they are alike, and the run ends."""

    class Dying(Machine):
        def do(self, task: Any, on_event: Any, journal: Path | None = None) -> str:
            on_event({"facts": FACTS})
            for number, _ in json.loads(task.work)["programs"]:
                on_event({"start": number})
                return "kernel panic"
            return ""

    places = Place("lab", Dying("lab", "")), Place("reference", Machine("reference", "Succeed"))
    report = Campaign(places[0], [Oracle("reference", places[1], [])], FACTS).run(
        enumerate([Program((NOTHING,))] * 3)
    )
    assert report.kinds == {CRASHED: 3}
    (finding,) = report.findings.values()
    assert (finding.count, str(finding.verdict)) == (3, "kernel panic")


def run_of(arguments: list[str], monkeypatch: pytest.MonkeyPatch, outcome: str) -> int:
    """`kvmnest fuzz programs` on two machines of this file."""
    machine = Machine("lab", outcome)
    monkeypatch.setattr(fuzz_common, "machine", lambda options: machine)
    other = Place("reference", Machine("reference", "Succeed"))
    monkeypatch.setattr(fuzz_programs, "_other", lambda *_: other)
    return main(["fuzz", "programs", "--target", "lab", "--no-shrink", *arguments])


def test_a_full_disk_loses_nothing_that_was_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line says what is full; the findings so far are told before it."""
    corpus.save(tmp_path, Program((STEP,)), "x")
    corpus.save(tmp_path, Program((NOTHING, STEP)), "x")
    write, room = lines._write, [3]

    def full(path: Path, line: dict[str, Any]) -> None:
        room[0] -= 1
        if room[0] <= 0:
            raise OSError(28, "No space left on device")
        write(path, line)

    monkeypatch.setattr(lines, "_write", full)
    journal = tmp_path / "journal"
    arguments = ["--corpus", str(tmp_path), "--journal", str(journal)]
    assert run_of(arguments, monkeypatch, "VMfailInvalid") == 3
    said = capsys.readouterr()
    assert said.err == f"kvmnest: cannot write {journal}: No space left on device\n"
    assert "2 like it): against reference: step" in said.out
    assert len(journal.read_text().splitlines()) == 2


def test_a_damaged_program_among_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line names the file; the others stay as they are."""
    good = corpus.save(tmp_path, Program((NOTHING,)), "x")
    before = good.read_bytes()
    for content in ('{"schema": 1, "steps"', '{"schema": 9, "steps": []}', ""):
        (tmp_path / "bad.json").write_text(content)
        assert run_of(["--corpus", str(tmp_path)], monkeypatch, "Succeed") == 3
        (line,) = capsys.readouterr().err.splitlines()
        assert "bad.json" in line
    assert good.read_bytes() == before


def test_no_modules_for_guided_programs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without the kernel's source there is one line, and nothing ran."""

    def none(files: Any, release: str) -> None:
        raise HarnessError(f"no source of {release} is in Debian's archive")

    monkeypatch.setattr("kvmnest.coverage.build.build", none)
    monkeypatch.setattr("kvmnest.lab.kernels.resolve", lambda spec: Release())
    arguments = ["fuzz", "programs", "--guided", "--corpus", str(tmp_path), "--kernel", "9.9"]
    assert main(arguments) == 3
    assert capsys.readouterr() == ("", "kvmnest: no source of 9.9 is in Debian's archive\n")


class Release:
    release = "9.9"
