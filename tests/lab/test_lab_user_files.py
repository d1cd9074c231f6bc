"""Files that users name as kernels and sources, and that are none: one line, exit code 2."""

import os
from pathlib import Path

import pytest

from kvmnest.cli.main import main


def junk(path: Path) -> None:
    path.write_bytes(b"\xff\xfejunk\x00\n" * 99)


def large(path: Path) -> None:
    path.touch()
    os.truncate(path, 64 << 30)


def fifo(path: Path) -> None:
    os.mkfifo(path)


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def empty(path: Path) -> None:
    path.touch()


@pytest.mark.parametrize("damage", [junk, large, fifo, loop, empty], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", ["bzImage", "modules.builtin", "kvm.ko"])
def test_a_kernel_folder(
    name: str,
    damage: object,
    package: Path,
    tmp_path: Path,
    own_cache: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A damaged kernel is refused; what is only a list or a module may also be left out."""
    assert callable(damage)
    folder = tmp_path / "kernel"
    (folder / "lib/modules/6.1").mkdir(parents=True)
    (image,) = (package / "boot").glob("vmlinuz-*")
    (folder / "bzImage").write_bytes(image.read_bytes())
    inside = "bzImage" if name == "bzImage" else f"lib/modules/6.1/{name}"
    (folder / inside).unlink(missing_ok=True)
    damage(folder / inside)
    assert main(["lab", "run", "--kernel", str(folder), "--", "true"]) in (2, 3)
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert str(folder) in told or name != "bzImage"
    assert "a defect" not in told


@pytest.mark.parametrize("to", ["/proc/x", "/dev/null/x", "x" * 300])
def test_a_build_into_no_folder(
    to: str, tmp_path: Path, own_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Found before a kernel and its sources are fetched."""
    (tmp_path / "arch/x86/kvm").mkdir(parents=True)
    (tmp_path / "arch/x86/kvm/Makefile").touch()
    assert main(["build", str(tmp_path), to]) == 2
    told = capsys.readouterr().err
    assert told.startswith("kvmnest: cannot write ")
    assert told.count("\n") == 1
    assert not (own_cache / "archive").exists()


def test_a_build_of_no_source(
    tmp_path: Path, own_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["build", str(tmp_path), str(tmp_path / "to")]) == 2
    assert "is not a kernel source: it has no arch/x86/kvm" in capsys.readouterr().err
    assert not (own_cache / "archive").exists()
    assert not (tmp_path / "to").exists()
