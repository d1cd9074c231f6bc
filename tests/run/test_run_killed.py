"""Runs that are killed or interrupted in the middle, and what they leave."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path

from kvmnest.reports import jsonfile
from kvmnest.reports.model import Case, Run
from kvmnest.reports.progress import Progress
from kvmnest.run.report import Report

SCRIPT = str(Path(__file__).with_name("file_runs.py"))


def _start(tmp_path, name):
    return subprocess.Popen(
        [sys.executable, SCRIPT, str(tmp_path / "out"), name],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _wait_for_cases(path, count):
    end = time.monotonic() + 30
    while time.monotonic() < end:
        if path.exists() and len(json.loads(path.read_text())["cases"]) >= count:
            return
        time.sleep(0.01)
    raise AssertionError(f"{path} never had {count} cases")


SLOW = 'def test_pid(): open("pid", "w").write(str(os.getpid()))\n' + (
    '@pytest.mark.parametrize("n", range(100))\ndef test_a(n): time.sleep(0.05)\n'
)


def _gone(pid):
    for _ in range(200):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def test_killed_in_the_middle(write, tmp_path):
    process = _start(tmp_path, write(SLOW))
    _wait_for_cases(tmp_path / "out.json", 5)
    process.kill()
    process.communicate()
    document = json.loads((tmp_path / "out.json").read_text())
    assert len(document["cases"]) >= 5
    assert document["complete"] is False
    assert document["finished"] is None
    # Nobody listens to the child any more.
    assert _gone(int((tmp_path / "pid").read_text()))


def test_what_a_killed_run_left_beside_its_results(tmp_path):
    """A kill in the middle of a write; what a process that lives writes at the moment stays."""
    path = tmp_path / "o[1].json"
    dead = subprocess.Popen(["true"])
    dead.wait()
    left, other = (path.with_name(f".{path.name}.{pid}.tmp") for pid in (dead.pid, os.getppid()))
    left.write_text("{")
    other.write_text("{")
    jsonfile.JsonFile(path).start(Run("kvm"))
    assert {*tmp_path.iterdir()} == {path, other}


def test_a_killed_run_leaves_a_junit_report_that_does_not_look_good(write, tmp_path):
    process = _start(tmp_path, write(SLOW))
    _wait_for_cases(tmp_path / "out.json", 5)
    process.kill()
    output, _ = process.communicate()
    suite = ET.parse(tmp_path / "out.xml").getroot()[0]
    found = [case for case in suite.iter("testcase") if case.get("classname") != "kvmnest"]
    stored = len(json.loads((tmp_path / "out.json").read_text())["cases"])
    assert len(found) >= stored - 1  # it is written second
    assert suite.get("errors") == "1"
    assert "the run did not come to its end" in suite.find("testcase/error").get("message")
    # What the terminal has counted is stored.
    counted = max((int(n) for n in re.findall(r"\[(\d+)/", output)), default=0)
    assert min(stored, len(found)) >= counted


def test_a_case_is_stored_before_it_is_told(tmp_path):
    path = tmp_path / "out.json"

    class Telling(Progress):
        def ended(self, run, case):
            document = json.loads(path.read_text())
            assert [one["id"] for one in document["cases"]] == [one.id for one in run.cases]
            told.append(case.id)

    told = []
    report = Report(Run("kvm"), Telling(io.StringIO()), json_path=path)
    report.planned(["a", "b"])
    for name in report.run.planned:
        report.ended(Case(name, None, None, "passed", 0.0))
    assert told == ["a", "b"]


def test_interrupted(write, tmp_path):
    process = _start(tmp_path, write(SLOW))
    _wait_for_cases(tmp_path / "out.json", 5)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=30)
    document = json.loads((tmp_path / "out.json").read_text())
    assert len(document["cases"]) >= 5
    assert document["finished"]
    assert document["not_run"]
    assert "not run: " in output
    assert _gone(int((tmp_path / "pid").read_text()))
