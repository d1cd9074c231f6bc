"""Host programs that the lab uses, with the Debian package that brings each."""

import ctypes
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Sequence

from kvmnest.lab.errors import LabSetupError

_PR_SET_PDEATHSIG = 1

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


def die_with_parent() -> Callable[[], None]:
    """For the child before exec: the kernel kills it when the thread that started it ends."""
    libc = ctypes.CDLL(None)
    parent = os.getpid()

    def setup() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)

    return setup


def run(
    argv: Sequence[str], doing: str, limit: float | None = None
) -> subprocess.CompletedProcess[bytes]:
    """Run a program to its end, or at most ``limit`` seconds; it ends with this process.

    Raises LabSetupError with its last line if it fails.
    """
    command = [find(argv[0]), *argv[1:]]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            timeout=limit,
            preexec_fn=die_with_parent(),
        )
    except subprocess.TimeoutExpired as e:
        raise LabSetupError(f"{doing} did not end within {limit:.0f} s") from e
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
        raise LabSetupError(f"{doing} failed: {lines[-1]}")
    return done
