"""The event channel: one JSON object a line, from the process that runs cases to its parent.

Events: ``session`` (facts of the machine), ``collected`` (ids and patches of the cases, in the
order in which they run), ``start`` and ``result`` of a case, ``broken`` (a file that cannot be
collected), ``kernel`` (messages of the kernel since the result before, sent before each result),
``trace`` (a command of L1, with --kvmnest-trace), ``listed`` (what a case needs, with
--kvmnest-list), ``coverage`` (blocks of an instrumented KVM, see ``kvmnest.cases.covered``, which
ran for the first time since the event before) and ``end``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from kvmnest.cases import covered
from kvmnest.errors import HarnessError

Event = dict[str, Any]


class DamagedEvent(HarnessError):
    """A line of the channel that no process of ours wrote: a case did, or memory is damaged."""


#: What each event holds at least.
_CONTENT: dict[str, dict[str, type | tuple[type, ...]]] = {
    "session": {"kernel": str, "kvm_params": dict},
    "collected": {"count": int, "first": int, "cases": list},
    "start": {"id": str, "series": (int, type(None)), "sdm": (str, type(None))},
    "result": {
        "id": str,
        "series": (int, type(None)),
        "sdm": (str, type(None)),
        "outcome": str,
        "seconds": (int, float),
        "detail": str,
    },
    "broken": {"where": str, "detail": str},
    "trace": {},
    "listed": {
        "id": str,
        "series": (int, type(None)),
        "sdm": (str, type(None)),
        "needs": list,
        "skip": str,
    },
    "kernel": {"text": str},
    "coverage": {"new": list, "sections": dict, "lost": str},
    "end": {"status": int, "why": str},
}
#: What an event may hold besides.
_MAY_HOLD = {"summary": str, "cpu_flags": str, "from_lab": bool}
#: Before these the blocks that have run are told, so that they belong to what went before.
_TELL_BLOCKS = ("session", "start", "result", "end")
_OUTCOMES = ("passed", "failed", "skipped", "known", "error")


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
        self._covered = covered.opened()
        self._encode = json.JSONEncoder(separators=(",", ":"), default=str).encode

    def send(self, event: str, **content: object) -> None:
        """Write one event. When nobody listens any more, the process ends at once."""
        if self._covered and event in _TELL_BLOCKS:
            news = self._covered.news()
            if news["new"] or news["lost"]:
                self._write("coverage", news)
        self._write(event, content)

    def _write(self, event: str, content: Mapping[str, object]) -> None:
        line = self._encode({"e": event, **content}).encode() + b"\n"
        try:
            while line:
                line = line[os.write(self._fd, line) :]
        except BrokenPipeError:
            os._exit(3)


def parse(line: bytes) -> Event:
    """Read one line of the channel; raises DamagedEvent for what EventWriter does not write.

    A lone surrogate in a text (a case may fail with any text) becomes its escape ``\\udc80``: no
    report could be written with it.
    """
    from kvmnest import reading  # not where cases run, which reads no events

    try:
        event = reading.parsed(line)
        wanted = _CONTENT[event["e"]]
        good = all(isinstance(event[name], kind) for name, kind in wanted.items())
        good = good and all(isinstance(event.get(n, k()), k) for n, k in _MAY_HOLD.items())
        good = good and event.get("outcome", "passed") in _OUTCOMES
        good = good and all(
            isinstance(case, list) and len(case) == 2 and isinstance(case[0], str)
            for case in event.get("cases", ())
        )
        good = good and event.get("seconds", 0) >= 0
        good = good and all(isinstance(v, str) for v in event.get("kvm_params", {}).values())
    except (ValueError, LookupError, TypeError, AttributeError):
        good = False
    if not good:
        raise DamagedEvent(f"damaged event from the cases' process: {line[:200]!r}")
    return event  # type: ignore[no-any-return]
