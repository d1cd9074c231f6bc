"""kvmnest diff, report and list, on results files and on the suite."""

import html
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest

from kvmnest.cli.main import main
from kvmnest.reports import diff, jsonfile


def case(name, outcome, **more):
    return {
        "id": f"test_vmxon.py::{name}",
        "series": more.pop("series", 3),
        "sdm": "VMXON - Enter VMX Operation",
        "outcome": outcome,
        "seconds": 0.25,
        "detail": more.pop("detail", ""),
        **more,
    }


def broken(name, outcome="failed"):
    return case(name, outcome, detail="why")


def results(*cases, **more):
    counts = dict.fromkeys(("passed", "failed", "skipped", "known", "error"), 0)
    for one in cases:
        counts[one["outcome"]] += 1
    return {
        "schema": 1,
        "target": "lab",
        "emulator": None,
        "kernel": "6.1.0-56-cloud-amd64",
        "kvm_params": {"ept": "Y"},
        "summary": counts,
        "complete": True,
        "started": "2026-11-26T21:00:00+00:00",
        "finished": "2026-11-26T21:00:01+00:00",
        "seconds": 1.0,
        "running": None,
        "planned": len(cases),
        "not_run": [],
        "no_longer_known": [],
        "problems": [],
        "facts": {"cpu": "a CPU"},
        "options": {},
        "cases": list(cases),
        **more,
    }


@pytest.fixture
def files(tmp_path):
    old = results(case("a", "passed"), broken("b"), case("c", "passed"), broken("d", "error"))
    new = results(
        case("a", "failed", detail="E boom\n# <b>&\x1b[31m", summary="boom", rerun="kvmnest run a"),
        case("b", "passed"),
        case("c", "skipped", detail="needs X"),
        broken("d"),
        case("e", "known", series=9, detail="why\n\nmore", summary="why"),
    )
    paths = tmp_path / "old.json", tmp_path / "new.json"
    for path, document in zip(paths, (old, new), strict=True):
        path.write_text(json.dumps(document))
    return [str(path) for path in paths]


def test_diff(files, capsys):
    assert main(["diff", *files]) == 1
    out = capsys.readouterr().out
    kinds = [line.split("  ")[0].strip() for line in out.splitlines()[2:-1]]
    assert kinds == ["new failure", "fixed", "new skip", "added"]
    assert "test_vmxon.py::a (passed -> failed): boom" in out
    assert out.splitlines()[-1] == "1 new failure, 1 fixed, 1 new skip, 1 added"
    assert main(["diff", files[1], files[0]]) == 1  # b is broken the other way round
    assert main(["diff", files[0], files[0]]) == 0


@pytest.mark.parametrize(
    ("was", "now", "kind"),
    [
        ("passed", "error", "new failure"),
        ("", "failed", "new failure"),
        ("known", "failed", "new failure"),
        ("skipped", "passed", "no longer skipped"),
        ("failed", "skipped", "new skip"),
        ("passed", "", "gone"),
        ("passed", "known", "known"),
    ],
)
def test_kinds_of_change(was, now, kind):
    old, new = (
        jsonfile.run_of(results(*([case("x", outcome)] if outcome else [])))
        for outcome in (was, now)
    )
    assert [change.kind for change in diff.compare(old, new)] == [kind]


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"schema": 2, "cases": []}', '{"schema": 1, "cases": [3]}']
)
def test_files_that_are_no_results(files, tmp_path, content, capsys):
    bad = tmp_path / "bad.json"
    bad.write_text(content)
    for arguments in (["diff", files[0], str(bad)], ["report", str(bad), "--ktap", "-"]):
        code = main(arguments)
        error = capsys.readouterr().err
        assert code == 3
        assert error.count("\n") == 1
        assert "bad.json" in error


