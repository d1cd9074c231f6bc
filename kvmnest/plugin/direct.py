"""Known deviations when the user runs pytest itself, without ``kvmnest run`` around it."""

from __future__ import annotations

from collections.abc import Generator
from functools import cached_property
from typing import Any

import pytest

from kvmnest import host, known
from kvmnest.plugin import policy


class DirectRun:
    """A plugin object that shows listed failures as expected ones (xfailed)."""

    def __init__(self, config: pytest.Config) -> None:
        self._target = config.getoption("--kvmnest-target")
        self._passed: list[str] = []

    @cached_property
    def _known(self) -> known.Known:
        return known.load(
            self._target, host.kernel(), host.kvm_intel_params(), cpu_flags=host.cpu_flags()
        )

    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Turn the failure of a listed case into an expected one."""
        report: Any = yield
        if policy.in_suite(item) and report.when == "call":
            name = policy.case_id(item.nodeid, item)
            deviation = self._known.match(name)
            if deviation and report.failed:
                report.outcome, report.wasxfail = "skipped", deviation.text
            elif deviation and report.passed:
                self._passed.append(f"{name}: {deviation.text}")
        return report  # type: ignore[no-any-return]

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Name listed cases that passed."""
        if self._passed:
            terminalreporter.section("known deviations that no longer happen")
            for line in self._passed:
                terminalreporter.write_line(line)
