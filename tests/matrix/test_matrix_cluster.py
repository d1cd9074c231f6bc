"""kvmnest matrix --scheduler: a real Dask scheduler, real workers, one of them killed."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvmnest.cli.main import main

pytest.importorskip("distributed", reason="pip install 'kvmnest[matrix]'")

SETTINGS = ("ept=0", "vpid=0")
QUICK = "test_vmxon.py"


@contextmanager
def process(*arguments, env=None, log):
    with (
        open(log, "wb") as file,
        subprocess.Popen(
            [sys.executable, "-m", *arguments],
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(env or {})},
            start_new_session=True,
        ) as started,
    ):
        try:
            yield started
        finally:
            started.kill()


@contextmanager
def scheduler(folder):
    place = folder / "scheduler.json"
    with process(
        *("dask", "scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard"),
        *("--scheduler-file", str(place)),
        log=folder / "scheduler.log",
    ):
        wait(place.is_file)
        wait(lambda: place.read_text().endswith("}"))
        yield json.loads(place.read_text())["address"]


def worker(folder, address, name, env=None):
    return process(
        *("dask", "worker", address, "--nthreads", "1", "--no-nanny", "--no-dashboard"),
        *("--host", "127.0.0.1", "--name", name, "--local-directory", str(folder / name)),
        env=env,
        log=folder / f"{name}.log",
    )


def wait(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


def emulators(parent):
    """Pids of the emulators that a process started."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, rest = stat.read_text().rpartition(")")[::2]
        except OSError:
            continue
        if "(bochs" in name and int(rest.split()[1]) == parent:
            found.append(int(stat.parent.name))
    return found


def lab_runs(parent):
    """Pids of emulators that go on: not one that is only asked what it can do."""
    before = emulators(parent)
    time.sleep(1)
    return [pid for pid in emulators(parent) if pid in before]


def test_a_worker_dies_in_the_middle(prepared, tmp_path):
    """SIGKILL while its lab runs: the other one takes over, every cell is complete."""
    state, out = tmp_path / "state", tmp_path / "m.json"
    command = [
        *(sys.executable, "-m", "kvmnest", "matrix", QUICK, "--kernels", "6.1"),
        *(word for setting in SETTINGS for word in ("--setting", setting)),
        *("--state", str(state), "--json", str(out)),
    ]
    with (
        scheduler(tmp_path) as address,
        worker(tmp_path, address, "one") as one,
        worker(tmp_path, address, "two") as two,
    ):
        with subprocess.Popen(
            [*command, "--scheduler", address],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as matrix:
            wait(lambda: lab_runs(one.pid) or matrix.poll() is not None)
            orphans = emulators(one.pid)
            assert orphans
            one.send_signal(signal.SIGKILL)
            printed, errors = matrix.communicate(timeout=120)
        assert two.poll() is None
    assert (matrix.returncode, errors) == (0, ""), printed
    columns = json.loads(out.read_text())["columns"]
    assert list(columns) == ["6.1", *(f"6.1 {setting}" for setting in SETTINGS)]
    for document in columns.values():
        assert document["complete"]
        assert document["problems"] == []
        assert len(document["cases"]) == document["planned"] > 10
    # Nothing of the dead worker stays, and nothing is run again.
    wait(lambda: not any(Path(f"/proc/{pid}").exists() for pid in orphans), 10)
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert again.stdout.count("had been run") == 3


def test_interrupted(tmp_path):
    """Ctrl-C: 130, and the worker's lab ends long before all cases ran: it is free for others."""
    with (
        scheduler(tmp_path) as address,
        worker(tmp_path, address, "one") as one,
        subprocess.Popen(
            [
                *(sys.executable, "-m", "kvmnest", "matrix"),
                *("--kernels", "6.1", "--state", str(tmp_path / "state"), "--scheduler", address),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as matrix,
    ):
        wait(lambda: lab_runs(one.pid) or matrix.poll() is not None)
        matrix.send_signal(signal.SIGINT)
        _, errors = matrix.communicate(timeout=60)
        assert (matrix.returncode, errors) == (130, "kvmnest: interrupted\n")
        wait(lambda: not emulators(one.pid), 30)
        assert one.poll() is None


def test_workers_that_cannot(tmp_path, capsys):
    """One without bochs is named; with no other one nothing is started."""
    nowhere = {"PATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}  # none built either
    with scheduler(tmp_path) as address, worker(tmp_path, address, "one", env=nowhere):
        arguments = ["matrix", QUICK, "--kernels", "6.1", "--state", str(tmp_path / "state")]
        assert main([*arguments, "--scheduler", address]) == 3
    captured = capsys.readouterr()
    assert "is not used: bochs" in captured.out
    assert captured.err.startswith(f"kvmnest: no worker of {address} can run cases: bochs")
    assert captured.err.count("\n") == 1


def test_another_kvmnest_is_not_used():
    """Results of another suite must not get into the table."""
    from kvmnest.lab.emulators import BOCHS
    from kvmnest.matrix.cell import Cell, Job
    from kvmnest.matrix.cluster import look, unfit, work
    from kvmnest.run.suite_state import suite_state

    assert unfit(look(BOCHS), suite_state()) == ""
    assert "is not the same as this one" in unfit(look(BOCHS), "0123456789abcdef")
    document = work(Job(Cell("6.1"), (QUICK,), "", BOCHS, suite="0123456789abcdef"))
    assert not document["complete"]
    assert "another kvmnest" in document["problems"][0]


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:9", "nonsense://x", "tcp://[", ""])
def test_no_scheduler_there(address, tmp_path, capsys):
    arguments = ["matrix", QUICK, "--kernels", "6.1", "--state", str(tmp_path)]
    assert main([*arguments, f"--scheduler={address}"]) in (2, 3)
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "scheduler" in error


def test_without_dask(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    arguments = ["matrix", QUICK, "--kernels", "6.1", "--state", str(tmp_path)]
    assert main([*arguments, "--scheduler", "tcp://127.0.0.1:9"]) == 3
    assert "pip install 'kvmnest[matrix]'" in capsys.readouterr().err
