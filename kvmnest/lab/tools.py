"""Host programs that the lab uses, with the Debian package that brings each."""

import shutil
import subprocess
from collections.abc import Sequence

from kvmnest.lab.errors import LabSetupError

_PACKAGES = {
    "bochs": "bochs bochs-term",
    "qemu-system-x86_64": "qemu-system-x86",
    "strip": "binutils",
    "objcopy": "binutils",
    "as": "binutils",
    "ld": "binutils",
    "dpkg-deb": "dpkg",
    "apt-get": "apt",
    "apt-cache": "apt",
    "zstd": "zstd",
    "gcc": "gcc",
    "g++": "g++",
    "make": "make",
    "tar": "tar",
    "xz": "xz-utils",
}


def find(name: str) -> str:
    """Path of program ``name``. Raises LabSetupError naming the package to install."""
    found = shutil.which(name)
    if found is None:
        raise LabSetupError(f"{name} not found: apt-get install {package(name)}")
    return found


def package(name: str) -> str:
    """The Debian package that brings program ``name``."""
    return _PACKAGES.get(name, name)


def run(argv: Sequence[str], doing: str, **options: object) -> subprocess.CompletedProcess[bytes]:
    """Run a program to its end; raises LabSetupError with its last line if it fails."""
    command = [find(argv[0]), *argv[1:]]
    done = subprocess.run(command, capture_output=True, check=False, **options)  # type: ignore[call-overload]
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
        raise LabSetupError(f"{doing} failed: {lines[-1]}")
    return done  # type: ignore[no-any-return]
