"""Kernels as .deb files: whole, in parts, in a folder; what is said if a part is missing."""

import subprocess
from pathlib import Path

import pytest

from kvmnest.cli.main import main
from kvmnest.lab import apts, kernels, packages
from kvmnest.lab.errors import KernelSpecError

R = "7.3.4+deb13-cloud-amd64"
IMAGE, BINARY, MODULES = (f"linux-{kind}-{R}" for kind in ("image", "binary", "modules"))
DEPENDS = f"kmod, linux-base-{R} (= 1), {BINARY} (= 1), {MODULES} (= 1)"


def deb(
    folder: Path, name: str, depends: str = "", version: str = "1", files: Path | None = None
) -> Path:
    """A Debian package as dpkg-deb makes it, with the files of a folder."""
    root = folder / f".{name}"
    (root / "DEBIAN").mkdir(parents=True)
    if files is not None:
        subprocess.run(["cp", "-a", f"{files}/.", str(root)], check=True)
    fields = [f"Package: {name}", f"Version: {version}", "Architecture: amd64"]
    fields += [f"Depends: {depends}"] if depends else []
    fields += ["Maintainer: x <x@x>", "Description: x", ""]
    (root / "DEBIAN/control").write_text("\n".join(fields))
    path = folder / f"{name}_{version}_amd64.deb"
    command = ["dpkg-deb", "--root-owner-group", "-Zgzip", "-b", str(root), str(path)]
    subprocess.run(command, check=True, capture_output=True)
    return path


@pytest.mark.parametrize(
    ("present", "missing"),
    [
        ([IMAGE], [BINARY, MODULES]),
        ([BINARY], [MODULES]),
        ([MODULES], [BINARY]),
        ([IMAGE, BINARY], [MODULES]),
        ([IMAGE, MODULES], [BINARY]),
    ],
)
@pytest.mark.parametrize("as_folder", [False, True])
def test_half_of_a_kernel(
    present: list[str],
    missing: list[str],
    as_folder: bool,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    debs = [deb(tmp_path, name, DEPENDS if name == IMAGE else "kmod") for name in present]
    spec = str(tmp_path) if as_folder else ",".join(map(str, debs))
    assert main(["lab", "run", "--kernel", spec, "--", "true"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    verb = "is" if len(missing) == 1 else "are"
    assert f"{' and '.join(missing)} {verb} missing: give all its .deb files" in error


def test_parts_that_do_not_belong_together(tmp_path: Path) -> None:
    one, other = deb(tmp_path, BINARY), deb(tmp_path, MODULES, version="2")
    with pytest.raises(KernelSpecError, match="one kernel at a time"):
        packages.named(f"{one},{other}")
    with pytest.raises(KernelSpecError, match="one kernel at a time"):
        packages.inside(tmp_path)


def test_what_lies_beside_a_kernel(tmp_path: Path) -> None:
    """Headers and debug symbols, as a kernel's own build makes them, are left alone."""
    image = deb(tmp_path, "linux-image-7.3.4-mine")
    for name in ("linux-image-7.3.4-mine-dbg", "linux-headers-7.3.4-mine", "linux-libc-dev"):
        deb(tmp_path, name)
    assert packages.inside(tmp_path) == [image]


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("{0},{1}/none.deb", "none.deb: no such file"),
        ("{1}/kernel.tar,{0}", "must all be .deb files"),
        ("{1}/x", "x holds no package of a kernel"),
    ],
)
def test_other_files(
    spec: str, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x").mkdir()
    deb(tmp_path / "x", "linux-headers-7.3.4-mine")
    image = deb(tmp_path, "linux-image-7.3.4-mine")
    text = spec.format(image, tmp_path)
    assert main(["lab", "run", "--kernel", text, "--", "true"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert reason in error


def test_a_file_whose_name_has_a_comma(tmp_path: Path) -> None:
    image = deb(tmp_path, "linux-image-7.3.4-mine")
    moved = image.rename(tmp_path / "a,b.deb")
    assert packages.named(str(moved)) == [moved]


@pytest.mark.parametrize("as_folder", [False, True])
def test_a_kernel_in_parts(as_folder: bool, tmp_path: Path) -> None:
    """The newest kernel of the archive, as the files that its packages are."""
    from kvmnest.lab import debian

    known = {release: apt for apt in reversed(apts.every()) for release in apt.offers}
    release = debian.match("newest", known)
    assert release is not None
    debs = []
    for number, package in enumerate(known[release].offers[release].packages):
        (tmp_path / str(number)).mkdir()
        found = known[release].download_package(package, tmp_path / str(number))
        debs.append(found.rename(tmp_path / found.name))
    assert len(debs) == 2
    spec = str(tmp_path) if as_folder else ",".join(map(str, debs))
    kernel = kernels.resolve(spec)
    assert kernel.release == release
    assert set(kernel.modules) >= {"kvm", "kvm_intel"}
    assert kernel.image().data


@pytest.mark.parametrize("release", ["5.9.16", "4.19.0-27-amd64", "2.6.39"])
def test_a_kernel_that_is_too_old(release: str, tmp_path: Path) -> None:
    with pytest.raises(KernelSpecError, match=rf"is Linux {release}; kvmnest needs .* 5\.10"):
        kernels._refuse_old(tmp_path / "bzImage", release)


@pytest.mark.parametrize("release", ["5.10.0-8-amd64", "6.1.0-56-cloud-amd64", "10.0", "unknown"])
def test_a_kernel_that_is_not_too_old(release: str, tmp_path: Path) -> None:
    kernels._refuse_old(tmp_path / "bzImage", release)
