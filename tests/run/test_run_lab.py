"""``kvmnest run`` in the lab: the suite, a user's file, a kernel that dies in a case."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvmnest.lab import kernels

ROOT = str(Path(__file__).resolve().parents[2])


def run(folder, *arguments):
    done = subprocess.run(
        [sys.executable, "-m", "kvmnest", "run", "--target=lab", "--json=out.json", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": ROOT},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=560,
    )
    out = folder / "out.json"
    return done, json.loads(out.read_text()) if out.exists() else None


def test_cases_of_the_suite(tmp_path):
    done, document = run(tmp_path, "test_vmxon.py", "-k", "vmxoff")
    assert done.returncode == 0, done.stdout
    assert document["target"] == "lab"
    assert document["kernel"] == kernels.resolve("newest").release
    assert document["kvm_params"]["nested"] == "Y"
    assert document["summary"]["passed"] == len(document["cases"]) > 0
    assert all(case["series"] == 3 for case in document["cases"])
    assert "passed in " in done.stdout.splitlines()[-1]


def test_a_kernel_that_dies_costs_one_case(tmp_path):
    (tmp_path / "helper.py").write_text("ANSWER = 42\n")
    (tmp_path / "test_mine.py").write_text(
        "import pytest\n"
        "from helper import ANSWER\n"
        "def test_before(l1): assert l1.has_vmx and ANSWER == 42\n"
        "def test_panic():\n"
        "    open('/proc/sysrq-trigger', 'w').write('c')\n"
        "def test_after(l1): assert l1.has_vmx\n"
    )
    done, document = run(tmp_path, "test_mine.py")
    assert done.returncode == 3, done.stdout
    outcomes = {case["id"].rpartition("::")[2]: case["outcome"] for case in document["cases"]}
    assert outcomes == {"test_before": "passed", "test_panic": "error", "test_after": "passed"}
    panic = document["cases"][1]
    assert panic["summary"] == "crashed: the guest kernel panicked"
    assert "sysrq" in panic["detail"]
    assert document["complete"] is True
    assert "starting again for 1 cases" in done.stdout


def test_nothing_selected_boots_nothing(tmp_path):
    done, document = run(tmp_path, "-k", "no_such_case_at_all")
    assert done.returncode == 4
    assert document["cases"] == []
    assert "booting" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("-k", "not ("), "Wrong expression passed to '-k'"),
    ],
)
def test_a_wrong_selection_is_a_usage_error(tmp_path, arguments, text):
    done, document = run(tmp_path, *arguments)
    assert done.returncode == 2, done.stdout
    assert text in done.stdout
    assert "Traceback" not in done.stdout
    assert document is None


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_that_is_ended(tmp_path, number, code):
    """What ended is in the results, and what did not get its turn; the exit code is a shell's."""
    words = ["run", "--target=lab", "-j1", "--json=out.json"]  # all cases: it takes long
    process = subprocess.Popen(
        [sys.executable, "-m", "kvmnest", *words],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": ROOT},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    out = tmp_path / "out.json"
    end = time.monotonic() + 120
    while not (out.exists() and len(json.loads(out.read_text())["cases"]) > 2):
        assert time.monotonic() < end
        time.sleep(0.01)
    process.send_signal(number)
    assert process.wait(30) == code
    document = json.loads(out.read_text())
    assert document["finished"]
    assert document["not_run"]
    assert document["problems"] == ["interrupted"]
