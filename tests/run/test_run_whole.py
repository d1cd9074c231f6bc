"""Whole runs: real child processes that pass, fail, crash, or hang."""

import json
import os
import xml.etree.ElementTree as ET

import pytest
from file_runs import run

from kvmnest import known
from kvmnest.bisect import probe
from kvmnest.errors import HarnessError, UsageError
from kvmnest.reports import jsonfile, ktap
from kvmnest.reports.model import Run
from kvmnest.run.judge import Judge
from kvmnest.run.loop import run_cases
from kvmnest.run.selection import Selection, pytest_arguments
from kvmnest.run.targets import LocalTarget


def outcomes(found: Run) -> dict[str, str]:
    return {case.id.partition("::")[2]: case.outcome for case in found.cases}


def test_all_outcomes(write, tmp_path, capsys):
    name = write(
        """
@pytest.mark.series(3)
@pytest.mark.sdm("A section")
def test_good(): assert 1
def test_bad(): assert 1 == 2, "one is not two\\x00 \\u2603"
@pytest.mark.skip(reason="no such bit")
def test_left(): pass
@pytest.fixture
def broken(): raise ValueError("in setup")
def test_setup(broken): pass
"""
    )
    code, found = run(tmp_path / "out", name)
    assert code == 1
    assert outcomes(found) == {
        "test_good": "passed",
        "test_bad": "failed",
        "test_left": "skipped",
        "test_setup": "error",
    }
    document = json.loads((tmp_path / "out.json").read_text())
    assert document["schema"] == 1
    assert document["target"] == "kvm"
    assert document["kernel"] == os.uname().release
    assert document["complete"] is True
    assert document["running"] is None
    assert document["summary"] == {"passed": 1, "failed": 1, "skipped": 1, "known": 0, "error": 1}
    good, bad, left, _ = document["cases"]
    assert good["id"] == "test_sample.py::test_good"
    assert (good["series"], good["sdm"]) == (3, "A section")
    assert set(good) >= {"id", "series", "sdm", "outcome", "seconds", "detail"}
    assert "one is not two" in bad["detail"]
    assert bad["rerun"] == "again test_sample.py::test_bad"
    assert left["detail"] == "no such bit"
    assert jsonfile.load(tmp_path / "out.json") == document

    suite = ET.parse(tmp_path / "out.xml").getroot()[0]
    assert [suite.get(n) for n in ("tests", "failures", "errors", "skipped")] == list("4111")
    cases = {case.get("name"): case for case in suite.iter("testcase")}
    assert cases["test_bad"].find("failure").text.endswith("again test_sample.py::test_bad")
    assert cases["test_left"].find("skipped").get("message") == "no such bit"

    out = capsys.readouterr().out
    assert "FAILED test_sample.py::test_bad" in out
    assert "  3 VMXON and VMXOFF" in out
    assert out.rstrip().splitlines()[-1].startswith("1 passed, 1 failed, 1 skipped, 1 error in ")


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("def test_a(): assert 1", 0),
        ("@pytest.mark.skip(reason='x')\ndef test_a(): pass", 4),
        ("@pytest.fixture\ndef f(): raise ValueError\ndef test_a(f): pass", 3),
        ("", 4),
    ],
)
def test_exit_codes(write, tmp_path, text, code):
    assert run(tmp_path / "out", write(text))[0] == code


ENDS = {
    "KeyboardInterrupt": "def test_b(): raise KeyboardInterrupt",
    "pytest.exit": "def test_b(): pytest.exit('enough')",
    "pytest.exit with status 0": "def test_b(): pytest.exit('enough', returncode=0)",
    "in set-up": "@pytest.fixture\ndef f(): raise KeyboardInterrupt\ndef test_b(f): assert 1",
    "in teardown": """@pytest.fixture
def f():
    yield
    pytest.exit("enough")
def test_b(f): assert 1""",
    "signal": "def test_b(): os.kill(os.getpid(), signal.SIGINT); time.sleep(5)",
}


