"""Turns pytest's reports into events for the process that started it."""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest

import kvmnest
from kvmnest.cases import explain
from kvmnest.cases.events import EventWriter
from kvmnest.cases.verdict import FAILED
from kvmnest.kmsg import LEVELS, KernelLog
from kvmnest.plugin import policy
from kvmnest.plugin.fixtures import offer
from kvmnest.plugin.outcomes import KIND, RAISED, SUMMARY, skip_reason

_LONGEST_DETAIL = 20_000


class EventStream:
    """A plugin object that reports a session as events (see ``kvmnest.cases.events``)."""

    def __init__(self, config: pytest.Config, spec: str) -> None:
        self._config = config
        self._writer = EventWriter(spec)
        self._offer = offer(config)
        self._kernel_log = KernelLog(LEVELS.index(config.getoption("--kernel-log")))
        if not self._offer.has_kernel_log:
            self._kernel_log.close()
        self._case: dict[str, Any] = {}
        self._why = ""

    def pytest_sessionstart(self) -> None:
        """Send the facts of the machine."""
        self._writer.send(
            "session",
            kvmnest=kvmnest.__version__,
            python=sys.version.split()[0],
            pytest=pytest.__version__,
            kernel=self._offer.kernel,
            cpu=self._offer.cpu,
            cpu_flags=self._offer.cpu_flags,
            kvm_params=self._offer.params,
            nested_roundtrip=bool(self._config.getoption("--nested-roundtrip")),
            kernel_log=self._kernel_log.readable,
        )

    def send(self, event: str, **content: object) -> None:
        """Send an event of another part of the plugin."""
        self._writer.send(event, **content)

    def trace(self, command: dict[str, Any]) -> None:
        """Send a command of L1."""
        self._writer.send("trace", **command)

    def broken(self, where: str, detail: str) -> None:
        """Report what cannot be collected."""
        self._writer.send("broken", where=where, detail=detail)

    def collected(self, items: list[pytest.Item], first: int) -> None:
        """Send ids and patches of all cases; after a restart their number only."""
        cases = []
        if not first:
            cases = [[policy.case_id(i.nodeid, i), policy.series(i)] for i in items]
        self._writer.send("collected", count=len(items), first=first, cases=cases)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Report a file that cannot be collected."""
        if report.failed:
            self.broken(report.nodeid, report.longreprtext)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> None:
        """Announce a case before anything of it runs."""
        self._case = {
            "id": policy.case_id(item.nodeid, item),
            "series": policy.series(item),
            "sdm": policy.sdm(item),
        }
        self._writer.send("start", **self._case)
        # The lab's pump must get the line out before a kernel that this case breaks is gone.
        os.sched_yield()
        self._case |= {"outcome": "passed", "seconds": 0.0, "detail": ""}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Fold the report of a phase into the case's result."""
        case = self._case
        case["seconds"] = round(case["seconds"] + report.duration, 6)
        if report.failed:
            self._failed(report)
        elif report.skipped and case["outcome"] == "passed":
            case["outcome"] = "known" if hasattr(report, "wasxfail") else "skipped"
            case["detail"] = getattr(report, "wasxfail", "") or skip_reason(report)

    def _failed(self, report: Any) -> None:
        case = self._case
        outcome = getattr(report, KIND, "error" if report.when != "call" else "failed")
        first = case["outcome"] not in FAILED
        if first or (outcome == "failed" and case["outcome"] == "error"):
            case["outcome"] = outcome
        text = report.longreprtext
        for name, content in report.sections:
            text += f"\n{content}" if name == "kvmnest" else f"\n--- {name} ---\n{content}"
        text = explain.readable(text)
        if first:
            case["summary"] = explain.readable(getattr(report, SUMMARY, "")) or _gist(text)
            case["raised"] = getattr(report, RAISED, "")
            case["detail"] = text[:_LONGEST_DETAIL]
        else:
            case["detail"] += f"\n--- then, in {report.when} ---\n{text}"

    def pytest_runtest_logfinish(self) -> None:
        """Send the result when teardown is over too, and before it what the kernel said."""
        text = self._kernel_log.drain()
        if text:
            self._writer.send("kernel", text=text)
        self._writer.send("result", **self._case)

    def pytest_keyboard_interrupt(self, excinfo: pytest.ExceptionInfo[BaseException]) -> None:
        """Note what ended the session early: KeyboardInterrupt, or pytest.exit."""
        last = excinfo.traceback[-1]
        text = f"{excinfo.typename}: {excinfo.value}".rstrip(": ")
        self._why = f"{text} ({last.path}:{last.lineno + 1})"

    def pytest_internalerror(self, excinfo: pytest.ExceptionInfo[BaseException]) -> None:
        """Note what broke pytest: a defect, or an exception that it lets through."""
        self.pytest_keyboard_interrupt(excinfo)

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        """Say that the process got to its end."""
        self._writer.send("end", status=int(exitstatus), why=self._why)


def _gist(text: str) -> str:
    """The line of a failure's text that says what is wrong: pytest marks it with E."""
    lines = text.splitlines() or [""]
    return next((line[1:].strip() for line in lines if line.startswith("E ")), lines[0])
