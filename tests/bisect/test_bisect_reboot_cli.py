"""The command line of a bisection by restarts: what it refuses, prints and runs."""

import os
from pathlib import Path

import pytest
from reboot_sim import Sim

from kvmnest.bisect.reboot import session, unit
from kvmnest.cli.main import main

WORDS = ["bisect", "--boot", "reboot", "--good", "a", "--bad", "b", "--kernels", "a,b"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--case", "test_vmxon.py", "--kernel", "6.1"], "--kernel is for the lab"),
        (["--case", "test_vmxon.py", "--repro", "x"], "say one of"),
        (["--case", "test_vmxon.py", "--continue"], "--case is settled already"),
        (["--case", "nothing"], "no such case"),
        (["--case", "test_vmxon.py", "--git", "/nowhere", "--build", "x"], "git cannot be run"),
    ],
)
def test_usage(words, said, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert main([*WORDS, "--state", str(tmp_path / "state"), *words]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_options_of_a_restart_without_it(capsys):
    words = ["bisect", "--good", "a", "--bad", "b", "--kernels", "a,b", "--case", "test_vmxon.py"]
    assert main([*words, "--stay"]) == 2
    assert "--stay needs --boot reboot" in capsys.readouterr().err


def test_who_is_not_root(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    for words in (WORDS, ["bisect", "stop"]):
        assert main([*words, "--case", "test_vmxon.py", "--state", str(tmp_path)]) == 3
    assert capsys.readouterr().err.count("root is needed") == 2


def test_a_dry_run_changes_nothing(capsys, tmp_path):
    state = tmp_path / "state"
    words = [*WORDS[:-1], "6.1.0-40-amd64,b", "--good", "6.1.0-40-amd64"]
    assert main([*words, "--case", "test_vmxon.py", "--state", str(state), "--dry-run"]) == 0
    out = capsys.readouterr().out
    for line in (
        "systemctl enable kvmnest-bisect.service",
        "update-grub",
        "systemctl --no-block reboot",
        f"kvmnest bisect --continue --boot reboot --state {state}",
    ):
        assert line in out.splitlines()
    assert "grub-reboot --boot-directory=/boot " in out
    assert " install -y --no-install-recommends linux-image-6.1.0-40-amd64" in out
    assert not state.exists()
    assert not Path("/etc/systemd/system", unit.NAME).exists()


def test_a_dry_run_over_commits(history, capsys, git_call):
    head = git_call(history, "rev-parse", "HEAD~15")
    words = ["bisect", "--boot", "reboot", "--git", str(history), "--good", "HEAD~15"]
    assert main([*words, "--bad", "HEAD", "--build", "make -j8", "--case", "test_vmxon.py",
                 "--dry-run"]) == 0  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    at = lines.index(f"export LOCALVERSION=-kvmnest-{head[:12]}")
    assert lines[at + 1 : at + 4] == [
        "make -j8", "make -s kernelrelease", "make INSTALL_MOD_STRIP=1 modules_install install",
    ]  # fmt: skip
    assert git_call(history, "symbolic-ref", "--short", "HEAD") == "topic"


def test_a_bisection_from_the_command_line(monkeypatch, capsys, tmp_path):
    """The verb itself over a simulated machine: every start is a new command line."""
    names = [f"6.1.0-{number}-amd64" for number in range(40, 44)]
    sim = Sim(tmp_path, {name: "good" if i < 2 else "bad" for i, name in enumerate(names)})
    monkeypatch.setattr("kvmnest.bisect.reboot.debian_grub.DebianGrub", lambda *arguments: sim)
    monkeypatch.setattr("kvmnest.bisect.over.package_version", lambda name: "")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    words = ["bisect", "--boot", "reboot", "--case", "test_vmxon.py", "--state", str(tmp_path)]
    ends = ["--good", names[0], "--bad", names[-1], "--kernels", ",".join(names)]
    assert main([*words, *ends]) == 0
    assert f"restarting into {names[0]}; it goes on by itself" in capsys.readouterr().out
    for _ in range(10):
        if sim.unit is None:
            break
        assert main(sim.unit) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == f"first bad: {names[2]}"
    assert main(["bisect", "log", "--state", str(tmp_path)]) == 0
    assert f"bad   {names[2]}: bad on {names[2]}" in capsys.readouterr().out
    assert main([*words[:3], "--continue", "--state", str(tmp_path)]) == 0
    assert f"first bad: {names[2]}" in capsys.readouterr().out


def test_what_the_unit_runs_is_a_command_line_of_ours(tmp_path, capsys):
    assert main(session.unit_arguments(tmp_path)) == (2 if os.geteuid() == 0 else 3)
    assert f"nothing to continue in {tmp_path}" in capsys.readouterr().err
