"""kvmnest repro: its corpus, its verdicts, and both ways in the lab."""

import json
from dataclasses import replace

import pytest

from kvmnest.cli.main import main
from kvmnest.errors import HarnessError
from kvmnest.kernel.build import build_modules
from kvmnest.lab import kernels
from kvmnest.mutants import catalogue
from kvmnest.repro import corpus
from kvmnest.repro.check import FIXED, NOT_APPLICABLE, VULNERABLE, judge, symptom
from kvmnest.repro.corpus import Bug
from kvmnest.results.model import Case, Run


def test_the_corpus_is_large_and_points_at_real_cases():
    found = corpus.load()
    assert len(found.bugs) >= 25
    from kvmnest.mutants.score import collect_ids

    assert {bug.case for bug in found.bugs} <= set(collect_ids())
    cves = {bug.cve for bug in found.bugs}
    assert {"CVE-2018-12904", "CVE-2016-9588", "CVE-2014-3645", "CVE-2014-3646"} <= cves


@pytest.mark.parametrize(
    ("outcome", "verdict", "code"),
    [
        ("failed", VULNERABLE, 1),
        ("crashed", VULNERABLE, 1),
        ("passed", FIXED, 0),
        ("skipped", NOT_APPLICABLE, 4),
    ],
)
def test_verdicts(outcome, verdict, code):
    bug = corpus.load().bugs[0]
    case = Case(bug.case, 3, "x", outcome, 0.1, detail="why\nmore")
    if outcome == "crashed":
        case.outcome, case.summary = "error", "crashed: the guest kernel panicked"
    found = judge(bug, case, Run("lab"))
    assert (found.verdict, found.exit_code) == (verdict, code)


@pytest.mark.parametrize("outcome", ["error", None])
def test_trouble_of_the_harness_is_no_verdict(outcome):
    bug = corpus.load().bugs[0]
    case = Case(bug.case, 3, "x", outcome, 0.1, detail="cannot open x") if outcome else None
    with pytest.raises(HarnessError, match=r"cannot open x|did not run"):
        judge(bug, case, Run("lab"))


def failing(bug: Bug, text: str) -> Case:
    return Case(bug.case, 3, "x", "failed", 0.1, summary=text)


def test_failures_are_told_apart_by_what_they_show():
    """Two bugs share a case: what the one shows is no evidence of the other."""
    found = corpus.load()
    missing, vector = found.select(["vmx-cpl", "vmx-cpl-vector"])
    assert missing.case == vector.case
    for bug, other in ((missing, vector), (vector, missing)):
        case = failing(bug, bug.vulnerable)
        assert judge(bug, case, Run("lab"), found.bugs).verdict == VULNERABLE
        wrong = judge(other, case, Run("lab"), found.bugs)
        assert (wrong.verdict, bug.id in wrong.evidence) == (NOT_APPLICABLE, True)
    new = judge(missing, failing(missing, "assert 1 == 2"), Run("lab"), found.bugs)
    assert new.verdict == VULNERABLE
    assert "recorded for this bug" in new.evidence


def test_addresses_make_no_difference():
    assert symptom("got rip=0x12345 at [ 12.5] 12345") == symptom(
        "got rip=0xabcdef at [  2.25] 9999"
    )
    assert symptom("error_code=0x0") != symptom("error_code=0x1")


def test_parameters_of_the_machine():
    """A bug that shows without EPT only cannot be seen on a machine that runs with it."""
    bug = replace(corpus.load().bugs[0], params={"ept": "0"})
    case = Case(bug.case, 3, "x", "passed", 0.1)
    with_ept = Run("kvm", facts={"kvm_params": {"ept": "Y"}})
    verdict = judge(bug, case, with_ept)
    assert (verdict.verdict, "ept=0" in verdict.evidence) == (NOT_APPLICABLE, True)
    assert judge(bug, case, Run("kvm", facts={"kvm_params": {"ept": "N"}})).verdict == FIXED


def test_a_damaged_record(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("{}")
    with pytest.raises(HarnessError, match="no detection table"):
        corpus.load(path)


def test_an_unknown_bug(capsys):
    assert main(["repro", "CVE-1999-0001"]) == 2
    assert "kvmnest repro list" in capsys.readouterr().err


def test_list(capsys):
    assert main(["repro", "list", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert all(bug["subject"] and bug["case"] for bug in found)


def test_both_ways_in_the_lab(capsys):
    """CVE-2018-12904 on the stock kernel, and on one with the bug put back."""
    mutant = next(m for m in catalogue.load() if m.id == "vmx-cpl")
    arguments = ["repro", "CVE-2018-12904", "--target", "lab"]
    assert main(arguments) == 0
    assert capsys.readouterr().out.startswith("FIXED")
    folder = build_modules([mutant.edit], kernels.resolve().release)
    assert main([*arguments, "--kvm-modules", str(folder)]) == 1
    assert capsys.readouterr().out.startswith("VULNERABLE")


def test_kernels(capsys):
    release = kernels.resolve().release
    assert main(["kernels", "--json"]) == 0
    found = {entry["release"]: entry["cached"] for entry in json.loads(capsys.readouterr().out)}
    assert found[release] is True
    assert main(["kernels", "forget", "9.9.9"]) == 2
    assert main(["kernels", "steal", "6.1"]) == 2
