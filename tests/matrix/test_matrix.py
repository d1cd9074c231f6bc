"""kvmnest matrix: real kernels in the lab, resuming, bad input."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from kvmnest.cli.main import main

QUICK = "test_vmxon.py::test_vmxon_enters_vmx_operation"


def test_two_settings_in_the_lab(tmp_path, capsys):
    arguments = [
        *("matrix", "test_nested_parameter.py", "-k", "off or on_or_hidden or vmx"),
        *("--kernels", "6.1", "--setting", "nested=0", "--state", str(tmp_path / "state")),
        *("--json", str(tmp_path / "m.json"), "--html", str(tmp_path / "m.html")),
    ]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "6.1 -> 6.1 nested=0: " in out
    found = json.loads((tmp_path / "m.json").read_text())
    assert found["schema"] == 1
    assert list(found["columns"]) == ["6.1", "6.1 nested=0"]
    assert all(document["complete"] for document in found["columns"].values())
    (step,) = found["changes"]
    assert (step["from"], step["to"]) == ("6.1", "6.1 nested=0")
    outcomes = [
        {case["id"]: case["outcome"] for case in document["cases"]}
        for document in found["columns"].values()
    ]
    for case in step["cases"]:
        assert (case["before"], case["after"]) == tuple(o[case["id"]] for o in outcomes)
    assert main(arguments) == 0
    assert capsys.readouterr().out.count("had been run") == 2


def test_a_kernel_that_is_not_there(tmp_path, capsys):
    """The others are run all the same."""
    arguments = ["matrix", "--kernels", "9.9", "6.1", "--state", str(tmp_path), QUICK]
    assert main(arguments) == 3
    out = capsys.readouterr().out
    assert "9.9: no kernel 9.9" in out
    assert "6.1: 1 passed" in out
    assert "every case has the same outcome everywhere" in out


def test_parts_are_put_together(tmp_path, capsys):
    """A part is run by itself; one that is missing is run again, and only that."""
    selected = ["test_vmread_vmwrite.py", "test_instruction_errors.py"]
    listed = subprocess.run(
        [sys.executable, "-m", "kvmnest", "list", "--json", *selected],
        capture_output=True,
        check=True,
    )
    expected = [case["id"] for case in json.loads(listed.stdout)]
    state = tmp_path / "state"
    arguments = [
        *("matrix", "--kernels", "6.1", "--parts", "2", "--state", str(state)),
        *("--json", str(tmp_path / "m.json"), *selected),
    ]
    assert main(arguments) == 0
    (document,) = json.loads((tmp_path / "m.json").read_text())["columns"].values()
    assert [case["id"] for case in document["cases"]] == expected
    assert document["complete"]
    assert document["planned"] == sum(document["summary"].values()) == len(expected)
    files = sorted(state.iterdir())
    sizes = [len(json.loads(file.read_text())["cases"]) for file in files]
    assert sum(sizes) == len(expected)
    assert min(sizes) == len(expected) // 2
    kept, gone = files
    before = kept.stat().st_mtime_ns
    gone.unlink()
    capsys.readouterr()
    assert main(arguments) == 0
    assert "had been run" not in capsys.readouterr().out
    assert kept.stat().st_mtime_ns == before
    assert gone.is_file()
    assert [c["id"] for c in _column(tmp_path / "m.json")["cases"]] == expected


def _column(path):
    (document,) = json.loads(path.read_text())["columns"].values()
    return document


def test_interrupted(tmp_path):
    """Ctrl-C ends the lab that runs, with 130; what was finished is not run again."""
    command = [
        *(sys.executable, "-m", "kvmnest", "matrix", "--kernels", "6.1", "--jobs", "1"),
        *("--setting", "ept=0", "--state", str(tmp_path)),
        "test_vmxon.py",
    ]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout.readline().startswith("6.1: ")
        time.sleep(1)
        os.kill(process.pid, signal.SIGINT)
        began = time.monotonic()
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.strip() == "kvmnest: interrupted"
    assert time.monotonic() - began < 30
    documents = [json.loads(path.read_text()) for path in tmp_path.glob("*.json")]
    assert any(document["complete"] for document in documents)


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--jobs", "0"], 2, "--jobs must be at least 1"),
        (["--parts", "0"], 2, "--parts must be at least 1"),
        (["6.1"], 2, "--kernels 6.1 is given more than once"),
        (["--setting", "ept=0", "--setting", "ept=0"], 2, "--setting ept=0 is given more"),
        (["--setting", "ept"], 2, "NAME=VALUE"),
        (["--json", "/nonexistent/x.json"], 2, "cannot write /nonexistent/x.json: No such"),
        (["--json", "/tmp"], 2, "cannot write /tmp: it is a directory"),
        (["--html", "/proc/x.html"], 2, "cannot write /proc/x.html: "),
        (["--state", "/proc/x"], 2, "cannot write /proc/x: "),
        (["--json", "/tmp/x", "--html", "/tmp/../tmp/x"], 2, "both name /tmp/x"),
        (["--scheduler", "tcp://127.0.0.1:9", "--jobs", "1"], 2, "--jobs is for this machine"),
        (["-k", "no_such_case_at_all"], 4, "no case matches -k 'no_such_case_at_all'"),
        (["-k", "a and"], 2, "expression"),
        (["--", "test_nothing.py"], 2, "no such case, file or directory: test_nothing.py"),
        (["--", "test_vmxon.py::test_nothing"], 2, "test_nothing"),
    ],
)
def test_found_before_the_run(arguments, code, says, tmp_path, capsys, monkeypatch):
    """Nothing is booted for what must end in an error."""

    def boot(*_, **__):
        raise AssertionError("a lab was made")

    monkeypatch.setattr("kvmnest.matrix.cell.LabTarget", boot)
    state = [] if "--state" in arguments else ["--state", str(tmp_path)]
    assert main(["matrix", *state, "--kernels", "6.1", *arguments]) == code
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_a_reader_that_leaves(tmp_path):
    """As with head: the run goes on, and its files are written."""
    command = [
        *(sys.executable, "-m", "kvmnest", "matrix", "--kernels", "9.9", "--state", str(tmp_path)),
        *("--json", str(tmp_path / "m.json"), QUICK),
    ]
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False, timeout=60
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (3, "")
    assert _column(tmp_path / "m.json")["problems"]
