"""Build an optimised Bochs from Debian's source, once, into the cache.

Debian's own binary has a debugger built in and serves every x86-64 CPU; one without, for this very
CPU, runs the lab several times as fast. A build that was interrupted goes on where it stopped:
its tree stays until the program is in the cache.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvmnest import reading
from kvmnest.errors import KvmnestError
from kvmnest.lab import bochs_source, cache, tools
from kvmnest.lab.errors import LabSetupError
from kvmnest.schema import TEXT, by_name

KIND = "bochs"
_FORMAT = 1
_KEPT = 4
_ROOM = 100  # MiB on the disk that the lists of sources, the tree and the program take
_ROOM_LEFT = 2  # less is taken for full after a failure
_PATIENCE = 10.0  # seconds that compilers get to end when they are told to
_OPTIONS = (
    "--enable-x86-64", "--enable-long-phy-address", "--enable-vmx=2", "--enable-svm",
    "--enable-avx", "--enable-evex", "--enable-cet", "--enable-protection-keys", "--enable-uintr",
    "--enable-all-optimizations", "--enable-pci", "--disable-debugger", "--disable-debugger-gui",
    "--disable-plugins", "--disable-docbook", "--with-nogui",
)  # fmt: skip
_FLAGS = "-O2 -march=native"
_SMP = "--enable-smp"
_PROGRAMS = ("g++", "gcc", "make", "tar", "xz", "strip")

# Runs a program; when our end of its standard input is closed, since we were killed, all that the
# program started ends too. A make that is terminated removes what is half made.
_GUARD = """
import os, signal, subprocess, sys, threading, time
def watch():
    os.read(0, 1)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.killpg(0, signal.SIGTERM)
    time.sleep(5)
    os.killpg(0, signal.SIGKILL)
threading.Thread(target=watch, daemon=True).start()
os._exit(subprocess.call(sys.argv[1:], stdin=subprocess.DEVNULL))
"""

Line = Callable[[str], None]


class BuildFailed(LabSetupError):
    """Bochs does not compile here; the message names the log."""


@dataclass(frozen=True)
class Progress:
    """How far a build is.

    ``step`` in words, ``done`` of its ``total`` files (0: not counted), ``step_seconds`` since it
    began, ``seconds`` since the build began.
    """

    step: str
    done: int
    total: int
    step_seconds: float
    seconds: float


def key(smp: bool) -> str:
    """Name of the cache entry: the same for the same source, options and CPU of this machine."""
    return _key(smp, bochs_source.source().key)


def _key(smp: bool, source: str) -> str:
    options = [*_OPTIONS, *([_SMP] if smp else []), _FLAGS]
    return cache.digest([_FORMAT, source, *options, _host_cpu()])


def built(smp: bool = False) -> Path | None:
    """The program that was built for this CPU, with or without SMP; None if it was not."""
    return _program(key(smp))


def built_for_the_lab(smp: bool = False) -> Path | None:
    """The same, or one that has the repairs but not the additions."""
    return built(smp) or _program(_key(smp, bochs_source.source().key_for_the_lab))


def _program(name: str) -> Path | None:
    folder = cache.existing(KIND, name)
    program = folder / "bochs" if folder is not None else None
    return program if program is not None and program.is_file() else None


_NOTES = by_name(TEXT)


def notes(program: Path) -> dict[str, str]:
    """What is noted of a program built here: version, options, flags, compiler, seconds."""
    try:
        content = reading.data(program.parent / "notes.json")
        return dict(reading.value(content, "notes of a build", _NOTES, str(program)))
    except KvmnestError:
        return {}


def missing_tools() -> list[str]:
    """Debian packages that a build needs and this machine lacks."""
    return sorted({tools.package(name) for name in _PROGRAMS if not shutil.which(name)})


def build(
    smp: bool = False,
    on_line: Line = lambda _: None,
    on_progress: Callable[[Progress], None] = lambda _: None,
    jobs: int | None = None,
) -> Path:
    """Path of the program, built if it is not in the cache.

    Raises LabSetupError if a tool, the source or disk space is missing, BuildFailed if it does
    not compile. After an interruption the next call goes on.
    """
    ready = built(smp)
    if ready is not None:
        return ready
    if lacking := missing_tools():
        raise LabSetupError(f"building Bochs needs more tools: apt-get install {' '.join(lacking)}")
    try:
        with _only_builder(smp, on_line):
            ready = built(smp)  # another one may have been at it
            return ready or _Build(smp, on_line, on_progress, jobs).run()
    except OSError as error:
        raise LabSetupError(cache.describe(error, "building Bochs")) from error
    except LabSetupError as error:
        _check_room(_ROOM_LEFT, error)  # tar and apt tell something else last
        raise


def _check_room(least: int, cause: Exception | None = None) -> None:
    """Raise LabSetupError if the cache's disk has less than ``least`` MiB left."""
    free = shutil.disk_usage(cache.root()).free >> 20
    if free < least:
        raise LabSetupError(
            f"no space left on the disk: {cache.root()} has {free} MiB free, building Bochs needs"
            f" {_ROOM} MiB (XDG_CACHE_HOME names another place)"
        ) from cause


def log_file(smp: bool = False) -> Path:
    """Where the log of a build is while it runs, and after it failed."""
    return cache.root() / "bochs-build" / key(smp) / "build.log"


@contextlib.contextmanager
def _only_builder(smp: bool, on_line: Line) -> Iterator[None]:
    path = cache.root() / f"bochs-build-{key(smp)}.lock"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_line("another process builds this Bochs: waiting for it")
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


