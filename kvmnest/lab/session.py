"""Follow one running guest to its end: dispatch what it says, name what goes wrong."""

import contextlib
import marshal
import os
import re
import select
import time
from collections.abc import Callable
from dataclasses import dataclass

from kvmnest.lab import channel
from kvmnest.lab.emulators import Running
from kvmnest.lab.errors import LabHang, LabLost, LabModuleError, LabPanic, LabRunError

# A boot takes some 16 s of the emulator's CPU time, whatever else the host is busy with.
BOOT_LIMIT = 60.0
# Silence is measured in its CPU time. One that uses none is stopped, or waits for a disk: after so
# many looks at it, 0.2 s each (not seconds, which also pass while this process sleeps).
STOPPED_LIMIT = 300
#: What an oops begins with, and how many characters before the panic that it ends in.
_OOPS = re.compile("BUG: |general protection fault|invalid opcode|divide error|Oops: ")
_OOPS_LENGTH = 8000
_STUCK = re.compile(r"watchdog: (BUG: soft lockup|.*hard LOCKUP)|rcu_\w+ (self-)?detected stall")

Sink = Callable[[bytes], object]


@dataclass
class Times:
    """Host seconds of one run.

    ``prepare``: resolving and building files. Since the start of the emulator: ``boot`` until
    the command starts, ``first_event`` until its first event, ``total`` until its end.
    ``resumed`` tells that the boot was continued from a snapshot.
    """

    prepare: float = 0.0
    boot: float = 0.0
    first_event: float = 0.0
    total: float = 0.0
    resumed: bool = False


class Session:
    """Follows one running guest to its end.

    ``info`` is what the guest reported when it was up, ``kernel_log`` its kernel's warnings.
    ``on_waiting`` is called with the mailbox's mark when the guest waits for its job.
    """

    def __init__(
        self,
        times: Times,
        on_event: Sink,
        on_output: Sink,
        on_error: Sink,
        on_kernel: Sink,
        on_waiting: Sink,
    ) -> None:
        """Remember where to send what."""
        self.times = times
        self.info: dict[str, object] = {}
        self.kernel_log = b""
        self._sinks = {channel.STDOUT: on_output, channel.STDERR: on_error}
        self._sinks[channel.SNAPSHOT] = on_waiting
        self._on_event, self._on_kernel = on_event, on_kernel
        self._partial = b""
        self._started = time.monotonic()
        self._status: int | None = None
        self._decoder = channel.Decoder()

    def follow(
        self, emulator: Running, cpus: int, idle_limit: float | None, limit: float | None
    ) -> int:
        """Dispatch frames until the exit status arrives; returns it as an exit code.

        Raises LabPanic, LabHang, LabLost, LabModuleError, LabRunError.
        """
        self._emulator = emulator
        last_sign = before = emulator.clock()
        poll = select.poll()
        poll.register(emulator.output, select.POLLIN)
        console_size, stopped = 0, 0
        while self._status is None:
            data = b""
            if poll.poll(200):
                with contextlib.suppress(OSError):  # EIO: the terminal's other side is closed
                    data = os.read(emulator.output, 1 << 16)
            if data:
                self._receive(data)
                last_sign, stopped = emulator.clock(), 0
            else:
                now = emulator.clock()
                before, stopped = now, stopped + 1 if now == before else 0
                if stopped > STOPPED_LIMIT:
                    raise LabHang("the emulator does not run: stopped or blocked", self._tail())
                size = emulator.console_size()
                if size != console_size:
                    console_size, last_sign = size, emulator.clock()
                    self._check_panic()
                if emulator.ended():
                    raise LabLost(f"the emulator ended: {emulator.verdict()}", self._tail())
                if reason := emulator.stuck():
                    raise LabLost(f"the guest cannot go on: {reason}", self._tail())
            self._check_time(last_sign, cpus, idle_limit, limit)
        self.times.total = time.monotonic() - self._started
        return os.waitstatus_to_exitcode(self._status)

    def _receive(self, data: bytes) -> None:
        try:
            for kind, payload in self._decoder.feed(data):
                self._dispatch(kind, payload)
        except channel.ChannelError as e:
            raise LabRunError(f"the lab's channel is damaged: {e}", self._tail()) from e

    def _dispatch(self, kind: int, payload: bytes) -> None:
        times = self.times
        if kind in self._sinks:
            self._sinks[kind](payload)
        elif kind == channel.EVENT:
            times.first_event = times.first_event or time.monotonic() - self._started
            *lines, self._partial = (self._partial + payload).split(b"\n")
            for line in lines:
                self._on_event(line)
        elif kind == channel.KLOG:
            self.kernel_log += payload
            self._on_kernel(payload)
        elif kind == channel.READY:
            times.boot, times.first_event = time.monotonic() - self._started, 0.0
            self.info = marshal.loads(payload)
            self._emulator.drop_images()
        elif kind == channel.EXIT:
            self._status = marshal.loads(payload)
        elif kind == channel.MODULE_ERROR:
            name, error, log = marshal.loads(payload)
            lines = log.decode(errors="replace").strip().splitlines()
            raise LabModuleError(
                f"{name} did not load: {os.strerror(error)}", "\n".join(lines[-3:])
            )
        else:
            raise LabRunError(
                f"the lab's guest failed: {payload.decode(errors='replace')}", self._tail()
            )

    def _check_panic(self) -> None:
        console = self._emulator.console()
        if _STUCK.search(console):
            # The watchdog's messages go on for ever, and would count as signs of life.
            raise LabHang("the guest kernel hangs: its watchdog reports a lockup", self._tail())
        at = console.find("Kernel panic - not syncing")
        if at < 0:
            return
        self._emulator.wait_end(1.0)  # let it print the rest
        console = self._emulator.console()
        oops = _OOPS.search(console, max(0, at - _OOPS_LENGTH), at)
        lines = console[console.rfind("\n", 0, oops.start() if oops else at) + 1 :].splitlines()
        raise LabPanic("the guest kernel panicked", "\n".join(lines[:20]))

    def _check_time(
        self, last_sign: float, cpus: int, idle: float | None, limit: float | None
    ) -> None:
        if not self.info and self._emulator.cpu_seconds() > BOOT_LIMIT * cpus:
            seconds = BOOT_LIMIT * cpus
            raise LabHang(f"the guest did not boot in {seconds:.0f} s of CPU time", self._tail())
        if idle is not None and self._emulator.clock() - last_sign > idle:
            raise LabHang(f"the guest said nothing for {idle:.0f} s", self._tail())
        if limit is not None and time.monotonic() - self._started > limit:
            raise LabHang(f"the run took longer than {limit:.0f} s", self._tail())

    def _tail(self) -> str:
        return "\n".join(self._emulator.console().splitlines()[-20:])
