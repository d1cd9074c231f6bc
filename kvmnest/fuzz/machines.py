"""Where cases are tried: on this machine's /dev/kvm, or on a kernel in the lab."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from kvmnest import reading, scratch
from kvmnest.errors import HarnessError, first_line
from kvmnest.fuzz.execute import Seen
from kvmnest.fuzz.journal import EVENT_SCHEMA
from kvmnest.fuzz.model import FuzzCase
from kvmnest.lab.emulators import BOCHS, Choice
from kvmnest.lab.errors import LabHang, LabLost, LabPanic, LabRunError
from kvmnest.lab.guest import EVENTS_PATH
from kvmnest.lab.machine import Lab
from kvmnest.run.targets import LineEvents
from kvmnest.schema import Schema

OnEvent = Callable[[dict[str, Any]], None]
Numbered = Sequence[tuple[int, FuzzCase]]


@dataclass(frozen=True)
class Task:
    """What a process of its own does: ``python -m module WORK EVENTS``, events as ``schema``."""

    module: str
    work: bytes
    schema: Schema


#: Seconds without any event after which the kernel is taken to hang.
PATIENCE = 60.0
_WORK = "/kvmnest/fuzz.json"


class FuzzMachine(Protocol):
    """A kernel's KVM on which VM entries can be tried."""

    name: str

    def run(self, cases: Numbered, on_event: OnEvent, journal: Path | None) -> str:
        """Try cases; what the executor says goes to ``on_event``.

        Returns "" if all were tried, else how the kernel or the process was lost in one of them.
        On a machine that a case can crash, events reach ``journal`` (a file) before that.

        Raises:
            KvmnestError: it could not even be started.
        """
        ...


def _trying(cases: Numbered) -> Task:
    work = json.dumps([[number, case.to_json()] for number, case in cases]).encode()
    return Task("kvmnest.fuzz.execute", work, EVENT_SCHEMA)


class LabMachine:
    """A fresh boot of the lab for every call; arguments are those of ``kvmnest.lab.machine.Lab``.

    Kernel warnings arrive as events {"kernel": text}, before the end of the case they belong to.
    """

    def __init__(
        self,
        kernel: str | None = None,
        params: Mapping[str, str] | None = None,
        modules: str | None = None,
        emulator: Choice = BOCHS,
    ) -> None:
        self._make: Callable[[], Lab] = partial(
            Lab, kernel, kvm_params=params, kvm_modules=modules, emulator=emulator
        )
        self._make()
        self.name = emulator.boot

    def run(self, cases: Numbered, on_event: OnEvent, journal: Path | None) -> str:
        """See FuzzMachine; the lab's crash is not this machine's, so ``journal`` is not needed."""
        return self.do(_trying(cases), on_event)

    def do(self, task: Task, on_event: OnEvent, journal: Path | None = None) -> str:
        """Do a task in a fresh boot; what it says goes to ``on_event``.

        Returns "", or how the kernel or the process was lost. Raises KvmnestError.
        """
        output = b""

        def take_output(data: bytes) -> None:
            nonlocal output
            output = (output + data)[-4096:]

        lines = LineEvents(on_event, partial(_event, task.schema))
        lab = self._make()
        try:
            status = lab.run(
                ["python3", "-m", task.module, _WORK, EVENTS_PATH],
                on_event=lambda line: lines.feed(line + b"\n"),
                on_output=take_output,
                on_kernel=lambda text: on_event({"kernel": text.decode(errors="replace")}),
                idle_limit=PATIENCE,
                files={_WORK: task.work},
            )
        except (LabHang, LabLost, LabPanic, LabRunError) as error:
            if not lab.info:
                raise
            return first_line(error)
        if status > 0:
            raise HarnessError(f"the lab: {_last_line(output)}")
        return f"killed by signal {-status} in the lab" if status else ""


def _event(schema: Schema, line: bytes) -> dict[str, Any]:
    """One line of the executor, see kvmnest.fuzz.execute. Raises HarnessError if it is none."""
    where = f"a line of the cases' process, {line[:80]!r},"
    return dict(reading.value(line, "event", schema, where))


class LocalMachine:
    """This machine's /dev/kvm, in a process of its own."""

    name = "kvm"

    def run(self, cases: Numbered, on_event: OnEvent, journal: Path | None) -> str:
        """See FuzzMachine."""
        return self.do(_trying(cases), on_event, journal)

    def do(self, task: Task, on_event: OnEvent, journal: Path | None = None) -> str:
        """Do a task; see LabMachine."""
        with scratch.folder() as folder:
            source = Path(folder) / "work.json"
            source.write_bytes(task.work)
            events = journal or Path(folder) / "events"
            events.touch(mode=0o600)
            with events.open("rb") as reader, (Path(folder) / "output").open("w+b") as output:
                reader.seek(0, os.SEEK_END)
                argv = [sys.executable, "-m", task.module, str(source), str(events)]
                process = subprocess.Popen(
                    argv,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                )
                lines = LineEvents(on_event, partial(_event, task.schema))
                try:
                    hung = self._follow(process, reader, lines)
                finally:
                    if process.poll() is None:
                        process.kill()
                        process.wait(10)
                output.seek(0)
                said = output.read()
        if hung:
            return f"no sign of life for {PATIENCE:.0f} s"
        if process.returncode < 0:
            return f"killed by {signal.Signals(-process.returncode).name}"
        if process.returncode:
            raise HarnessError(_last_line(said).removeprefix("kvmnest: "))
        return ""

    def _follow(self, process: subprocess.Popen[bytes], reader: Any, lines: LineEvents) -> bool:
        last = time.monotonic()
        while True:
            ended = process.poll() is not None
            data = reader.read()
            if data:
                lines.feed(data)
                last = time.monotonic()
            elif ended:
                return False
            elif time.monotonic() - last > PATIENCE:
                return True
            else:
                time.sleep(0.05)


def _last_line(output: bytes) -> str:
    lines = output.decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "the executor said nothing"


class _Enough(Exception):
    """The sequence that was looked for is found."""


def try_sequences(
    machine: FuzzMachine,
    sequences: Sequence[Sequence[FuzzCase]],
    enough: Callable[[int, Seen], bool] = lambda index, seen: False,
) -> list[Seen | None]:
    """What becomes of the last case of each sequence, which begins with a new L1.

    None for those in which the kernel was lost, and for all after the first of which ``enough``
    (index of the sequence, outcome) is true. Raises HarnessError if nothing can be tried.
    """
    numbered: list[tuple[int, FuzzCase]] = []
    ends = []
    for first, *rest in sequences:
        for case in (replace(first, fresh=True), *rest):
            numbered.append((len(numbered), case))
        ends.append(len(numbered))
    found: dict[int, Seen] = {}
    at = 0

    def take(event: dict[str, Any]) -> None:
        nonlocal at
        if "start" in event:
            at = event["start"]
        elif "end" in event:
            found[at] = event["outcome"]
            if at + 1 in ends and enough(ends.index(at + 1), found[at]):
                raise _Enough

    begin = 0
    while begin < len(numbered):
        at = -1
        try:
            why = machine.run(numbered[begin:], take, None)
        except _Enough:
            break
        if why and at < 0:
            raise HarnessError(f"no case was tried: {why}")
        # A sequence in which the kernel was lost is not tried again.
        begin = next(end for end in ends if end > at)
    return [found.get(end - 1) for end in ends]