class _Build:
    """One build: each step leaves something behind that tells the next start it is done."""

    def __init__(
        self, smp: bool, on_line: Line, on_progress: Callable[[Progress], None], jobs: int | None
    ) -> None:
        self._key, self._smp = key(smp), smp
        self._on_line, self._on_progress = on_line, on_progress
        self._jobs = jobs or len(os.sched_getaffinity(0))
        self._source = bochs_source.source()
        self._folder = cache.root() / "bochs-build" / self._key
        self._log = self._folder / "build.log"
        self._began = time.monotonic()

    def run(self) -> Path:
        """All steps; the program's path."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _remove_others(self._folder)
        tree = self._folder / "tree"
        if not tree.is_dir():
            _check_room(_ROOM)
            tarball = self._folder / self._source.tarball
            if not tarball.is_file():
                self._on_line(f"fetching {tarball.name} (4 MB)")
                bochs_source.fetch(self._source, tarball)
            try:
                bochs_source.unpack(tarball, self._source, tree)
            except LabSetupError:
                tarball.unlink()  # it may have been damaged since it was fetched
                raise
        else:
            self._on_line("going on with the build that was interrupted")
        self._compile(tree, _FLAGS)
        self._run(["strip", "bochs"], tree, "stripping")
        version = tools.run([str(tree / "bochs"), "--help"], "the Bochs that was built")
        if b"Bochs" not in version.stdout + version.stderr:
            raise BuildFailed(f"the Bochs that was built does not run (log: {self._log})")
        folder = cache.entry(KIND, self._key, lambda to: self._keep(tree, to), keep=_KEPT)
        shutil.rmtree(self._folder, ignore_errors=True)
        return folder / "bochs"

    def _keep(self, tree: Path, to: Path) -> None:
        shutil.copy2(tree / "bochs", to / "bochs")
        shutil.copy2(self._log, to / "build.log")
        told = {
            "version": self._source.version,
            "source": self._source.tarball,
            "options": " ".join(self._options()),
            "flags": _FLAGS,
            "compiler": _first_line(["g++", "--version"]),
            "cpu": _host_cpu().partition("\n")[0].partition(": ")[2],
            "repairs": str(len(self._source.repairs)),
            "seconds": f"{time.monotonic() - self._began:.0f}",
        }
        (to / "notes.json").write_text(json.dumps(told, indent=1))

    def _options(self) -> list[str]:
        return [*_OPTIONS, *([_SMP] if self._smp else [])]

    def _compile(self, tree: Path, flags: str) -> None:
        if not (tree / "configured").is_file():
            self._run(
                ["./configure", *self._options()],
                tree,
                "configuring",
                {"CFLAGS": flags, "CXXFLAGS": flags},
            )
            (tree / "configured").touch()
        left = self._files_left(tree)
        self._run(["make", f"-j{self._jobs}", "bochs"], tree, "compiling", total=left)

    @staticmethod
    def _files_left(tree: Path) -> int:
        """How many files make will compile."""
        argv = ["make", "-n", "bochs"]
        done = subprocess.run(argv, cwd=tree, env=_environment(), capture_output=True, check=False)
        return sum(map(_compiles, done.stdout.decode(errors="replace").splitlines()))

    def _run(
        self,
        argv: Sequence[str],
        tree: Path,
        step: str,
        environment: Mapping[str, str] | None = None,
        total: int = 0,
    ) -> None:
        """Run a program of the build, its output in the log. Raises BuildFailed."""
        done, began = 0, time.monotonic()

        def tell() -> None:
            now = time.monotonic()
            at = Progress(step, min(done, total), total, now - began, now - self._began)
            self._on_progress(at)

        tell()
        with open(self._log, "ab") as log:
            log.write(f"$ {' '.join(argv)}\n".encode())
            log.flush()
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _GUARD, *argv],
                cwd=tree,
                env=_environment() | dict(environment or {}),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            assert process.stdout is not None
            assert process.stdin is not None
            try:
                for line in process.stdout:
                    log.write(line)
                    if _compiles(line.decode(errors="replace")):
                        done += 1
                        tell()
                status = process.wait()
            except BaseException:
                _end(process)
                raise
            finally:
                process.stdin.close()
                process.stdout.close()
        if status:
            raise BuildFailed(f"{step} of Bochs failed: {self._reason(status)} (log: {self._log})")

    def _reason(self, status: int) -> str:
        lines = self._log.read_text(errors="replace").splitlines()[-200:]
        if any("No space left on device" in line for line in lines):
            return "no space left on the disk"
        errors = [line for line in lines if re.search(r"\berror:|\bError \d|\*\*\*", line)]
        return errors[0].strip() if errors else f"status {status}"


def _compiles(line: str) -> bool:
    """Whether make runs a compiler with this line."""
    return bool(re.match(r"(g\+\+|gcc) .*-c ", line))


def _remove_others(folder: Path) -> None:
    """Remove the trees of builds that are of no use any more; one that runs is locked."""
    for other in folder.parent.iterdir():
        if other == folder:
            continue
        lock = cache.root() / f"bochs-build-{other.name}.lock"
        with contextlib.suppress(OSError), open(lock, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(other, ignore_errors=True)


def _environment() -> dict[str, str]:
    return {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C", "HOME": "/"}


def _end(process: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_PATIENCE)
            return


def _first_line(argv: Sequence[str]) -> str:
    done = tools.run(argv, argv[0])
    return done.stdout.decode(errors="replace").partition("\n")[0]


def _host_cpu() -> str:
    """Model and features of this machine's CPU, which the compiler is told to use."""
    with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
        first = file.read().partition("\n\n")[0].splitlines(keepends=True)
    return "".join(line for line in first if line.startswith(("model name", "flags")))
