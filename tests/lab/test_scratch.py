"""Folders in the temporary directory: none stays, however the process ends."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvmnest import scratch

# As a run with two labs is: each has a folder, in a thread that nobody waits for.
_TWO = r"""
import os, threading, time
from kvmnest import scratch

def work():
    with scratch.folder() as folder:
        open(folder + "/memory.img", "w").write("x")
        os.write(1, b"made\n")
        time.sleep(600)

for _ in range(2):
    threading.Thread(target=work, daemon=True).start()
try:
    time.sleep(600)
finally:
    print("ending", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> subprocess.Popen[str]:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    process = subprocess.Popen(
        [sys.executable, "-c", _TWO],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)] == ["made\n"] * 2
    return process


def test_two_interrupts(two: subprocess.Popen[str], tmp_path: Path) -> None:
    assert len(list(tmp_path.iterdir())) == 2
    two.send_signal(signal.SIGINT)
    assert two.stdout is not None
    assert two.stdout.readline() == "ending\n"
    two.send_signal(signal.SIGINT)
    assert two.wait(30) != 0
    assert list(tmp_path.iterdir()) == []


def test_a_kill(two: subprocess.Popen[str], tmp_path: Path) -> None:
    """No process can do anything at its own; the next one does."""
    two.kill()
    two.wait()
    assert len(list(tmp_path.iterdir())) == 2
    with scratch.folder() as folder:
        assert list(tmp_path.iterdir()) == [Path(folder)]
    assert list(tmp_path.iterdir()) == []


def test_a_kill_before_the_folder_had_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    old, new = tmp_path / f".{scratch.PREFIX}old", tmp_path / f".{scratch.PREFIX}new"
    for place in (old, new):
        place.mkdir()
        (place / "lock").touch()
    os.utime(old, (time.time() - 3600,) * 2)
    with scratch.folder():
        assert not old.exists()
        assert new.exists()  # somebody makes it now


def test_what_is_being_worked_with_stays(two: subprocess.Popen[str], tmp_path: Path) -> None:
    before = set(tmp_path.iterdir())
    with scratch.folder() as folder:
        assert set(tmp_path.iterdir()) == {*before, Path(folder)}
    assert set(tmp_path.iterdir()) == before
    two.kill()
    two.wait()


def test_a_kill_where_the_folder_is_in_another_place(tmp_path: Path) -> None:
    """As a build of modules has its tree in the cache, which has more room."""
    place = tmp_path / "cache"
    place.mkdir()
    code = f"""
import os, signal
from pathlib import Path
from kvmnest import scratch
with scratch.folder(Path({str(place)!r})):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", code], check=False)
    (left,) = place.iterdir()
    with scratch.folder(place) as folder:
        assert list(place.iterdir()) == [Path(folder)] != [left]
    assert list(place.iterdir()) == []


def test_no_other_folder_is_made() -> None:
    """One made with tempfile would stay after a kill; the cache has its own way to sweep."""
    package = Path(scratch.__file__).parent
    made = re.compile(r"TemporaryDirectory\(|mkdtemp\(")
    found = {
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if made.search(path.read_text(encoding="utf-8"))
    }
    # The documentation is made from a checkout; lab/compiling.py has it in a child of its own.
    assert found == {
        *("scratch.py", "lab/cache.py", "lab/compiling.py"),
        "docs/extension/transcripts.py",
    }
