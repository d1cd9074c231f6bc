"""The event channel: one JSON object a line, from the process that runs cases to its parent.

Events: ``session`` (facts of the machine), ``collected`` (ids and patches of the cases, in the
order in which they run), ``start`` and ``result`` of a case, ``broken`` (a file that cannot be
collected), ``trace`` (a command of L1, with --kvmnest-trace) and ``end``.
"""

from __future__ import annotations

import json
import os


class EventWriter:
    """Writes events to a file descriptor ("fd:7") or to a path (a file, FIFO or device).

    Each line goes out with one os.write, so that a kernel panic right after leaves it whole.
    """

    def __init__(self, spec: str) -> None:
        if spec.startswith("fd:"):
            self._fd = int(spec[3:])
            # What a case starts must not hold the channel open.
            os.set_inheritable(self._fd, False)
        else:
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
            self._fd = os.open(spec, flags, 0o644)
        self._encode = json.JSONEncoder(separators=(",", ":"), default=str).encode

    def send(self, event: str, **content: object) -> None:
        """Write one event. When nobody listens any more, the process ends at once."""
        line = self._encode({"e": event, **content}).encode() + b"\n"
        try:
            while line:
                line = line[os.write(self._fd, line) :]
        except BrokenPipeError:
            os._exit(3)
