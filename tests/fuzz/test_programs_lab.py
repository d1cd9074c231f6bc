"""kvmnest fuzz programs on the lab's kernel and the reference CPU."""

import json
from pathlib import Path
from typing import Any

import pytest

from kvmnest.cli.main import main
from kvmnest.fuzz.programs import corpus
from kvmnest.fuzz.programs.program import Program, Step


def program(*parts: str, host: bool = False) -> Program:
    """L2 runs these parts; with ``host`` the VM is moved before it does."""
    steps: list[Step] = [{"do": "region", "place": "vmxon_region", "revision": "good"}]
    steps.append({"do": "address", "name": "vmxon", "place": "vmxon_region", "offset": 0})
    steps.append({"do": "region", "place": "vmcs_a", "revision": "good"})
    for name in ("vmclear", "vmptrld"):
        steps.append({"do": "address", "name": name, "place": "vmcs_a", "offset": 0})
    steps += [{"do": "base", "mode": "LONG"}, {"do": "code", "parts": [*parts]}]
    steps += [{"do": "host", "what": "new VM"}] if host else []
    return Program((*steps, {"do": "enter", "name": "vmlaunch", "regs": {}, "most": 8}))


def test_a_corpus_on_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """CPUID, HLT and a fault are the same on both; a reserved bit of CR0 is a known difference."""
    folder, report = tmp_path / "corpus", tmp_path / "report.json"
    # MOV RAX, CR0; BTC RAX, 14; MOV CR0, RAX
    reserved = program("0f20c0480fbaf80e0f22c0")
    for each in (program("0fa2", "f4", "0f0b", host=True), reserved):
        corpus.save(folder, each, "a test")
    arguments = ["--target", "lab", "--corpus", str(folder), "--json", str(report)]
    assert main(["fuzz", "programs", *arguments]) == 0, capsys.readouterr()
    found: dict[str, Any] = json.loads(report.read_text())
    assert (found["agree"], found["known"], found["programs"]) == (1, 1, 2)
    ends = {"Exit(CPUID)": 1, "Exit(HLT)": 1, "Exit(EXCEPTION_NMI)": 1, "Exit(VMCALL)": 2}
    assert found["ends"] == ends
    assert any("reserved bits of CR0" in reason for reason in found["known_reasons"])