@pytest.mark.parametrize("place", ["in the middle", "last"])
@pytest.mark.parametrize("how", ENDS)
def test_a_case_that_ends_the_session(write, tmp_path, capsys, how, place):
    after = "\ndef test_c(): assert 1" if place == "in the middle" else ""
    code, found = run(tmp_path / "out", write(f"def test_a(): assert 1\n{ENDS[how]}{after}"))
    assert code == 3
    expected = {"test_a": "passed", "test_b": "error"} | ({"test_c": "passed"} if after else {})
    assert outcomes(found) == expected
    assert found.interrupted == ["test_sample.py::test_b"]
    (problem,) = json.loads((tmp_path / "out.json").read_text())["problems"]
    assert problem.startswith("test_sample.py::test_b ended the session: ")
    assert ("enough" if "pytest.exit" in ENDS[how] else "KeyboardInterrupt") in problem
    assert problem in capsys.readouterr().out
    suite = ET.parse(tmp_path / "out.xml").getroot()[0]
    assert suite.get("errors") == "2"
    lines = [*ktap.lines(found)]
    assert [line for line in lines if line.startswith("not ok 2 the run as a whole: ")]
    assert probe.judge(found).verdict == probe.SKIP


@pytest.mark.parametrize(
    ("what", "text"),
    [
        (
            "raise KeyboardInterrupt",
            r"ended while cases were collected: KeyboardInterrupt \(.*:3\)",
        ),
        ("pytest.exit('enough')", r"cannot collect test_sample.py: .*Exit: enough"),
        ("os._exit(0)", r"did not start \(exit status 0\)"),
        ("raise SystemExit(0)", r"broke down: SystemExit: 0 \(.*/test_sample.py:3\)"),
    ],
)
def test_a_file_that_ends_the_session(write, tmp_path, what, text):
    with pytest.raises(HarnessError, match=text):
        run(tmp_path / "out", write(what))


@pytest.mark.parametrize(
    ("text", "summary"),
    [
        ("def test_b(): sys.exit(0)", "SystemExit: 0"),
        ("@pytest.fixture\ndef f(): raise SystemExit\ndef test_b(f): assert 1", "SystemExit"),
        (
            "@pytest.fixture\ndef f():\n yield\n sys.exit(0)\ndef test_b(f): assert 1",
            "SystemExit: 0",
        ),
        ("def test_b(): os._exit(0)", "crashed: the process ended with status 0 in the middle"),
    ],
)
def test_a_case_that_ends_its_process(write, tmp_path, text, summary):
    text = f"import sys\ndef test_a(): assert 1\n{text}\ndef test_c(): assert 1"
    code, found = run(tmp_path / "out", write(text))
    assert code in (1, 3)
    assert found.complete
    assert [case.outcome for case in found.cases[::2]] == ["passed", "passed"]
    assert found.cases[1].outcome in ("failed", "error")
    assert summary in f"{found.cases[1].summary} {found.cases[1].detail}"


def test_a_session_that_ends_after_the_last_case(write, tmp_path):
    write("def pytest_runtest_logfinish(): pytest.exit('late')", "conftest.py")
    code, found = run(tmp_path / "out", write("def test_a(): assert 1"))
    assert (code, outcomes(found)) == (3, {"test_a": "passed"})
    assert found.problems[0].startswith("the session was ended after its last case: Exit: late (")


def test_a_missing_fixture_is_named(write, tmp_path, capsys):
    _, found = run(tmp_path / "out", write("def test_a(no_such): assert 1"))
    assert found.cases[0].summary == "fixture 'no_such' not found"
    assert "fixture 'no_such' not found" in capsys.readouterr().out


def test_a_crash_costs_one_case(write, tmp_path, capsys):
    name = write(
        """
def test_a(): assert 1
def test_b():
    print("last words", flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)
def test_c(): assert 1
def test_d(): os._exit(0)
def test_e(): assert 1
"""
    )
    code, found = run(tmp_path / "out", name)
    assert code == 3
    assert outcomes(found) == {
        "test_a": "passed",
        "test_b": "error",
        "test_c": "passed",
        "test_d": "error",
        "test_e": "passed",
    }
    assert found.cases[1].summary == "crashed: killed by SIGSEGV"
    assert found.cases[3].summary == "crashed: the process ended with status 0 in the middle"
    assert found.complete
    assert "starting again for 3 cases" in capsys.readouterr().out


def test_a_crash_in_the_last_case(write, tmp_path):
    code, found = run(tmp_path / "out", write("def test_a(): os._exit(1)"))
    assert (code, outcomes(found)) == (3, {"test_a": "error"})


