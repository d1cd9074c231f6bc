"""What a case's end means: failed (KVM or the CPU is wrong), error (we or the machine are)."""

from __future__ import annotations

from typing import Any

import pytest

from kvmnest.plugin import policy

#: Attribute of a report: "failed" or "error".
KIND = "kvmnest_kind"
#: Attribute of a report: one line that says what happened.
SUMMARY = "kvmnest_summary"

_EMPTY_REASONS = ("", "unconditional skip", "Skipped")


def kind(error: BaseException, when: str) -> str:
    """Classify an exception of a case.

    The loss of the VM is a failure of the case in any phase, an assertion or anything else that
    the case itself raises too; errors of the harness and of the environment, and whatever happens
    in setup and teardown, are errors.
    """
    from kvmnest.errors import HarnessError
    from kvmnest.kvm.errors import KvmUnavailable
    from kvmnest.l1 import VmLost

    if isinstance(error, VmLost):
        return "failed"
    if isinstance(error, HarnessError | KvmUnavailable) or when != "call":
        return "error"
    return "failed"


def judge(item: pytest.Item, call: pytest.CallInfo[None], report: Any) -> pytest.TestReport:
    """Set kind, summary and explanation of a report; a skip without a reason becomes a failure."""
    if report.skipped and not hasattr(report, "wasxfail") and policy.in_suite(item):
        reason = skip_reason(report)
        if reason in _EMPTY_REASONS:
            report.outcome = "failed"
            report.longrepr = "this case skips without a reason"
            setattr(report, KIND, "failed")
            setattr(report, SUMMARY, report.longrepr)
    elif report.failed and call.excinfo is not None and _ours(item):
        from kvmnest.plugin import explain

        setattr(report, KIND, kind(call.excinfo.value, call.when))
        setattr(report, SUMMARY, _first_line(call.excinfo))
        # kvmnest run names its own command.
        direct = not item.config.getoption("--kvmnest-events")
        rerun = explain.rerun_command(item) if direct else ""
        report.sections.append(("kvmnest", explain.context(item, rerun)))
    return report  # type: ignore[no-any-return]


def _ours(item: pytest.Item) -> bool:
    return policy.in_suite(item) or policy.uses_kvmnest(item)


def skip_reason(report: pytest.TestReport) -> str:
    """Return the reason of a skipped report."""
    if isinstance(report.longrepr, tuple):
        return report.longrepr[2].removeprefix("Skipped: ").strip()
    return str(report.longrepr).strip()


def _first_line(excinfo: pytest.ExceptionInfo[BaseException]) -> str:
    text = str(excinfo.value).strip()
    first = text.splitlines()[0] if text else ""
    if excinfo.errisinstance(AssertionError) or excinfo.typename == "Failed":
        return first or excinfo.typename
    return f"{excinfo.typename}: {first}" if first else excinfo.typename
