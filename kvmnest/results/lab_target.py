"""The lab as a target: every process that runs cases gets a freshly booted kernel."""

from __future__ import annotations

import importlib.util
import json
import marshal
import os
import subprocess
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import kvmnest
from kvmnest.errors import HarnessError, UsageError
from kvmnest.lab import cache as lab_cache
from kvmnest.lab.errors import LabHang, LabLost, LabModuleError, LabPanic, LabRunError
from kvmnest.lab.guest import EVENTS_PATH
from kvmnest.lab.machine import Lab
from kvmnest.lab.rootfs import SITE
from kvmnest.results.targets import Ended, OnEvent

_TAIL = 16_384
_PYC_HEADER = 16
_USER_FILES = "/root/tests"

_COLLECT = (
    *("-p", "kvmnest.plugin", "-p", "no:cacheprovider", "-c", "/dev/null", "--rootdir", "/"),
    *("--collect-only", "-qq", "--pyargs", "kvmnest.suite"),
)


class LabTarget:
    """Boots the lab for each process; ``on_line`` gets lines for the user.

    Raises what Lab raises (no such kernel, no bochs, full disk...).
    """

    name = "lab"
    guest_clock = True

    def __init__(
        self,
        *,
        kernel: str | None = None,
        kvm_modules: Path | None = None,
        kvm_params: Mapping[str, str] | None = None,
        cpus: int = 1,
        bochs: str | None = None,
        patience: float = 120.0,
        on_line: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._lab = Lab(kernel, kvm_params, kvm_modules, cpus, bochs)
        self._patience = patience
        self._on_line = on_line
        self._files = _rewritten_suite()
        self._boots = 0

    def place(self, paths: Sequence[str]) -> list[str]:
        """Take test files along into the guest; return what they are called there."""
        placed = []
        for number, name in enumerate(paths):
            path, separator, rest = name.partition("::")
            host = Path(path).resolve()
            folder = f"{_USER_FILES}/{number}"
            base = host if host.is_dir() else host.parent
            found = sorted(base.rglob("*.py")) if host.is_dir() else [*_beside(host)]
            if not found:
                raise UsageError(f"{path} holds no Python file")
            for file in found:
                self._files[f"{folder}/{file.relative_to(base)}"] = file.read_bytes()
            inside = "" if host.is_dir() else f"/{host.name}"
            placed.append(f"{folder}{inside}{separator}{rest}")
        return placed

    def run(self, arguments: Sequence[str], on_event: OnEvent) -> Ended:
        """Boot and run; see ``kvmnest.results.targets.Target``."""
        tail = b""

        def take_line(line: bytes) -> None:
            if line:
                on_event(_parse(line))

        def take_output(data: bytes) -> None:
            nonlocal tail
            tail = (tail + data)[-_TAIL:]

        def take_kernel(data: bytes) -> None:
            on_event({"e": "kernel", "text": data.decode(errors="replace")})

        argv = ["python3", "-m", "pytest", *arguments, f"--kvmnest-events={EVENTS_PATH}"]
        self._on_line(f"booting {self._lab.kernel.release} in the lab")
        self._boots += 1
        try:
            status = self._lab.run(
                argv,
                on_event=take_line,
                on_output=take_output,
                on_kernel=take_kernel,
                idle_limit=self._patience,
                env={"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
                files=self._files,
            )
        except LabModuleError:
            raise
        except (LabPanic, LabHang, LabLost) as error:
            return Ended(None, str(error), tail.decode(errors="replace"))
        except LabRunError as error:
            if not self._lab.info:
                raise
            return Ended(None, str(error), tail.decode(errors="replace"))
        output = tail.decode(errors="replace")
        if status < 0:
            log = self._lab.kernel_log.decode(errors="replace")
            return Ended(None, f"killed by signal {-status} in the guest\n{log[-4096:]}", output)
        return Ended(status, output=output)

    @property
    def times(self) -> str:
        """Times of the last boot in one line."""
        times = self._lab.times
        return f"booted in {times.boot:.1f} s, first event after {times.first_event:.1f} s"


def _beside(file: Path) -> list[Path]:
    # A test file may import modules from its folder.
    return sorted(file.parent.glob("*.py"))


def _parse(line: bytes) -> dict[str, object]:
    try:
        event = json.loads(line)
    except ValueError as error:
        raise HarnessError(f"damaged event from the lab: {line[:200]!r}") from error
    if not isinstance(event, dict):
        raise HarnessError(f"damaged event from the lab: {line[:200]!r}")
    return event


def _rewritten_suite() -> dict[str, bytes]:
    """Modules with pytest's rewritten assert statements, as pytest caches them: path -> content.

    Rewriting is compiling, which takes the guest half a minute for the whole suite. So pytest
    collects the suite here once for each state of the sources, and the guest gets its cache.
    """
    base = Path(kvmnest.__file__).parent
    sources = sorted([*(base / "suite").rglob("*.py"), *(base / "plugin").rglob("*.py")])
    import pytest

    def build(folder: Path) -> None:
        environment = {
            **os.environ,
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            "PYTHONPYCACHEPREFIX": str(folder),
        }
        done = subprocess.run(
            [sys.executable, "-X", "no_debug_ranges", "-m", "pytest", *_COLLECT],
            capture_output=True,
            text=True,
            env=environment,
            stdin=subprocess.DEVNULL,
            check=False,
        )
        if done.returncode:
            said = (done.stdout + done.stderr).strip().splitlines()
            raise HarnessError(f"cannot collect the suite: {said[-1] if said else 'no output'}")
        for path in folder.rglob("*.pyc"):
            if "-pytest-" not in path.name:
                path.unlink()

    key = lab_cache.digest(
        [2, sys.version, pytest.__version__, base, *(p.read_bytes() for p in sources), *sources]
    )
    folder = lab_cache.entry("rewritten", key, build)
    # Below the prefix Python mirrors the sources' own absolute paths.
    mirrored = folder / base.relative_to("/")
    files = {}
    for source in sources:
        stem = Path(importlib.util.cache_from_source(source.name)).stem
        for path in (mirrored / source.parent.relative_to(base)).glob(f"{stem}-pytest-*.pyc"):
            inside = Path(f"/{SITE}/kvmnest") / source.relative_to(base)
            pyc = path.read_bytes()
            code = _renamed(marshal.loads(pyc[_PYC_HEADER:]), str(inside))
            content = pyc[:_PYC_HEADER] + marshal.dumps(code)
            files[str(inside.parent / "__pycache__" / path.name)] = content
    return files


def _renamed(code: types.CodeType, filename: str) -> types.CodeType:
    """The code with its file named as in the guest, where tracebacks look for source lines."""
    constants = tuple(
        _renamed(const, filename) if isinstance(const, types.CodeType) else const
        for const in code.co_consts
    )
    return code.replace(co_filename=filename, co_consts=constants)