def test_three_crashes_in_a_row_are_enough(write, tmp_path, capsys):
    name = write(
        "def test_0(): assert 1\n"
        '@pytest.mark.parametrize("n", range(5))\ndef test_a(n): os._exit(7)\n'
    )
    code, found = run(tmp_path / "out", name)
    assert code == 3
    assert [case.outcome for case in found.cases] == ["passed", "error", "error", "error"]
    assert found.not_run() == ["test_sample.py::test_a[3]", "test_sample.py::test_a[4]"]
    assert "gave up after 3 losses in a row, 2 cases not run" in capsys.readouterr().out
    document = json.loads((tmp_path / "out.json").read_text())
    assert document["not_run"] == found.not_run()
    assert document["complete"] is False


def test_deaths_that_are_known_are_no_losses(write, tmp_path, monkeypatch):
    record = tmp_path / "known.toml"
    record.write_text(
        '[[deviation]]\ncase = "test_sample.py::test_k*"\nreason = "seen"\ncrash = true\n'
    )
    monkeypatch.setattr(known, "KNOWN_FILE", record)
    name = write(
        '@pytest.mark.parametrize("n", range(2))\ndef test_a(n): os._exit(7)\n'
        '@pytest.mark.parametrize("n", range(4))\ndef test_k(n): os._exit(7)\n'
        "def test_z(): assert 1\n"
    )
    found = run(tmp_path / "out", name)[1]
    assert [case.outcome for case in found.cases] == ["error"] * 2 + ["known"] * 4 + ["passed"]
    assert found.complete


def test_a_hang_has_a_name(write, tmp_path):
    name = write("def test_a(): time.sleep(1000)\ndef test_b(): assert 1\n")
    found = run(tmp_path / "out", name, patience=2.0)[1]
    assert outcomes(found) == {"test_a": "error", "test_b": "passed"}
    assert found.cases[0].summary == "crashed: no sign of life for 2 s, killed"
    assert found.lost == {found.cases[0].id: "hang"}


def test_known_deviations(write, tmp_path, monkeypatch, capsys):
    record = tmp_path / "known.toml"
    entry = '[[deviation]]\ncase = "test_sample.py::{}"\nreason = "seen"\n'
    record.write_text(entry.format("test_l_crashes") + "crash = true\n" + entry.format("test_l*"))
    monkeypatch.setattr(known, "KNOWN_FILE", record)
    name = write(
        "def test_l_fails(): assert 0\ndef test_l_crashes(): os._exit(1)\n"
        "def test_l_passes(): assert 1\n"
    )
    code, found = run(tmp_path / "out", name)
    assert code == 0
    assert outcomes(found) == {
        "test_l_fails": "known",
        "test_l_crashes": "known",
        "test_l_passes": "passed",
    }
    assert found.cases[0].detail.startswith("seen\n")
    document = json.loads((tmp_path / "out.json").read_text())
    assert document["no_longer_known"] == [
        {"id": "test_sample.py::test_l_passes", "reason": "seen"}
    ]
    assert "no longer happen" in capsys.readouterr().out
    assert run(tmp_path / "out", name, strict_known=True)[0] == 1


def test_a_file_that_does_not_load(write, tmp_path):
    name = write("import no_such_module_at_all\n")
    with pytest.raises(HarnessError, match=r"test_sample.py: .*no_such_module_at_all"):
        run(tmp_path / "out", name)


def test_a_case_that_does_not_exist(write, tmp_path):
    with pytest.raises(UsageError, match="test_nothing"):
        run(tmp_path / "out", write("def test_a(): pass") + "::test_nothing")


def test_cases_of_the_suite_beside_a_file_of_the_user(write, tmp_path):
    """pytest calls the suite's file "" where its root is the user's folder."""
    name = write("def test_mine(): assert 1")
    judge = Judge(Run("kvm"))
    arguments = pytest_arguments(Selection(), "kvm", ["kvmnest.suite.test_smm"], [name])
    run_cases(LocalTarget(30.0), arguments, judge)
    files = {case.id.partition("::")[0] for case in judge.run.cases}
    assert files == {"test_smm.py", "test_sample.py"}
