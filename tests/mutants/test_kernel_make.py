"""make as the build runs it: what it says in one line, and nothing of it stays after Ctrl-C."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kvmnest.kernel import build
from kvmnest.kernel.source import KernelSource
from kvmnest.lab.errors import LabSetupError

RELEASE = "7.3.4+deb13-amd64"


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> KernelSource:
    """A kernel whose source is a file, and a ``make`` in PATH that the test writes."""
    tree = tmp_path / "shipped"
    (tree / "arch/x86/kvm").mkdir(parents=True)
    (tree / "virt/kvm").mkdir(parents=True)
    (tree / "arch/x86/kvm/Makefile").write_text("obj-m := kvm.o\n")
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found = KernelSource(RELEASE, "7.3.4-1", tmp_path, tree, "gcc", "key")
    monkeypatch.setattr("kvmnest.kernel.source.prepare", lambda release: found)
    return found


def make_is(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bin/make"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("said", "expected", "message"),
    [
        (
            "nested.c:7:1: error: no such thing\nmake: *** Error 1",
            build.BuildError,
            "building KVM failed: nested.c:7:1: error: no such thing",
        ),
        (
            "/tmp/cc1.s: No space left on device\nmake: *** Error 1",
            LabSetupError,
            "no space left on the disk while building kernel modules",
        ),
        ("", build.BuildError, "building KVM failed: no message"),
    ],
)
def test_one_line_of_what_make_says(
    tmp_path: Path, kernel: KernelSource, said: str, expected: type[Exception], message: str
) -> None:
    make_is(tmp_path, f"printf '{said}' >&2; exit 2")
    with pytest.raises(expected) as caught:
        build.build_modules([], RELEASE)
    assert str(caught.value) == message
    assert list((tmp_path / "cache/kvmnest/kvm-trees").iterdir()) == []


@pytest.mark.parametrize(
    ("version", "hint"),
    [
        ("VERSION = 6\nPATCHLEVEL = 12\nSUBLEVEL = 3\n", "(the source is 6.12, the kernel 7.3.4+"),
        ("VERSION = 7\nPATCHLEVEL = 30\n", "(the source is 7.30, the kernel 7.3.4+"),
        ("VERSION = 7\nPATCHLEVEL = 3\n", ""),
        ("all:\n", ""),
        (None, ""),
    ],
)
def test_a_source_of_another_version_is_named(
    tmp_path: Path, kernel: KernelSource, version: str | None, hint: str
) -> None:
    make_is(tmp_path, "exit 0")
    tree = tmp_path / "mine"
    (tree / "arch/x86/kvm").mkdir(parents=True)
    (tree / "arch/x86/kvm/Makefile").touch()
    if version is not None:
        (tree / "Makefile").write_text(version)
    base = build._base(kernel)
    assert base.is_dir()
    make_is(tmp_path, "echo 'x.c:1: error: y' >&2; exit 2")
    with pytest.raises(build.BuildError) as caught:
        build.build_tree(tree, RELEASE, tmp_path / "out")
    assert str(caught.value).startswith("building KVM failed: x.c:1: error: y")
    assert str(caught.value).endswith(": name a nearer one with --kernel)" if hint else "error: y")
    assert hint in str(caught.value)


CHILD = """
import sys
from pathlib import Path
from kvmnest.kernel import build, source
folder = Path(sys.argv[1])
found = source.KernelSource("7.3", "7.3", folder, folder / "shipped", "gcc", "key")
source.prepare = lambda release: found
build.build_modules([], "7.3")
"""


def test_nothing_of_make_runs_on_after_ctrl_c(tmp_path: Path, kernel: KernelSource) -> None:
    make_is(tmp_path, f"cd {tmp_path}; sleep 300 & echo $! > pid.new; mv pid.new pid; wait")
    child = subprocess.Popen([sys.executable, "-c", CHILD, tmp_path], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 30
    while not (tmp_path / "pid").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    compiler = int((tmp_path / "pid").read_text())
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=30)
    assert errors.rstrip().endswith(b"KeyboardInterrupt")
    deadline = time.monotonic() + 10
    while _runs(compiler) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _runs(compiler)
    assert list((tmp_path / "cache/kvmnest/kvm-trees").iterdir()) == []


def test_builds_of_other_threads_can_be_ended(tmp_path: Path, kernel: KernelSource) -> None:
    make_is(tmp_path, f"cd {tmp_path}; sleep 300 & echo $! > pid.new; mv pid.new pid; wait")
    with ThreadPoolExecutor() as pool:
        running = pool.submit(build.build_modules, [], RELEASE)
        deadline = time.monotonic() + 30
        while not (tmp_path / "pid").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        build.end_builds()
        assert isinstance(running.exception(timeout=30), build.BuildError)
    assert not _runs(int((tmp_path / "pid").read_text()))


def _runs(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"
