"""``kvmnest matrix --cpu-models``: cells on several CPUs of Bochs."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kvmnest.lab.emulators import BOCHS, Choice
from kvmnest.matrix.cell import Cell, Job

NEEDS_EPT = "test_ept_violation.py::test_permissions_are_anded[PDE-PTE]"


def matrix(*argv: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kvmnest", "matrix", *argv]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--kernels or --cpu-models says what to run on"),
        (["--cpu-models", "all", "--cpu-model", "tigerlake"], "contradict each other"),
        (["--cpu-models", "all", "--boot", "qemu"], "contradict each other"),
        (["--cpu-models", "tigerlake", "tigerlake"], "--cpu-models tigerlake is given more than"),
        (["--cpu-models", "tigerlake", "nonesuch"], "has no such model"),
        (["--cpu-models", "pentium"], "has no VMX"),
    ],
)
def test_what_cannot_be_meant(argv: list[str], message: str) -> None:
    done = matrix(*argv)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_results_of_another_cpu_are_other_results() -> None:
    def file(cell: Cell, emulator: Choice = BOCHS) -> str:
        return Job(cell, (), "", emulator, "suite").file

    files = [
        file(Cell("6.1")),
        file(Cell("6.1", (), "tigerlake")),
        file(Cell("6.1", (), "arrow_lake")),
        file(Cell("6.1"), Choice(program="/opt/bochs")),
        file(Cell("6.1"), Choice(cpu_model="tigerlake")),
    ]
    assert len(set(files)) == len(files)
    assert Cell("6.1", (("ept", "0"),), "tigerlake").name == "6.1 tigerlake ept=0"


def test_a_case_on_two_cpus(tmp_path: Path) -> None:
    """It is skipped on the one without EPT, with the bit that is missing."""
    out = tmp_path / "matrix.json"
    models = ["core2_penryn_t9600", "corei7_haswell_4770"]
    argv = ["--cpu-models", *models, "--jobs", "1", "--state", str(tmp_path), "--json", str(out)]
    done = matrix(NEEDS_EPT, *argv)
    assert done.returncode == 0, done.stdout + done.stderr
    columns = json.loads(out.read_text())["columns"]
    assert list(columns) == [f"6.1 {model}" for model in models]
    (without,), (with_ept,) = (columns[name]["cases"] for name in columns)
    assert (without["outcome"], with_ept["outcome"]) == ("skipped", "passed")
    assert "Proc2Ctl.ENABLE_EPT" in without["detail"]


def test_a_setting_that_is_of_no_use_on_a_cpu(tmp_path: Path) -> None:
    """It is left out with the flag that makes it so; the default is run."""
    done = matrix(
        "test_vmxon.py", "--kernels", "6.12", "--settings", "early-check", "--state", str(tmp_path)
    )
    assert done.returncode == 0, done.stdout + done.stderr
    left_out, ran = done.stdout.splitlines()[:2]
    assert left_out.startswith("6.12 nested_early_check=1: left out, of no use on a CPU with tsc_")
    assert re.fullmatch(r"6\.12: \d+ passed", ran)
