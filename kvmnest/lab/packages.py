"""Kernels in .deb files that the user has: one file, or the parts of one kernel."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kvmnest.lab import debian
from kvmnest.lab.errors import KernelSpecError

_PART = re.compile(r"linux-(image|binary|modules)-(?:unsigned-)?(\d\S*?)(?:-unsigned)?$")
_DEBUG = ("-dbg", "-dbgsym")
_ADVICE = "give all its .deb files, joined by commas, or a folder of them"


@dataclass(frozen=True)
class _Package:
    """A .deb file, with what its control file says. ``kind`` is "" unless it names a kernel."""

    path: Path
    name: str
    version: str
    depends: str

    @property
    def kind(self) -> str:
        part = _PART.match(self.name)
        return part[1] if part and not self.name.endswith(_DEBUG) else ""

    @property
    def release(self) -> str:
        part = _PART.match(self.name)
        return part[2] if part else self.name


def named(spec: str) -> list[Path]:
    """The files of a SPEC ``A.deb`` or ``A.deb,B.deb``; none if it is no such SPEC.

    Raises KernelSpecError if one of them does not exist.
    """
    if not spec.endswith(".deb"):
        return []
    paths = [Path(spec)] if Path(spec).is_file() else [Path(name) for name in spec.split(",")]
    for path in paths:
        if path.suffix != ".deb":
            raise KernelSpecError(f"{path}: several files must all be .deb files")
        if not path.is_file():
            raise KernelSpecError(f"{path}: no such file")
    _require_whole([_read(path) for path in paths])
    return paths


def inside(folder: Path) -> list[Path]:
    """The files in a folder that make up a kernel; none if it holds no .deb file.

    Others, such as headers and debug symbols, may lie beside. Raises KernelSpecError if a part is
    missing, or if there are several kernels.
    """
    every = [_read(path) for path in sorted(folder.glob("*.deb")) if path.is_file()]
    if not every:
        return []
    packages = [package for package in every if package.kind]
    if not packages:
        raise KernelSpecError(f"{folder} holds no package of a kernel (linux-image-*.deb)")
    _require_whole(packages)
    return [package.path for package in packages]


def _read(path: Path) -> _Package:
    fields = debian.control(path)
    name, version = fields.get("Package", ""), fields.get("Version", "")
    return _Package(path, name, version, fields.get("Depends", ""))


def _require_whole(packages: Sequence[_Package]) -> None:
    """Raise KernelSpecError unless these are all parts of one kernel, of the same version."""
    first = packages[0]
    for package in packages[1:]:
        if package.release != first.release or package.version != first.version:
            raise KernelSpecError(
                f"{first.path} is {first.release} {first.version}, {package.path}"
                f" {package.release} {package.version}: one kernel at a time"
            )
    present = {package.name for package in packages}
    wanted = [name for package in packages for name, _ in debian.parts(package.depends)]
    kinds = {package.kind for package in packages}
    if "image" not in kinds and kinds & {"binary", "modules"}:
        wanted += [f"linux-{kind}-{first.release}" for kind in ("binary", "modules")]
    missing = [name for name in dict.fromkeys(wanted) if name not in present]
    if missing:
        files = ", ".join(str(package.path) for package in packages)
        raise KernelSpecError(
            f"{files}: only a part of kernel {first.release}; {' and '.join(missing)}"
            f" {'is' if len(missing) == 1 else 'are'} missing: {_ADVICE}"
        )
