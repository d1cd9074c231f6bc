"""``kvmnest run --settings``: the default, and again under settings what may answer differently."""

import fnmatch
import io
import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

import kvmnest.suite
from kvmnest import settings
from kvmnest.cli.main import main
from kvmnest.reports.model import Case, Run
from kvmnest.reports.progress import Progress
from kvmnest.run.judge import Enough, Judge
from kvmnest.run.report import Report
from kvmnest.run.under_settings import (
    case_of,
    chosen,
    lines,
    name,
    ran_nowhere,
)

SUITE_FILES = [path.name for path in Path(kvmnest.suite.__file__).parent.glob("test_*.py")]
NO_EPT = settings.choose(["no-ept"])[0]
NO_VPID = settings.choose(["no-vpid"])[0]


def case(case_id, outcome="passed", detail=""):
    return Case(case_id, 1, None, outcome, 0.1, detail=detail)


@pytest.mark.parametrize("setting", settings.every(), ids=lambda setting: setting.name)
def test_each_pattern_names_a_file_of_the_suite(setting):
    assert setting.files
    for pattern in setting.files:
        assert fnmatch.filter(SUITE_FILES, pattern), pattern


def test_chosen():
    default = [
        case("test_vpid.py::test_a"),
        case("test_vmxon.py::test_b"),
        case("test_vmxon.py::test_c[x]", "skipped"),
    ]
    assert chosen(NO_VPID, default) == ["test_vpid.py::test_a", "test_vmxon.py::test_c[x]"]
    assert chosen(NO_EPT, default) == [each.id for each in default]
    assert chosen(NO_VPID, default, every_case=True) == [each.id for each in default]


@pytest.mark.parametrize(
    "case_id", ["test_a.py::test_b", "test_a.py::test_b[x@y]", "with@sign/test_a.py::test_b"]
)
def test_name_and_case(case_id):
    assert case_of(case_id) == case_id
    assert case_of(name(case_id, NO_EPT)) == case_id
    assert name(case_id, settings.DEFAULT) == case_id


def test_cases_that_run_nowhere():
    run = Run("lab")
    run.cases = [
        case("a::1", "skipped", "needs this"),
        case("a::2", "skipped", "needs that"),
        case("a::3"),
        case("a::1@no-ept", "skipped", "needs it still"),
        case("a::2@no-ept", "known"),
    ]
    assert [(each.id, each.detail) for each in ran_nowhere(run)] == [("a::1", "needs this")]
    told = lines(run, [NO_EPT])
    assert told[-3:] == ["cases that ran under no setting: 1", "  a::1: needs this", ""]
    assert told[1].split() == ["default", "1", "2"]
    assert told[2].split() == ["no-ept", "1", "1"]


# --- events of two settings, one report ---

SESSION = {"e": "session", "kernel": "7.3.4", "kvm_params": {"ept": "Y"}, "kernel_log": True}


def feed(part, outcomes, params):
    """The events of a process that runs these cases."""
    part.event({**SESSION, "kvm_params": params})
    part.event({"e": "collected", "first": 0, "cases": [[case_id, 1] for case_id in outcomes]})
    for case_id, outcome in outcomes.items():
        part.event({"e": "start", "id": case_id, "series": 1, "sdm": None})
        part.event({"e": "result", "id": case_id, "series": 1, "sdm": None, "seconds": 0.1,
                    "outcome": outcome, "detail": "", "summary": outcome})  # fmt: skip


@pytest.fixture
def whole(tmp_path):
    report = Report(
        Run("lab"),
        Progress(io.StringIO()),
        json_path=tmp_path / "o.json",
        junit_path=tmp_path / "o.xml",
        maxfail=2,
    )
    report.more_to_come = True
    return report


def under(whole, setting):
    rerun = lambda case_id: f"again {setting.name} {case_id}"  # noqa: E731
    return Judge(Run("lab"), whole, setting=setting, rerun=rerun)


