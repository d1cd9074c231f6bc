"""Kernels that the lab cannot boot: one line that names the file and says what is wrong."""

import io
import lzma
import shutil
import struct
import subprocess
import tarfile
from pathlib import Path

import pytest

from kvmnest.cli.main import main
from kvmnest.lab import kernels, modules
from kvmnest.lab.errors import KernelSpecError

# What the user's cache holds would be told beside.
pytestmark = pytest.mark.usefixtures("own_cache")


def said(capsys: pytest.CaptureFixture[str], spec: Path) -> str:
    assert main(["lab", "run", "--kernel", str(spec), "--", "true"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert "Traceback" not in error
    return error


def tree(folder: Path, content: bytes, name: str = "vmlinux") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return folder


def deb(folder: Path, files: dict[str, bytes]) -> Path:
    """A Debian package as dpkg-deb makes it."""
    root = folder / "root"
    control = "Package: x\nVersion: 1\nArchitecture: all\nMaintainer: x <x@x>\nDescription: x\n"
    for name, content in {"DEBIAN/control": control.encode(), **files}.items():
        tree(root, content, name)
    path = folder / "x.deb"
    command = ["dpkg-deb", "--root-owner-group", "-b", str(root), str(path)]
    subprocess.run(command, check=True, capture_output=True)
    return path


def elf(machine: int, bits: int) -> bytes:
    """An ELF header without anything behind it."""
    head = b"\x7fELF" + bytes([bits // 32, 1, 1]) + bytes(9)
    return head + struct.pack("<HHI", 2, machine, 1) + bytes(200)


def test_no_kernel(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "holds no bzImage" in said(capsys, tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"#!/bin/sh\n" * 100, id="script"),
        pytest.param(elf(0xB7, 64), id="arm64"),
        pytest.param(elf(3, 32), id="i386"),
        pytest.param(b"MZ\x40\xfa" + bytes(52) + b"ARMd" + bytes(1000), id="arm64-Image"),
    ],
)
def test_no_x86_64_kernel(
    content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert str(tmp_path / "vmlinux") in said(capsys, tree(tmp_path, content))


def test_a_package_that_is_no_kernel(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = deb(tmp_path, {"usr/share/doc/x": b"x"})
    error = said(capsys, path)
    assert str(path) in error
    assert "holds no bzImage" in error


def test_a_truncated_package(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = deb(tmp_path, {"usr/share/doc/x": bytes(100_000)})
    path.write_bytes(path.read_bytes()[:-200])
    assert "not a usable Debian package" in said(capsys, path)


def test_a_kernel_without_kvm_intel(
    package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The very kernel of the lab, its module left out."""
    shutil.copytree(package, tmp_path / "package", ignore=shutil.ignore_patterns("kvm-intel.ko*"))
    assert "kvm_intel" in said(capsys, tmp_path / "package")


def test_modules_are_looked_at_before_a_kernel_is_fetched(
    own_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The cache is empty, so even the lists of packages would be."""
    for folder, why in ((tmp_path / "none", "no such directory"), (tmp_path, "has no kvm.ko")):
        words = ["--kernel", "6.1", "--kvm-modules", str(folder)]
        assert main(["lab", "run", *words, "--", "true"]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert why in error
    assert not (own_cache / "archive").exists()


def test_modules_of_a_truncated_file(tmp_path: Path) -> None:
    """A file that begins as a tar archive is not a package either."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w"):
        pass
    path = tmp_path / "x.deb"
    path.write_bytes(buffer.getvalue())
    with pytest.raises(KernelSpecError, match="not a usable Debian package"):
        kernels.resolve(str(path))


def test_a_corrupt_module_is_named(tmp_path: Path) -> None:
    module = tmp_path / "kvm.ko.xz"
    module.write_bytes(lzma.compress(b"x" * 9999)[:-20])
    with pytest.raises(KernelSpecError, match=r"kvm\.ko\.xz: "):
        modules.read(module)
