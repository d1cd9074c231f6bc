"""Ctrl-C, kill and a time limit: the build ends with all it started, and the tree goes back."""

import os
import shlex
import signal
import subprocess
import sys
import time

import pytest

from kvmnest.bisect import command
from kvmnest.cli.main import main
from kvmnest.errors import HarnessError, UsageError

CASE = "test_vmxon.py"
# A build that starts a child which ignores SIGTERM, says who it is, and never ends.
SLOW = """
import os, signal, subprocess, sys, time
child = [sys.executable, "-c", "import signal, time; signal.signal(15, signal.SIG_IGN);"
         " print(1, flush=True); time.sleep(600)"]
process = subprocess.Popen(child, stdout=subprocess.PIPE)
process.stdout.read(1)
with open(sys.argv[1] + ".new", "w") as file:
    file.write(f"{os.getpid()} {process.pid}")
os.rename(sys.argv[1] + ".new", sys.argv[1])
time.sleep(600)
"""


def gone(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait_for(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def slow_build(tmp_path):
    script = tmp_path / "slow.py"
    script.write_text(SLOW)
    return f"{shlex.quote(sys.executable)} {script} {tmp_path}/pids", tmp_path / "pids"


def pids_of(path):
    return [int(word) for word in path.read_text().split()]


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 128 + signal.SIGTERM)]
)
def test_an_interrupted_build_of_an_end(history, tmp_path, git_call, number, code):
    build, pids = slow_build(tmp_path)
    words = ["bisect", "--git", str(history), "--case", CASE, "--build", build]
    process = subprocess.Popen(
        [sys.executable, "-m", "kvmnest", *words, "--good", "HEAD~15", "--bad", "HEAD"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_for(pids.exists)
    os.killpg(process.pid, number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == code
    assert f"interrupted: --continue goes on in {history}" in error
    assert "Traceback" not in error
    wait_for(lambda: all(gone(pid) for pid in pids_of(pids)))
    assert git_call(history, "symbolic-ref", "--short", "HEAD") == "topic"
    assert git_call(history, "status", "--porcelain") == ""


def test_the_interrupted_check_goes_on_where_it_was(history, git_call):
    from test_bisect_journal import asker, find

    asked = []

    def stopped():
        if len(asked) == 1:
            raise KeyboardInterrupt
        return asker(history, asked)()

    with pytest.raises(KeyboardInterrupt):
        find(history, stopped)
    assert asked == [0]
    assert git_call(history, "symbolic-ref", "--short", "HEAD") == "topic"
    found, _ = find(history, asker(history, asked), go_on=True)
    assert git_call(history, "log", "-1", "--format=%s", found.first_bad) == "change 11"
    assert len(asked) == len(set(asked))
    assert git_call(history, "symbolic-ref", "--short", "HEAD") == "topic"


def test_a_build_that_takes_too_long_is_skipped(history, tmp_path, capsys):
    build, pids = slow_build(tmp_path)
    words = ["bisect", "--git", str(history), "--case", CASE, "--build", build]
    code = main([*words, "--good", "HEAD~15", "--bad", "HEAD", "--build-limit", "3"])
    out, error = capsys.readouterr()
    assert code == 2
    assert "cannot be tested, expected good: build: did not end in 3 s" in error
    assert out.startswith("skip  ")
    assert ": build: did not end in 3 s" in out
    assert all(gone(pid) for pid in pids_of(pids))


def test_commands(tmp_path):
    python = [sys.executable, "-c"]
    assert command.run(["echo", "6.1"], tmp_path) == command.Done("", "6.1\n")
    told = "import sys; print('a.c:1: error: no type'); print('make: Error 2', file=sys.stderr)"
    assert command.run([*python, f"{told}; exit(1)"], tmp_path).why == "a.c:1: error: no type"
    assert command.run([*python, "exit(3)"], tmp_path).why == "exit status 3"
    killed = command.run([*python, "import os; os.kill(os.getpid(), 9)"], tmp_path)
    assert killed.why == "killed by SIGKILL"
    seen = command.run(
        [*python, "import os; print(os.environ['X'], os.getcwd())"],
        tmp_path,
        environment={"X": "y"},
    )
    assert seen.output == f"y {tmp_path}\n"
    with pytest.raises(UsageError, match="cannot run no-such-program"):
        command.run(["no-such-program"], tmp_path)
    with pytest.raises(HarnessError, match="no space left"):
        command.run(["cp", "/etc/passwd", "/dev/full"], tmp_path)
    for text in ("make 'x", "", "  "):
        with pytest.raises(UsageError, match="--build"):
            command.split(text, "--build")
