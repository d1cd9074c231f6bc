"""The lab on disks that are too small: a real tmpfs, where this process may mount one."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvmnest.lab import cache
from kvmnest.lab.machine import Lab

_GUEST = ["python3", "-c", "import os; print(os.path.exists('/dev/kvm'))"]

Mount = Callable[[int], Path]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Mount]:
    """Mounts a disk of so many KiB."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(size: int) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(place)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"cannot mount a tmpfs: {done.stderr.strip()}")
        return place

    yield mount
    subprocess.run(["umount", "-q", str(place)], check=False)


def test_a_cache_on_a_disk_of_1_mib(disk: Mount) -> None:
    """Neither apt nor a boot goes on without an end: it says how much is needed and where."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(disk(1024))}
    done = subprocess.run(
        [sys.executable, "-m", "kvmnest", "run", "--target", "lab", "-j1", "test_smm.py"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 3, done.stderr
    *progress, last = done.stderr.splitlines()
    assert " MiB free" in last
    assert " needs " in last
    assert last.endswith(" MiB (XDG_CACHE_HOME names another place)")
    assert any("package lists need 300 MiB" in line for line in progress)
    assert all(line.startswith("kvmnest: ") for line in progress)


def test_a_cache_that_lacks_room_for_snapshots_only(
    disk: Mount, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The guest that was to be saved runs on, and nothing half of it is left."""
    lab = Lab()
    real = cache.root()
    used = ("boot", "debian", "kvmnest", "modules", "python", "site")
    wanted = [real / kind for kind in used] + [lab.kernel.folder, *real.glob("bochs/*")]
    sizes = [f.stat().st_size for path in wanted for f in path.rglob("*") if f.is_file()]
    room = sum(size // 4096 * 4 + 8 for size in sizes) + 1024
    place = disk(room + 10 * 1024)
    for path in wanted:
        shutil.copytree(path, place / "kvmnest" / path.relative_to(real), symlinks=True)
    without = shutil.ignore_patterns("state", "cache")
    shutil.copytree(real / "archive", place / "kvmnest/archive", ignore=without)
    monkeypatch.setenv("XDG_CACHE_HOME", str(place))
    cache._seen_whole.clear()
    seen: list[bytes] = []
    assert Lab().run(_GUEST, on_output=seen.append) == 0
    assert b"".join(seen) == b"True\n"
    first, *others = capfd.readouterr().err.splitlines()
    assert first.startswith("kvmnest: the first boot of this kernel here")
    assert others
    for line in others:
        assert line.startswith("kvmnest: this boot is not kept: no space left on the disk: ")
        assert line.endswith(" needs 200 MiB (XDG_CACHE_HOME names another place)")
    assert [*(place / "kvmnest/booted").iterdir()] == []
    assert shutil.disk_usage(place).free > 5 << 20
