"""The time that a case has: a vCPU that does not come back in it hangs."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from typing import Any


class Budget:
    """A clock that starts with the first command of a case.

    When ``seconds`` are over, ``used_up`` is true, SIGALRM ends KVM_RUN, and ``wake`` is called for
    vCPUs that wait elsewhere. Only the main thread has a clock; 0 seconds mean no limit.
    """

    def __init__(self, seconds: float, wake: Callable[[], None]) -> None:
        self.seconds = seconds
        self.used_up = False
        self._wake = wake
        self._armed = self._taken = False
        #: The handler of SIGALRM outside a case; None if it was not set from Python.
        self._handler: Any = None

    def start(self) -> None:
        """Start the clock unless it runs."""
        if self._armed or not self.seconds or threading.current_thread() != threading.main_thread():
            return
        self._armed = True
        if not self._taken:
            self._handler = signal.signal(signal.SIGALRM, self._expire)
            self._taken = True
        # The timer repeats, since a signal that arrives just before KVM_RUN does not end it.
        signal.setitimer(signal.ITIMER_REAL, self.seconds, 0.05)

    def _expire(self, number: int, frame: object) -> None:
        self.used_up = True
        self._wake()

    def pause(self) -> None:
        """Stop the clock; SIGALRM stays taken. The next command starts it anew."""
        if self._armed:
            self._armed = False
            signal.setitimer(signal.ITIMER_REAL, 0)

    def stop(self) -> None:
        """Stop the clock, and give SIGALRM back; the next command starts it anew."""
        self.pause()
        if self._taken:
            self._taken = False
            signal.signal(signal.SIGALRM, self._handler or signal.SIG_DFL)
