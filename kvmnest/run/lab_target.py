"""The lab as a target: every process that runs cases gets a freshly booted kernel."""

from __future__ import annotations

import copy
import errno
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from kvmnest.cases.events import parse
from kvmnest.errors import UsageError
from kvmnest.lab import cache
from kvmnest.lab.emulators import BOCHS, Choice, Installed
from kvmnest.lab.errors import LabHang, LabLost, LabModuleError, LabPanic, LabRunError
from kvmnest.lab.guest import EVENTS_PATH
from kvmnest.lab.machine import Lab
from kvmnest.light.compiled import rewritten
from kvmnest.reports.model import Loss
from kvmnest.run.collect import Collected, collect
from kvmnest.run.targets import Ended, OnEvent

_TAIL = 16_384
_USER_FILES = "/root/tests"
_PLAN = "/kvmnest/plan"
#: Cases that take about as long as a boot.
_WORTH_A_LAB = 50


class LabTarget:
    """Boots the lab for each process; ``on_line`` gets lines for the user.

    Raises what Lab raises (no such kernel, no emulator, full disk...).
    """

    guest_clock = True

    def __init__(
        self,
        *,
        kernel: str | None = None,
        kvm_modules: Path | None = None,
        kvm_params: Mapping[str, str] | None = None,
        cpus: int = 1,
        emulator: Choice | Installed = BOCHS,
        patience: float = 120.0,
        on_line: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._make_lab = partial(
            Lab,
            kernel,
            kvm_params=kvm_params,
            kvm_modules=kvm_modules,
            cpus=cpus,
            emulator=emulator,
        )
        self._lab = self._make_lab()
        self.name = self._lab.emulator.boot
        self.emulator = self._lab.emulator.cpu_emulator
        self._patience = patience
        self._on_line = on_line
        self._files: dict[str, bytes] = {}
        #: Folder of the guest -> what the user called it, with a slash at the end or "".
        self._folders: dict[str, str] = {}
        #: What ``collect`` gives for the arguments of the run; set before, it is not asked again.
        self.collected: Collected | None = None

    def place(self, paths: Sequence[str]) -> list[str]:
        """Take test files along into the guest; return what they are called there."""
        placed = []
        for number, name in enumerate(paths):
            path, separator, rest = name.partition("::")
            host = Path(path).resolve()
            folder = f"{_USER_FILES}/{number}"
            base = host if host.is_dir() else host.parent
            found = python_files(host)
            if not found:
                raise UsageError(f"{path} holds no Python file that can be read")
            for file, content in found.items():
                self._files[f"{folder}/{file.relative_to(base)}"] = content
            inside = "" if host.is_dir() else f"/{host.name}"
            called = path if host.is_dir() else str(Path(path).parent)
            self._folders[f"{folder}/"] = "" if called == "." else f"{called.rstrip('/')}/"
            placed.append(f"{folder}{inside}{separator}{rest}")
        return placed

    def run(self, arguments: Sequence[str], on_event: OnEvent, first: int = 0) -> Ended:
        """Boot and run; see ``kvmnest.run.targets.Target``.

        Cases of the suite run under the light runner, files of the user under pytest.
        """
        self._collect(arguments)
        if self.collected and not self.collected.count:
            # Nothing to boot for: pass on what pytest found wrong.
            for event in self.collected.events:
                on_event(event)
            return self.collected.ended
        light = self.collected is not None and bool(self.collected.plan)
        files = dict(self._files)
        if self.collected:
            tests = self.collected.modules() if light else None
            files |= rewritten(
                cache.root() / "pycache", self.collected.tail, light=light, tests=tests
            )
        if self.collected and light:
            files[_PLAN] = self.collected.plan
            argv = ["python3", "-m", "kvmnest.light.runner", _PLAN, EVENTS_PATH, str(first)]
        else:
            argv = ["python3", "-m", "pytest", *arguments]
            argv += [f"--kvmnest-from={first}", f"--kvmnest-events={EVENTS_PATH}"]
        return self._boot(argv, files, on_event)

    def _collect(self, arguments: Sequence[str]) -> None:
        if self.collected is None and not self._files:
            self.collected = collect(arguments)
            if self.collected.unsupported:
                self._on_line(f"under pytest, which is slow here: {self.collected.unsupported}")

    def split(self, arguments: Sequence[str], jobs: int) -> list[LabTarget]:
        """Deal the cases out to at most ``jobs`` labs, none with less than a boot is worth."""
        self._collect(arguments)
        if self.collected is None:
            return [self]
        parts = self.collected.split(min(jobs, self.collected.count // _WORTH_A_LAB))
        if len(parts) == 1:
            return [self]
        labs = [copy.copy(self) for _ in parts]
        for lab, part in zip(labs, parts, strict=True):
            lab._lab, lab.collected = self._make_lab(), part
        return labs

    def _boot(self, argv: list[str], files: dict[str, bytes], on_event: OnEvent) -> Ended:
        tail = b""

        def take_line(line: bytes) -> None:
            if line:
                on_event(parse(self._as_called(line)))

        def take_output(data: bytes) -> None:
            nonlocal tail
            tail = (tail + data)[-_TAIL:]

        def take_kernel(data: bytes) -> None:
            text = since(data.decode(errors="replace"), self._lab.info.get("received", 0.0))
            if text:
                on_event({"e": "kernel", "text": text, "from_lab": True})

        self._on_line(f"booting {self._lab.kernel.release} {self._lab.emulator.where}")
        try:
            status = self._lab.run(
                argv,
                on_event=take_line,
                on_output=take_output,
                on_kernel=take_kernel,
                idle_limit=self._patience,
                env={"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
                files=files,
            )
        except LabModuleError:
            raise
        except (LabPanic, LabHang, LabLost) as error:
            loss: Loss = "hang" if isinstance(error, LabHang) else "crash"
            return Ended(None, str(error), tail.decode(errors="replace"), loss)
        except LabRunError as error:
            if not self._lab.info:
                raise
            return Ended(None, str(error), tail.decode(errors="replace"))
        output = tail.decode(errors="replace")
        if status < 0:
            log = self._lab.kernel_log.decode(errors="replace")
            return Ended(None, f"killed by signal {-status} in the guest\n{log[-4096:]}", output)
        return Ended(status, output=output)

    def _as_called(self, line: bytes) -> bytes:
        """An event with the user's names of the files that ``place`` took along."""
        for folder, called in self._folders.items():
            name = json.dumps(called)[1:-1].encode()
            # pytest shows paths from where it stands.
            for shown in (folder, folder.removeprefix(f"{os.path.dirname(_USER_FILES)}/")):
                line = line.replace(shown.encode(), name)
        return line

    @property
    def release(self) -> str:
        """Release of the kernel that is booted."""
        return self._lab.kernel.release

    @property
    def times(self) -> str:
        """Times of the last boot in one line."""
        times = self._lab.times
        return f"booted in {times.boot:.1f} s, first event after {times.first_event:.1f} s"


def since(log: str, start: float) -> str:
    """The lines of a kernel log from a time on: what the boot says is about no case."""
    kept = []
    for line in log.splitlines(keepends=True):
        stamp = re.match(r"\[ *(\d+\.\d+)\]", line)
        if stamp is None or float(stamp[1]) >= start:
            kept.append(line)
    return "".join(kept)


def python_files(host: Path) -> dict[Path, bytes]:
    """Content of the Python files below a folder, or of a file and its neighbours.

    A test file may import modules from its folder. What is not a regular file there, or cannot be
    read, is left out; raises UsageError if that is the file itself.
    """
    found = {}
    for file in sorted(host.rglob("*.py") if host.is_dir() else {host, *host.parent.glob("*.py")}):
        try:
            if not file.is_file():
                raise OSError(errno.EINVAL, "not a regular file")
            found[file] = file.read_bytes()
        except OSError as error:
            if file == host:
                raise UsageError(f"cannot read {file}: {error.strerror}") from error
    return found
