"""kvmnest fuzz against the lab's kernel."""

import json
from pathlib import Path

import pytest

from kvmnest.cli.main import main


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
