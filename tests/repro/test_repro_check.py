"""kvmnest repro: what the end of a case says about a bug, and the command line."""

import json
from dataclasses import replace

import pytest

from kvmnest.cli.main import main
from kvmnest.reports.model import Case, Run
from kvmnest.repro import check, corpus, new
from kvmnest.repro.check import FIXED, NO_VERDICT, NOT_APPLICABLE, VULNERABLE, Ended, judge, symptom
from kvmnest.repro.evidence import Seen, Shown

ASSERTED = "assert got Succeed(), expected Fault(vector=GP)"


def bug(name):
    (found,) = corpus.select([name])
    return found


def ended(outcome, summary="", raised=""):
    case = Case("vmx_cpl.py::test_it", None, "x", outcome, 0.1, detail="why\nmore", summary=summary)
    return Ended(case, raised)


@pytest.mark.parametrize(
    ("name", "cases", "verdict", "code"),
    [
        ("vmx-cpl", [ended("failed", ASSERTED)], VULNERABLE, 1),
        ("vmx-cpl", [ended("passed")], FIXED, 0),
        ("vmx-cpl", [ended("skipped")], NOT_APPLICABLE, 4),
        ("vmx-cpl", [ended("known")], NOT_APPLICABLE, 4),
        # A script of the user with parameters: one failure is enough, one pass is not.
        ("vmx-cpl", [ended("passed"), ended("failed", ASSERTED)], VULNERABLE, 1),
        ("vmx-cpl", [ended("skipped"), ended("passed")], FIXED, 0),
        # Trouble of the harness, of the script, of the machine.
        ("vmx-cpl", [], NO_VERDICT, 3),
        ("vmx-cpl", [ended("error", "HarnessError: VMXON failed", "HarnessError")], NO_VERDICT, 3),
        ("vmx-cpl", [ended("failed", "NameError: name 'x'", "NameError")], NO_VERDICT, 3),
        # A death counts if it is this bug's.
        ("vmx-cpl", [ended("failed", "VmLost: triple fault", "VmLost")], NO_VERDICT, 3),
        ("vmx-cpl", [ended("error", "crashed: the guest kernel panicked")], NO_VERDICT, 3),
        ("host-addr-size", [ended("failed", "VmLost: triple fault", "VmLost")], VULNERABLE, 1),
        ("host-addr-size", [ended("failed", "VmLost: hang", "VmLost")], NO_VERDICT, 3),
        ("host-addr-size", [ended("failed", ASSERTED)], VULNERABLE, 1),
    ],
)
def test_verdicts(name, cases, verdict, code):
    found = judge(bug(name), cases, Run("lab"))
    assert found.verdict == verdict
    assert check.exit_code([found]) == code
    assert found.evidence
    assert "\n" not in found.evidence


def test_what_is_raised_has_its_line():
    case = ended("failed", "AttributeError: x", "AttributeError")
    detail = (
        "/site/kvmnest/vmx/a.py:3: in f\n/w/vmx_cpl.py:25: in test_it\n    x\nE   AttributeError"
    )
    found = judge(
        bug("vmx-cpl"), [Ended(replace(case.case, detail=detail), case.raised)], Run("lab")
    )
    assert found.evidence == "AttributeError: x (vmx_cpl.py:25)"


def test_exit_codes_of_several():
    def verdict(kind):
        return check.Verdict(bug("vmx-cpl"), kind, "6.1", "x")

    def code(*kinds):
        return check.exit_code([verdict(kind) for kind in kinds])

    assert code(FIXED, NOT_APPLICABLE) == 0
    assert code(FIXED, NO_VERDICT, NOT_APPLICABLE) == 3
    assert code(FIXED, NO_VERDICT, VULNERABLE) == 1
    assert code(NOT_APPLICABLE) == 4


def test_a_failure_that_looks_different_is_said_to_be():
    recorded = [
        Shown(kernel, "", Seen(FIXED, "x"), Seen(VULNERABLE, seen))
        for kernel, seen in (("6.1", "VMCLEAR at 0x12345: Succeed()"), ("7.3", "it died"))
    ]
    same = judge(
        bug("vmx-cpl"), [ended("failed", "VMCLEAR at 0xabcdef: Succeed()")], Run("lab"), recorded
    )
    assert "recorded" not in same.evidence
    newer = judge(bug("vmx-cpl"), [ended("failed", "it died")], Run("lab"), recorded)
    assert "recorded" not in newer.evidence
    other = judge(bug("vmx-cpl"), [ended("failed", "assert 1 == 2")], Run("lab"), recorded)
    assert (other.verdict, "recorded for this bug" in other.evidence) == (VULNERABLE, True)


