"""Progress on a terminal, in a log and into a closed pipe; the summary."""

import contextlib
import io
import os
import pty
import re

import pytest

from kvmnest.reports.model import Case, Run
from kvmnest.reports.progress import Progress, last_line, summary_lines


def _case(number, outcome="passed", series=3, **others):
    return Case(f"test_a.py::test_{number}", series, "A section", outcome, 0.5, **others)


def _play(progress, count, outcome="passed"):
    run = Run("lab", facts={"kernel": "6.1.0-56"})
    progress.planned(count)
    for number in range(count):
        progress.running(run, f"test_a.py::test_{number}")
        run.cases.append(_case(number, outcome, detail="why\nE  more", summary="why"))
        progress.ended(run, run.cases[-1])
    progress.finish(run)
    return run


def test_a_terminal_gets_one_line_that_is_rewritten(monkeypatch):
    monkeypatch.setattr("kvmnest.reports.progress._REWRITE_SECONDS", 0.0)
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    main, terminal = pty.openpty()
    with open(terminal, "w") as out:
        _play(Progress(out), 3)
    shown = ""
    # The terminal passes it on bit by bit; when all is read and the other side closed, it is EIO.
    with contextlib.suppress(OSError):
        while data := os.read(main, 65536):
            shown += data.decode()
    os.close(main)
    progress, _, rest = shown.partition("\r\n")
    assert progress.count("\r\x1b[K") == 7
    assert "[2/3] 2 passed" in progress
    assert all(len(line) < 40 for line in progress.split("\r\x1b[K"))
    assert "\x1b[32m3 passed in" in rest


@pytest.mark.parametrize(
    ("outcome", "shown"),
    [
        ("failed", "\x1b[31mFAILED\x1b[0m test_a.py::test_0: why"),
        ("error", "\x1b[31mERROR\x1b[0m test_a.py::test_0: why"),
        ("known", "\x1b[33mknown\x1b[0m test_a.py::test_0"),
        ("skipped", "\x1b[33mskipped\x1b[0m test_a.py::test_0"),
        ("passed", "\x1b[32mpassed\x1b[0m test_a.py::test_0"),
    ],
)
def test_colours(outcome, shown):
    plain, colours = io.StringIO(), io.StringIO()
    _play(Progress(plain, verbose=True), 1, outcome)
    _play(Progress(colours, verbose=True, colour=True), 1, outcome)
    assert shown in colours.getvalue()
    good = outcome in ("known", "skipped", "passed")
    last = colours.getvalue().splitlines()[-1]
    assert last.startswith("\x1b[32m" if good else "\x1b[31m")
    assert last.endswith("\x1b[0m")
    assert re.sub("\x1b.[0-9]*m", "", colours.getvalue()) == plain.getvalue()


@pytest.mark.parametrize(
    ("environment", "expected"),
    [({}, True), ({"NO_COLOR": "1"}, False), ({"NO_COLOR": ""}, True), ({"TERM": "dumb"}, False)],
)
def test_who_gets_colours(monkeypatch, environment, expected):
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    main, terminal = pty.openpty()
    with open(terminal, "w") as out:
        _play(Progress(out), 1, "failed")
    shown = os.read(main, 65536)
    os.close(main)
    assert (b"\x1b[31m" in shown) is expected


def test_a_log_gets_a_line_now_and_then():
    out = io.StringIO()
    _play(Progress(out), 120)
    lines = out.getvalue().splitlines()
    assert [line.partition("]")[0] for line in lines if line.startswith("[")] == [
        "[50/120",
        "[100/120",
    ]


def test_a_log_has_the_time_left(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("kvmnest.reports.progress.time.monotonic", lambda: now[0])
    out = io.StringIO()
    progress, run = Progress(out), Run("lab")
    progress.planned(1000)
    for number in range(1000):
        now[0] += 0.5
        run.cases.append(_case(number))
        progress.ended(run, run.cases[-1])
    lines = {line.partition("/")[0]: line for line in out.getvalue().splitlines()}
    assert lines["[20"] == "[20/1000] 20 passed 10 s, 8 min left"
    assert lines["[900"] == "[900/1000] 900 passed 450 s, 50 s left"
    assert lines["[1000"] == "[1000/1000] 1000 passed 500 s"


def test_failures_show_at_once_and_in_full_at_the_end():
    out = io.StringIO()
    _play(Progress(out), 1, "failed")
    assert out.getvalue().startswith("FAILED test_a.py::test_0: why\n")
    assert (
        '--- failed: test_a.py::test_0\n    SDM, "A section"; patch 3\n    why\n' in out.getvalue()
    )


def test_quiet():
    out = io.StringIO()
    _play(Progress(out, quiet=True), 2, "failed")
    assert out.getvalue() == ""


def test_a_closed_pipe_does_not_stop_the_run():
    read, write = os.pipe()
    os.close(read)
    out = open(write, "w")  # noqa: SIM115 - its end fails, which is the point
    _play(Progress(out), 60)
    with contextlib.suppress(BrokenPipeError):
        out.close()


def test_summary():
    run = Run("kvm", facts={"kernel": "6.12"}, planned=["x"])
    run.cases = [
        _case(1),
        _case(2, "failed"),
        _case(3, "skipped", 16, detail="no such bit"),
        _case(4, "skipped", 16, detail="no such bit"),
        _case(5, "known", None),
    ]
    run.no_longer = [("test_a.py::test_1", "was wrong")]
    run.seconds = 12.3
    text = "\n".join(summary_lines(run))
    lines = [line.split() for line in text.splitlines()]
    assert ["patch", "passed", "failed", "skipped", "known"] in lines
    assert ["3", "VMXON", "and", "VMXOFF", "1", "1"] in lines
    assert ["16", "VMLAUNCH", "and", "VMRESUME", "2"] in lines
    assert "  - other tests" in text
    assert "    2 no such bit" in text
    assert "test_a.py::test_1: was wrong" in text
    assert "not run: 1 of 1 cases, the first is x" in text
    assert last_line(run) == ("1 passed, 1 failed, 2 skipped, 1 known in 12.3 s (kvm, kernel 6.12)")
