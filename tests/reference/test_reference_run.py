"""``kvmnest run --target reference`` and the verdicts made from it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvmnest import known
from kvmnest.reports import verdicts
from kvmnest.reports.verdicts import Verdict

ROOT = str(Path(__file__).resolve().parents[2])


def kvmnest(folder, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "kvmnest", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": ROOT},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.mark.parametrize("jobs", [1, 2])
def test_cases_of_the_suite(built, tmp_path, jobs):
    done = kvmnest(
        tmp_path, "run", "--target", "reference", f"-j{jobs}", "--json", "out.json",
        *("test_vmxon.py", "test_nested_state.py"),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads((tmp_path / "out.json").read_text())
    assert (document["target"], document["kernel"]) == ("reference", "none")
    assert document["complete"]
    assert document["emulator"].startswith("bochs ")
    outcomes = {case["id"]: case["outcome"] for case in document["cases"]}
    vmxon = {name for name in outcomes if name.startswith("test_vmxon.py")}
    assert {outcomes[name] for name in vmxon} == {"passed"}
    assert len(vmxon) > 20
    others = [case for case in document["cases"] if case["id"] not in vmxon]
    assert {case["outcome"] for case in others} == {"skipped"}
    assert all(case["detail"].startswith("needs a host: ") for case in others)


@pytest.mark.parametrize(
    ("option", "word"),
    [
        (["--kernel", "6.1"], "--kernel"),
        (["--kvm-param", "ept=0"], "--kvm-param"),
        (["--nested-roundtrip"], "--nested-roundtrip"),
        (["--cpus", "2"], "--cpus"),
    ],
)
def test_options_of_a_kvm(tmp_path, option, word):
    done = kvmnest(tmp_path, "run", "--target", "reference", *option)
    assert done.returncode == 2
    assert done.stderr == (f"kvmnest: {word} is nothing for --target reference, which has no KVM\n")


def test_no_such_cpu_model(built, tmp_path):
    done = kvmnest(tmp_path, "run", "--target", "reference", "--cpu-model", "pentium")
    assert done.returncode == 2
    assert done.stderr.startswith("kvmnest: --cpu-model pentium: ")


def test_no_bochs(own_cache, tmp_path):
    done = kvmnest(tmp_path, "run", "--target", "reference")
    assert done.returncode == 3
    assert done.stderr == ("kvmnest: the reference target needs its own Bochs: kvmnest lab build\n")


# --- verdicts ---


def test_record_is_what_the_reference_cpu_says(built, tmp_path):
    """The cases of known.toml run again, without KVM."""
    record = verdicts.recorded()
    functions = sorted({case.partition("[")[0] for case in record.cases})
    done = kvmnest(
        tmp_path, "run", "--target", "reference", "-j1", "--json", "out.json", *functions
    )
    assert done.returncode == 0, done.stdout + done.stderr
    again = verdicts.of_results(json.loads((tmp_path / "out.json").read_text()))
    wrong = [
        case
        for case in record.cases
        if (case in again.passed, case in again.failed)
        != (case in record.passed, case in record.failed)
    ]
    remedy = "kvmnest run --target reference --json R.json; kvmnest known --record R.json"
    assert not wrong, remedy
    patterns = known.Known(verdicts.shown_by_a_case())
    unknown = [case for case in again.cases if patterns.match(case) and case not in record.cases]
    assert not unknown, remedy


def test_failures_on_both_are_explained():
    """What fails under KVM and on the bare CPU has an entry for either."""
    record = verdicts.recorded()
    there = known.load(known.REFERENCE, "none", {}, emulator=record.emulator)
    assert [case for case in sorted(record.failed) if there.match(case) is None] == []


CASES = {"passes": "passed", "fails": "failed", "known": "known", "skipped": "skipped"}


def results(target, **outcomes):
    cases = [
        {
            **{"id": name, "series": None, "sdm": None, "outcome": outcome, "seconds": 0.1},
            "detail": "needs a host: KVM_NMI" if outcome == "skipped" else "text",
            "summary": f"{name}!",
        }
        for name, outcome in outcomes.items()
    ]
    return {
        "schema": 1, "target": target, "emulator": "bochs 3.0", "kernel": "7.3", "kvm_params": {},
        "summary": dict.fromkeys(("passed", "failed", "skipped", "known", "error"), 0),
        "complete": True, "started": "2026-11-26T00:00:00+00:00",
        "finished": "2026-11-26T00:00:00+00:00", "seconds": 1.0, "running": None,
        "planned": len(cases), "not_run": [], "no_longer_known": [], "problems": [],
        "facts": {}, "options": {}, "cases": cases,
    }  # fmt: skip


def test_diff_with_a_kvm_gives_verdicts(tmp_path):
    there = results("reference", **CASES, gone="passed")
    (tmp_path / "r.json").write_text(json.dumps(there))
    for outcome, code in (("failed", 1), ("known", 0)):
        kvm = results("lab", **dict.fromkeys([*CASES, "gone", "new"], outcome), fine="passed")
        (tmp_path / "k.json").write_text(json.dumps(kvm))
        for names in (("k.json", "r.json"), ("r.json", "k.json")):
            done = kvmnest(tmp_path, "diff", *names, "--json")
            assert done.returncode == code, done.stderr
            found = {entry["id"]: entry["verdict"] for entry in json.loads(done.stdout)}
            assert found == {
                "passes": "kvm", "gone": "kvm", "fails": "both", "known": "both",
                "skipped": "none", "new": "none",
            }  # fmt: skip
    text = kvmnest(tmp_path, "diff", "k.json", "r.json").stdout
    assert "  skipped (known): needs a host: KVM_NMI\n" in text
    assert "  new (known): has not run there\n" in text
    assert f"{Verdict.KVM.value} (2):\n" in text


def test_record_is_of_a_whole_run_on_the_reference_target(tmp_path):
    for document, why in (
        (results("lab"), "these results are of target lab, not of reference"),
        ({**results("reference"), "complete": False}, "these results are not complete"),
    ):
        (tmp_path / "r.json").write_text(json.dumps(document))
        done = kvmnest(tmp_path, "known", "--record", "r.json")
        assert (done.returncode, done.stderr) == (2, f"kvmnest: {why}\n")


def test_known_deviations_show_their_verdict(tmp_path):
    done = kvmnest(tmp_path, "known", "--json")
    entries = {entry["case"]: entry for entry in json.loads(done.stdout)}
    assert len(entries) > 100
    sysenter = entries["test_entry_msr_load.py::test_bad_value[SYSENTER_EIP]"]
    assert (sysenter["verdict"], sysenter["contradicted"]) == ("kvm", False)
    host = entries["test_preemption_timer.py::test_deadline_that_passed_meanwhile"]
    assert host["verdict"] == "none"
    assert host["no_verdict"][0].startswith("needs a host: ")
    of_bochs = entries["test_ept_violation.py::test_guest_page_walk_sets_flags*"]
    assert (of_bochs["verdict"], of_bochs["contradicted"]) == ("both", False)
    mended = entries["test_entry_guest_msrs.py::test_rip_64_bit"]
    assert (mended["verdict"], mended["contradicted"]) == ("none", False)
    assert mended["no_verdict"][0].startswith("of bochs <3.0-25; the reference CPU is that of ")
    assert kvmnest(tmp_path, "known", "nothing-like-it").returncode == 4
    text = kvmnest(tmp_path, "known", "SYSENTER_EIP").stdout
    assert f"> {Verdict.KVM.value}" in text


@pytest.mark.parametrize(
    ("condition", "outcome", "contradicted"),
    [
        ({}, "passed", False),
        ({}, "failed", True),
        ({"emulator": "bochs <=3.0"}, "failed", False),
        ({"emulator": "bochs <=3.0"}, "passed", True),
        ({"emulator": "bochs <2"}, "passed", False),
        ({"emulator": "bochs <=3.0", "params": {"ept": False}}, "passed", False),
        ({"kernel_message": "WARNING: *"}, "failed", False),
        ({"target": "reference"}, "failed", None),
    ],
)
def test_contradicted_entries(monkeypatch, condition, outcome, contradicted):
    """An entry that names KVM against a failure without it, one that names Bochs against a pass."""
    entry = known.Deviation(case="test_a.py::test_b", reason="why", **condition)
    monkeypatch.setattr(known, "read", lambda *_: [entry])
    outcomes = verdicts.of_results(results("reference", **{entry.case: outcome}))
    assert [judged.contradicted for judged in verdicts.judged(outcomes)] == (
        [] if contradicted is None else [contradicted]
    )
