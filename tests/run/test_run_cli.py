"""The command line as a user meets it: exit codes, one line for an error, no traceback."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import kvmnest
from kvmnest.host import why_not_kvm

ROOT = str(Path(__file__).resolve().parents[2])


def kvmnest_run(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "kvmnest", *arguments],
        env={**os.environ, "PYTHONPATH": ROOT},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        **options,
    )


def assert_one_line(done, code, text):
    assert done.returncode == code, done.stderr
    assert text in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_help_lists_every_verb():
    done = kvmnest_run("--help")
    assert done.returncode == 0
    for verb in ("run", "lab"):
        assert f"\n    {verb} " in done.stdout


def test_help_of_run_names_the_exit_codes():
    done = kvmnest_run("run", "--help")
    assert done.returncode == 0
    assert "exit codes: 0 all passed or known" in done.stdout


def test_version():
    assert kvmnest_run("--version").stdout == f"kvmnest {kvmnest.__version__}\n"


@pytest.mark.parametrize("arguments", [(), ("nonsense",), ("run", "--target", "moon")])
def test_usage_errors_of_the_parser(arguments):
    done = kvmnest_run(*arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("no_such_file.py",), "no such case, file or directory: no_such_file.py"),
        (("test_no_such.py::test_a",), "no such case, file or directory"),
        (("--target", "kvm", "--kernel", "6.1"), "--kernel needs --target lab"),
        (("--target", "kvm", "--kvm-param", "ept=0"), "--kvm-param needs --target lab"),
        (("--budget", "0"), "--budget: must be a number of seconds above 0, not 0"),
        (("--kvm-param", "ept"), "expected NAME=VALUE"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, text):
    assert_one_line(kvmnest_run("run", *arguments), 2, text)


def test_target_kvm_without_vmx_says_why():
    reason = why_not_kvm()
    if not reason:
        pytest.skip("this machine's /dev/kvm offers VMX")
    assert_one_line(kvmnest_run("run", "--target", "kvm"), 3, reason)


def test_a_closed_pipe_is_quiet():
    read, write = os.pipe()
    os.close(read)
    process = subprocess.Popen(
        [sys.executable, "-m", "kvmnest", "run", "--help"],
        env={**os.environ, "PYTHONPATH": ROOT},
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(write)
    _, errors = process.communicate(timeout=60)
    assert errors == ""
    assert process.returncode != -signal.SIGPIPE
