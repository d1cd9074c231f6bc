"""kvmnest repro in the lab: bugs put back, and a user's own script, shown both ways."""

import json

import pytest

from kvmnest.cli.main import main
from kvmnest.kernel.build import build_modules
from kvmnest.lab import kernels
from kvmnest.repro import corpus


@pytest.fixture(scope="module")
def without_cpl_check():
    """Modules with CVE-2018-12904."""
    (bug,) = corpus.select(["vmx-cpl"])
    return build_modules([bug.edit], kernels.resolve().release)


def verdicts(capsys):
    return {entry["id"]: entry["verdict"] for entry in json.loads(capsys.readouterr().out)}


def test_both_ways(capsys, without_cpl_check):
    """One bug on the stock kernel and put back; the other with a like symptom is told apart."""
    arguments = ["repro", "CVE-2018-12904", "vmx-cpl-vector", "--target", "lab", "--json"]
    assert main(arguments) == 0
    assert verdicts(capsys) == {"vmx-cpl": "FIXED", "vmx-cpl-vector": "FIXED"}
    assert main([*arguments, "--kvm-modules", str(without_cpl_check)]) == 1
    assert verdicts(capsys) == {"vmx-cpl": "VULNERABLE", "vmx-cpl-vector": "NOT APPLICABLE"}


def test_bisect_asks_a_script(capsys, without_cpl_check):
    modules = ["--kvm-modules", str(without_cpl_check)]
    assert main(["bisect", "step", "--repro", "vmx-cpl", *modules]) == 1
    assert capsys.readouterr().out.startswith("bad: vmx_cpl.py::test_vmclear_at_cpl_3: VMCLEAR at")
    # No answer, so that `git bisect run` stops: 1 to 127 would be taken for one.
    assert main(["bisect", "step", "--repro", "./mine.py"]) == 129


def test_a_users_script(capsys, tmp_path, monkeypatch):
    """The template is a working reproducer, which ``verify`` shows both ways with its edit."""
    monkeypatch.chdir(tmp_path)
    assert main(["repro", "new", "my-bug"]) == 0
    capsys.readouterr()
    assert main(["repro", "verify", "./my_bug.py", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["id"], found["both_ways"]) == ("my-bug", True)
    # The assertion is explained, although the file is not part of kvmnest.
    assert found["put_back"]["evidence"].startswith("assert got Exit(")