def test_ktap(files, capsys):
    assert main(["report", files[1], "--ktap", "-"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "KTAP version 1"
    assert [line for line in lines if re.match(r"1\.\.|(not )?ok", line)] == [
        "1..2",
        "not ok 1 patch 3: VMXON and VMXOFF",
        "ok 2 patch 9: VMCLEAR",
    ]
    assert "  ok 3 test_vmxon.py::c # SKIP needs X" in lines
    assert "  ok 1 test_vmxon.py::e # XFAIL why" in lines
    assert not any("\x1b" in line for line in lines)


def test_github(files, capsys, tmp_path, monkeypatch):
    summary = tmp_path / "summary.md"
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    assert main(["report", files[1], "--github"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("::error title=kvmnest%3A test_vmxon.py%3A%3Aa::E boom%0A")
    assert "| 3 VMXON and VMXOFF | 1 | 2 | 1 |" in summary.read_text()


def test_html_escapes_everything(files, tmp_path):
    page = tmp_path / "out.html"
    assert main(["report", files[1], "--html", str(page), "--compare", files[0]]) == 0
    text = page.read_text()
    assert "<b>&\x1b" not in text
    assert "&lt;b&gt;&amp;" in text
    assert "new failure" in text
    assert "kvmnest run a" in text
    # Links lead to cases of the page itself, and to each that changed and is there.
    assert not re.search(r"src=", text)
    links = re.findall(r'href="([^"]*)"', text)
    assert links
    ids = set(re.findall(r'<details class="case [a-z]+" id="([^"]*)"', text))
    assert {html.unescape(unquote(link.removeprefix("#"))) for link in links} <= {
        html.unescape(name) for name in ids
    }


def test_html_in_a_browser(files, tmp_path):
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("no chromium: apt-get install chromium")
    page = tmp_path / "out.html"
    assert main(["report", files[1], "--html", str(page)]) == 0
    passed = next(
        case["id"]
        for case in json.loads(Path(files[1]).read_text())["cases"]
        if case["outcome"] == "passed"
    )
    done = subprocess.run(
        [
            *(browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"),
            *(f"--user-data-dir={tmp_path}/profile", f"{page.as_uri()}#{passed}"),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    # The script ran: it counts the cases, and no patch is chosen.
    assert '<output id="count">5 of 5</output>' in done.stdout
    assert 'aria-pressed="false"' in done.stdout
    assert 'aria-pressed="true"' not in done.stdout
    # It opened the case that the address names.
    assert re.search(rf'id="{passed}" data-outcome="passed"[^>]* open=""', done.stdout)


@pytest.mark.parametrize("where", ["/nonexistent/x.html", "/proc/x.html"])
def test_a_place_that_cannot_be_written(files, where, capsys):
    assert main(["report", files[1], "--html", where]) == 2
    assert capsys.readouterr().err.startswith(f"kvmnest: cannot write {where}: ")


def test_report_of_nothing(files, capsys):
    assert main(["report", files[1]]) == 2
    assert "--html" in capsys.readouterr().err


def test_list(capsys):
    assert main(["list", "test_vmxon.py", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert all(one["series"] and one["sdm"] for one in found)
    assert main(["list", "-k", "preemption_timer", "--patch", "19"]) == 0
    out = capsys.readouterr().out
    assert "PinCtl.ACTIVATE_PREEMPTION_TIMER" in out
    assert main(["list", "-k", "no_such_case_at_all"]) == 4
    assert main(["list", "test_nothing.py"]) == 2


def test_list_without_access_to_kvm(tmp_path):
    """Cases can be listed by whoever may not open /dev/kvm; it says so."""
    if os.geteuid() or not Path("/dev/kvm").exists() or not shutil.which("setpriv"):
        pytest.skip("needs root, to be somebody else, and a /dev/kvm")
    as_nobody = ("setpriv", "--reuid=65534", "--clear-groups")
    done = subprocess.run(
        [*as_nobody, sys.executable, "-m", "kvmnest", "list", "test_vmxon.py"],
        env={"PATH": os.defpath, "HOME": "/nonexistent", "XDG_CACHE_HOME": "/nonexistent"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    if "PermissionError" in done.stderr:
        pytest.skip("this checkout cannot be read by others")
    assert done.returncode == 0, done.stderr
    assert "test_vmxon.py::test_vmxon_enters_vmx_operation" in done.stdout
    assert "0 can run on this machine's /dev/kvm" in done.stdout
    assert "/dev/kvm permission denied" in done.stdout.splitlines()[-1]
