"""Host programs that the lab uses, with the Debian package that brings each."""

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

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


def start(
    argv: Sequence[str], setup: Callable[[], None] | None = None, **options: Any
) -> subprocess.Popen[bytes]:
    """Start a program that the kernel kills when the thread that started it ends.

    ``setup`` is called in the child before exec; ``options``: those of subprocess.Popen. A SIGINT
    or SIGTERM that arrives meanwhile is handled afterwards, and ends the program if its handler
    raises. Raises OSError if the program cannot be started.
    """
    libc = ctypes.CDLL(None)
    parent = os.getpid()

    def before_exec() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
        if setup is not None:
            setup()

    process: subprocess.Popen[bytes] | None = None
    try:
        with _signals_held():
            process = subprocess.Popen(argv, preexec_fn=before_exec, **options)
    except BaseException:
        if process is not None:
            process.kill()
            process.communicate()
        raise
    return process


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Call the handlers of SIGINT and SIGTERM after the block, for what arrives inside it.

    Popen with a preexec_fn runs the hooks of os.register_at_fork, logging's among them, and Python
    prints and drops what a handler raises there: one Ctrl-C in four was lost while a lab started.
    A signal mask would not do: another thread may take the signal, and the handler runs in the
    main thread all the same.
    """
    arrived: list[int] = []
    handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}
    if threading.current_thread() is threading.main_thread():  # no other thread runs handlers
        for number in map(int, (signal.SIGINT, signal.SIGTERM)):
            handler = signal.getsignal(number)
            if callable(handler):
                handlers[number] = handler
                signal.signal(number, lambda got, _: arrived.append(got))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    for number in dict.fromkeys(arrived):
        handlers[number](number, None)


def run(
    argv: Sequence[str], doing: str, limit: float | None = None
) -> subprocess.CompletedProcess[bytes]:
    """Run a program to its end, or at most ``limit`` seconds; it ends with this process.

    Raises LabSetupError with its last line if it fails.
    """
    try:
        done = complete(argv, limit=limit)
    except subprocess.TimeoutExpired as e:
        raise LabSetupError(f"{doing} did not end within {limit:.0f} s") from e
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
        raise LabSetupError(f"{doing} failed: {lines[-1]}")
    return done


def complete(
    argv: Sequence[str], cwd: Path | None = None, limit: float | None = None
) -> subprocess.CompletedProcess[bytes]:
    """Run a program in ``cwd`` to its end, whatever its status; it ends with this process.

    Raises LabSetupError if it is not installed, TimeoutExpired after ``limit`` seconds.
    """
    command = [find(argv[0]), *argv[1:]]
    pipe = subprocess.PIPE
    process = start(command, cwd=cwd, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe)
    try:
        out, errors = process.communicate(timeout=limit)
    except BaseException:
        process.kill()
        process.communicate()
        raise
    return subprocess.CompletedProcess(command, process.returncode, out, errors)