def test_addresses_make_no_difference():
    assert symptom("got rip=0x12345 at [ 12.5] 12345") == symptom(
        "got rip=0xabcdef at [  2.25] 9999"
    )
    assert symptom("error_code=0x0") != symptom("error_code=0x1")


def test_registers_of_a_lost_vm_are_no_evidence():
    lost = ended("failed", "VmLost: triple fault in vmlaunch: x; rip=0x1 rax=0x2", "VmLost")
    found = judge(bug("host-addr-size"), [lost], Run("lab"))
    assert found.evidence == "VmLost: triple fault in vmlaunch: x"


def test_parameters_of_the_machine():
    """A bug that shows without EPT only cannot be seen on a machine that runs with it."""
    without = bug("ia32e-no-pae")
    assert without.params == {"ept": "0"}
    with_ept = Run("kvm", facts={"kvm_params": {"ept": "Y"}})
    verdict = judge(without, [ended("passed")], with_ept)
    assert (verdict.verdict, "ept=0" in verdict.evidence) == (NOT_APPLICABLE, True)
    run = Run("kvm", facts={"kvm_params": {"ept": "N"}})
    assert judge(without, [ended("passed")], run).verdict == FIXED
    assert judge(replace(without, id="x"), [ended("failed")], run).verdict == VULNERABLE


# --- the command line ---


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["CVE-1999-0001"], "kvmnest repro list"),
        (["nothing.py"], "cannot read nothing.py"),
        (["list", "vmx-cpl"], "takes no id"),
        (["show"], "say which"),
        (["show", "nothing"], "no reproducer nothing"),
        (["verify"], "say which"),
        (["verify", "vmx-cpl", "--target", "kvm"], "runs in the lab"),
        (["verify", "vmx-cpl", "--kvm-modules", "/"], "builds the modules itself"),
        (["verify", "vmx-cpl", "--record", "/none/x.json"], "cannot write /none/x.json"),
        (["vmx-cpl", "--record", "x.json"], "--record is for kvmnest repro verify"),
        (["verify", "int1-lost", "--record", "x.json"], "kvmnest found --verify --record"),
        (["new", "int1-lost"], "kvmnest repro show int1-lost"),
        (["new", "Bad_Id"], "is not an id"),
        (["new", "../x"], "is not an id"),
        (["new", "vmx-cpl"], "kvmnest repro show vmx-cpl"),
    ],
)
def test_usage(words, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["repro", *words]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_list(capsys):
    assert main(["repro", "list", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {entry["id"] for entry in found} == {each.id for each in corpus.load()}
    for entry in found:
        assert entry["subject"]
        # The others differ between kernels as they are: the record of the ladder.
        if entry["shown"]:
            assert entry["shown"][0]["put_back"]["verdict"] == VULNERABLE
    assert sum(bool(entry["shown"]) for entry in found) >= 54
    assert main(["repro", "list"]) == 0
    text = capsys.readouterr().out
    assert text.count("\n    since ") == len(found)
    assert "CVE-2018-12904" in text
    # Those of which no edit tells were seen on kernels of Debian.
    assert "not shown yet" not in text
    assert "VULNERABLE as Debian built it: 6.1.0-47" in text
    assert "since v3.1 (by source)" in text
    assert f"{len(corpus.load(corpus.UNFIXED))} more are not fixed upstream" in text


def test_show(capsys):
    assert main(["repro", "show", "CVE-2018-12904"]) == 0
    path, script = capsys.readouterr().out.split("\n", 1)
    assert path == f"# {bug('vmx-cpl').path}"
    assert script == bug("vmx-cpl").path.read_text()


def test_new_makes_a_reproducer_and_overwrites_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["repro", "new", "my-bug"]) == 0
    path = tmp_path / "my_bug.py"
    assert bug(str(path)).id == "my-bug"
    assert bug(str(path)).edit is not None
    path.write_text("mine")
    assert main(["repro", "new", "my-bug"]) == 2
    assert "exists already" in capsys.readouterr().err
    assert path.read_text() == "mine"


def test_new_where_nothing_can_be_written(tmp_path):
    with pytest.raises(new.HarnessError, match="No such file"):
        new.write("my-bug", tmp_path / "none")


def test_kernels(capsys):
    from kvmnest.lab import kernels

    release = kernels.resolve().release
    assert main(["kernels", "--json"]) == 0
    found = {entry["release"]: entry["cached"] for entry in json.loads(capsys.readouterr().out)}
    assert found[release] is True
    assert main(["kernels", "forget", "9.9.9"]) == 2
    assert main(["kernels", "steal", "6.1"]) == 2
