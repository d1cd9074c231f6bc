"""``kvmnest lab emulators`` and ``--cpu-model``."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kvmnest.lab import bochs, cpu_models, fleet, measure
from kvmnest.lab.errors import LabSetupError


def kvmnest(*argv: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kvmnest", *argv]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_one_emulator_is_used_and_the_lab_uses_it() -> None:
    found = fleet.emulators()
    used = [entry for entry in found if entry.used]
    assert len(used) == 1
    assert used[0].path == bochs.locate().path
    assert all(entry.why for entry in found)


def test_the_users_own_comes_first() -> None:
    path = bochs.locate().path
    first = fleet.emulators(path)[0]
    assert (first.origin, first.path, first.used) == ("given", path, True)
    with pytest.raises(LabSetupError, match="is not Bochs"):
        fleet.emulators("/bin/true")


@pytest.mark.parametrize(
    ("version", "model"),
    [("2.7", "corei7_skylake_x"), ("3.0", "tigerlake"), ("3.1", "tigerlake")],
)
def test_the_default_model(version: str, model: str) -> None:
    assert cpu_models.choose(None, version, cpu_models.names()).name == model


@pytest.mark.parametrize("version", ["2.7", "3.0", "3.1"])
def test_a_model_is_described_once_for_each_version(version: str) -> None:
    found = [model.name for model in cpu_models.usable(version, cpu_models.names())]
    assert found == cpu_models.names()


def test_what_a_bochs_has_of_the_models_decides() -> None:
    assert cpu_models.choose(None, "3.0", ["pentium", "corei7_haswell_4770"]).name == (
        "corei7_haswell_4770"
    )
    with pytest.raises(LabSetupError, match=r"Bochs 3\.0 has no CPU model with VMX"):
        cpu_models.choose(None, "3.0", ["pentium"])


@pytest.mark.parametrize(
    ("model", "why"), [("pentium", "has no VMX"), ("nonesuch", "has no such model")]
)
def test_a_model_that_does_not_do(model: str, why: str) -> None:
    done = kvmnest("lab", "run", "--cpu-model", model, "--", "true")
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(rf"kvmnest: --cpu-model {model}: .*{why}; there are .*\n", done.stderr)


# What a Bochs without VMX answers; its models have the same names.
NO_VMX = """
#include <stdio.h>
int main(int argc, char **argv) {
    puts("Bochs x86 Emulator 3.0\\nSupported CPU models:\\n\\ncorei7_skylake_x");
}
"""
NO_MODEL = """#!/bin/sh
[ "$2" = cpu ] && { echo Supported CPU models:; echo; echo pentium; exit; }
echo Bochs x86 Emulator 3.0
"""


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (NO_VMX, "was built without VMX: configure it with --enable-vmx=2"),
        (NO_MODEL, "no CPU model with VMX"),
        ("#!/bin/sh\nkill -SEGV $$\n", "is not Bochs"),
        ("no program", "does not run"),
    ],
    ids=["no VMX", "no model", "dies", "no program"],
)
def test_a_bochs_that_does_not_do(tmp_path: Path, text: str, why: str) -> None:
    program = tmp_path / "bochs"
    if text == NO_VMX:
        (tmp_path / "bochs.c").write_text(text)
        subprocess.run(["gcc", "-o", program, tmp_path / "bochs.c"], check=True)
    else:
        program.write_text(text)
    program.chmod(0o755)
    for verb in (
        ["lab", "run", "--bochs", str(program), "--", "true"],
        ["lab", "emulators", "--bochs", str(program)],
    ):
        done = kvmnest(*verb)
        assert (done.returncode, done.stdout) == (3, "")
        assert re.fullmatch(rf"kvmnest: [^\n]*{why}[^\n]*\n", done.stderr)


def test_a_model_is_for_bochs() -> None:
    done = kvmnest("lab", "run", "--boot", "qemu", "--cpu-model", "broadwell_ult", "--", "true")
    assert (done.returncode, done.stderr) == (2, "kvmnest: --cpu-model needs --boot lab\n")


@pytest.mark.parametrize(
    ("model", "called"),
    [
        ("core2_penryn_t9600", "T9600"),  # neither EPT nor RDRAND
        ("corei7_ivy_bridge_3770k", "3770K"),
    ],
)
def test_the_guest_sees_the_model(model: str, called: str) -> None:
    code = "print(open('/proc/cpuinfo').read().partition('\\n\\n')[0])"
    done = kvmnest("lab", "run", "--cpu-model", model, "--", "python3", "-c", code)
    assert done.returncode == 0, done.stderr
    assert called in done.stdout
    flags = re.search(r"^vmx flags\s*: (.*)$", done.stdout, re.MULTILINE)
    assert flags is not None
    assert ("ept" in flags[1].split()) == (model != "core2_penryn_t9600")


def test_the_list() -> None:
    """Without booting: a mark, one line each, and the models; with --json the same."""
    text = kvmnest("lab", "emulators", "--no-boot")
    told = json.loads(kvmnest("lab", "emulators", "--no-boot", "--json").stdout)
    assert text.returncode == 0
    lines = text.stdout.splitlines()
    assert sum(line.startswith("* Bochs") for line in lines) == 1
    assert f"  {told['default']} (default)" in lines
    assert set(told["models"]) <= {line.split()[0] for line in lines}
    assert [entry["used"] for entry in told["emulators"]].count(True) == 1


def test_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU seconds of the emulator's process: a command that computes costs more than the boot."""
    monkeypatch.setattr(measure, "_WORK", ("python3", "-c", "sum(range(3_000_000))"))
    path = bochs.locate().path
    (row,) = measure.speeds([path], rounds=1)
    assert row.path == path
    assert row.boot > 1
    assert row.work > 0.2
