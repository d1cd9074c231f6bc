"""What a case's end means: failed (KVM or the CPU is wrong), error (we or the machine are)."""

from __future__ import annotations

import shlex
from typing import Any

import pytest

from kvmnest.cases import verdict
from kvmnest.errors import NeedsHost
from kvmnest.plugin import policy

#: Attribute of a report: "failed" or "error".
KIND = "kvmnest_kind"
#: Attribute of a report: one line that says what happened.
SUMMARY = "kvmnest_summary"
#: Attribute of a report: name of the exception if it was not a failed assertion.
RAISED = "kvmnest_raised"

_EMPTY_REASONS = ("", "unconditional skip", "Skipped")


def judge(item: pytest.Item, call: pytest.CallInfo[None], report: Any) -> pytest.TestReport:
    """Set kind, summary and explanation of a report; a skip without a reason becomes a failure."""
    if report.failed and call.excinfo is not None and isinstance(call.excinfo.value, NeedsHost):
        report.outcome = "skipped"
        report.longrepr = (str(item.path), item.location[1] or 0, f"Skipped: {call.excinfo.value}")
    elif report.skipped and not hasattr(report, "wasxfail") and policy.ships(item):
        reason = skip_reason(report)
        if reason in _EMPTY_REASONS:
            report.outcome = "failed"
            report.longrepr = "this case skips without a reason"
            setattr(report, KIND, "failed")
            setattr(report, SUMMARY, report.longrepr)
    elif report.failed and call.excinfo is not None and _ours(item):
        from kvmnest import disassembly
        from kvmnest.cases import explain

        setattr(report, KIND, verdict.kind(call.excinfo.value, call.when))
        setattr(report, SUMMARY, verdict.summary(call.excinfo.value))
        setattr(report, RAISED, verdict.raised(call.excinfo.value))
        # kvmnest run names its own command.
        direct = not item.config.getoption("--kvmnest-events")
        rerun = f"pytest {shlex.quote(item.nodeid)}" if direct else ""
        values = getattr(item, "funcargs", {}).values()
        context = explain.context(values, rerun)
        report.sections.append(("kvmnest", disassembly.expand(context) if direct else context))
    return report  # type: ignore[no-any-return]


def _ours(item: pytest.Item) -> bool:
    return policy.ships(item) or policy.uses_kvmnest(item)


def skip_reason(report: pytest.TestReport) -> str:
    """Return the reason of a skipped report."""
    if isinstance(report.longrepr, tuple):
        return report.longrepr[2].removeprefix("Skipped: ").strip()
    return str(report.longrepr).strip()