def test_one_report(whole, tmp_path):
    feed(under(whole, settings.DEFAULT), {"f::a": "passed", "f::b": "skipped"}, {"ept": "Y"})
    # Killed here, the files say that cases are missing: settings were to come.
    assert json.loads((tmp_path / "o.json").read_text())["complete"] is False
    assert ET.parse(tmp_path / "o.xml").getroot().get("errors") == "1"
    part = under(whole, NO_EPT)
    feed(part, {"f::a": "failed", "f::b": "passed"}, {"ept": "N"})
    part.event({"e": "end", "status": 1, "why": ""})
    assert part.run.complete, "the part is done, or run_cases would wait for more"
    whole.no_more()
    assert whole.finish() == 1
    document = json.loads((tmp_path / "o.json").read_text())
    assert {each["id"]: each["outcome"] for each in document["cases"]} == {
        "f::a": "passed", "f::b": "skipped", "f::a@no-ept": "failed", "f::b@no-ept": "passed",
    }  # fmt: skip
    failed = next(each for each in document["cases"] if each["outcome"] == "failed")
    assert failed["rerun"] == "again no-ept f::a"
    assert document["planned"] == 4
    assert document["not_run"] == []
    assert document["kvm_params"] == {"ept": "Y"}, "those of the default"


def test_known_is_looked_up_for_the_parameters_of_the_setting(whole, tmp_path, monkeypatch):
    record = tmp_path / "known.toml"
    record.write_text('[[deviation]]\ncase = "f::a"\nparams = { ept = "N" }\nreason = "why"\n')
    monkeypatch.setattr("kvmnest.known.KNOWN_FILE", record)
    feed(under(whole, settings.DEFAULT), {"f::a": "failed"}, {"ept": "Y"})
    part = under(whole, NO_EPT)
    feed(part, {"f::a": "failed"}, {"ept": "N"})
    assert [each.outcome for each in whole.run.cases] == ["failed", "known"]
    part = under(whole, NO_VPID)
    feed(part, {"f::a": "passed"}, {"ept": "N"})
    assert whole.run.no_longer == [("f::a@no-vpid", "why")]


def test_enough_failures_over_all_settings(whole):
    feed(under(whole, settings.DEFAULT), {"f::a": "failed"}, {"ept": "Y"})
    with pytest.raises(Enough):
        feed(under(whole, NO_EPT), {"f::a": "failed", "f::b": "passed"}, {"ept": "N"})
    assert whole.run.stopped == "stopped after 2 failures, as asked"
    assert whole.run.not_run() == ["f::b@no-ept"]


# --- the command line ---


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--settings", "no-such"], "no setting is called no-such"),
        (["--settings", "no-ept", "no-ept"], "--settings no-ept is given more than once"),
        (["--every-case"], "--every-case needs --settings"),
        (["--target", "kvm", "--settings", "all"], "--settings needs --target lab"),
    ],
)
def test_refused(capsys, arguments, said):
    assert main(["run", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.splitlines()) == 1


def test_in_the_lab(tmp_path, capfd):
    """Without VMX in L1 the cases about nested=0 run, which the default skips."""
    out = tmp_path / "o.json"
    code = main(["run", "--target=lab", "test_nested_parameter.py", "-k", "kvm_offers",
                 "--settings", "early-check", "not-nested", "--json", str(out)])  # fmt: skip
    told = capfd.readouterr().out
    assert code == 0, told
    assert "early-check: left out, this kernel has no such parameter" in told
    document = json.loads(out.read_text())
    outcomes = {each["id"]: each["outcome"] for each in document["cases"]}
    default = {case_id for case_id in outcomes if not case_id.endswith("@not-nested")}
    assert {f"{case_id}@not-nested" for case_id in default} == outcomes.keys() - default
    for case_id in default:
        assert {outcomes[case_id], outcomes[f"{case_id}@not-nested"]} == {"passed", "skipped"}
    assert "cases that ran under no setting: 0" in told
