"""Where cases run: this machine's /dev/kvm, or a kernel in the lab."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from kvmnest.cases.events import parse
from kvmnest.errors import HarnessError
from kvmnest.reports.model import Loss

_TAIL = 16_384

OnEvent = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Ended:
    """How a process that ran cases came to its end.

    ``status`` is its exit status, None if it was lost (signal, kernel panic, hang); ``why`` then
    is what was seen, its first line short, and ``loss`` tells a hang from a crash. ``output`` is
    the tail of stdout and stderr.
    """

    status: int | None
    why: str = ""
    output: str = ""
    loss: Loss = "crash"


class Stuck(HarnessError):
    """The process that runs a case cannot be ended: the kernel does not come back from a call."""


class Target(Protocol):
    """A place that can run the cases' process, again and again."""

    name: str
    #: Name and version of what emulates the CPU ("bochs 3.0"), "" for a real one.
    emulator: str
    #: Whether times measured there are not real time.
    guest_clock: bool

    def place(self, paths: Sequence[str]) -> list[str]:
        """Make test files of the user available there; returns what they are called there."""
        ...

    def run(self, arguments: Sequence[str], on_event: OnEvent, first: int = 0) -> Ended:
        """Run the cases that ``pytest ARGUMENTS`` selects, from number ``first`` on.

        Passes the events of the process on.

        Raises KvmnestError if the process cannot even be started there.
        """
        ...


class LocalTarget:
    """Runs the process on this machine.

    ``patience`` is the time in seconds without any event after which it counts as hung: the
    vCPU's own budget is much shorter, so this is for a process stuck in the kernel.
    """

    name = "kvm"
    emulator = ""
    guest_clock = False

    def __init__(
        self, patience: float = 120.0, environment: Mapping[str, str] | None = None
    ) -> None:
        self._patience = patience
        self._environment = {
            **os.environ,
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            **(environment or {}),
        }

    def place(self, paths: Sequence[str]) -> list[str]:
        """Files are where they are."""
        return list(paths)

    def run(self, arguments: Sequence[str], on_event: OnEvent, first: int = 0) -> Ended:
        """Run ``python -m pytest ARGUMENTS``; see Target."""
        return self.start(arguments, on_event, first).finish()

    def start(self, arguments: Sequence[str], on_event: OnEvent, first: int = 0) -> Started:
        """Start what ``run`` runs."""
        events, events_end = os.pipe()
        output, output_end = os.pipe()
        argv = [sys.executable, "-m", "pytest", *arguments]
        argv += [f"--kvmnest-from={first}", f"--kvmnest-events=fd:{events_end}"]
        try:
            # A session of its own: Ctrl-C is for us, who then end it in order.
            process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=output_end,
                stderr=output_end,
                pass_fds=[events_end],
                env=self._environment,
                start_new_session=True,
            )
        except OSError as error:
            os.close(events)
            os.close(output)
            raise HarnessError(f"cannot start {sys.executable}: {error.strerror}") from error
        finally:
            os.close(events_end)
            os.close(output_end)
        return Started(process, Streams(events, output, on_event), self._patience)


class Started:
    """A process of this machine that runs cases; it waits for ``finish`` to hear what it says."""

    def __init__(self, process: subprocess.Popen[bytes], streams: Streams, patience: float) -> None:
        self._process, self._streams, self._patience = process, streams, patience

    def finish(self) -> Ended:
        """Pass its events on until it ends."""
        try:
            hung = not self._streams.pump(self._patience)
        finally:
            # Also on Ctrl-C and when on_event raises: nothing of it may stay behind.
            self.stop()
        status = self._process.wait()
        tail = self._streams.tail.decode(errors="replace")
        if hung:
            why = f"no sign of life for {self._patience:.0f} s, killed"
            return Ended(None, why, tail, "hang")
        if status < 0:
            return Ended(None, f"killed by {signal.Signals(-status).name}", tail)
        return Ended(status, output=tail)

    def stop(self) -> None:
        """End it, if it is not at its end."""
        if self._process.poll() is None and self._streams.open:
            _end(self._process)
        self._streams.close()


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    try:
        process.wait(10)
    except subprocess.TimeoutExpired as error:
        raise Stuck(
            f"process {process.pid} is stuck in the kernel and does not end (see dmesg)"
        ) from error


class Streams:
    """The pipes of a running process."""

    def __init__(self, events: int, output: int, on_event: OnEvent) -> None:
        self._on_event = on_event
        self._lines = LineEvents(on_event)
        self._selector = selectors.DefaultSelector()
        self._selector.register(events, selectors.EVENT_READ, self._take_events)
        self._selector.register(output, selectors.EVENT_READ, self._take_output)
        self.tail = b""

    @property
    def open(self) -> bool:
        """Whether a pipe has not come to its end."""
        return bool(self._selector.get_map())

    def pump(self, patience: float) -> bool:
        """Read until both pipes end; False if nothing came for ``patience`` seconds."""
        last = time.monotonic()
        while self.open:
            ready = self._selector.select(max(0.0, last + patience - time.monotonic()))
            if not ready:
                return False
            last = time.monotonic()
            for key, _ in ready:
                data = os.read(key.fd, 65536)
                if data:
                    key.data(data)
                else:
                    self._selector.unregister(key.fd)
                    os.close(key.fd)
        return True

    def close(self) -> None:
        """Close what is still open."""
        for key in list((self._selector.get_map() or {}).values()):
            self._selector.unregister(key.fd)
            os.close(key.fd)
        self._selector.close()

    def _take_events(self, data: bytes) -> None:
        self._lines.feed(data)

    def _take_output(self, data: bytes) -> None:
        self.tail = (self.tail + data)[-_TAIL:]


class LineEvents:
    """Splits a byte stream into lines, which ``read`` makes events; one without its end is dropped.

    Args:
        on_event: gets each event.
        read: raises HarnessError for a line that is not an event.
    """

    def __init__(self, on_event: OnEvent, read: Callable[[bytes], dict[str, Any]] = parse) -> None:
        self._on_event = on_event
        self._read = read
        self._pending = b""

    def feed(self, data: bytes) -> None:
        """Take bytes. Raises what ``read`` raises (DamagedEvent)."""
        *lines, self._pending = (self._pending + data).split(b"\n")
        for line in lines:
            self._on_event(self._read(line))
