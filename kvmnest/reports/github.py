"""Workflow commands of GitHub Actions, which show failures where people look for them."""

from __future__ import annotations

from collections.abc import Iterator

from kvmnest.reports.model import FAILED, OUTCOMES, Run, patch_title


def error_lines(run: Run) -> Iterator[str]:
    """An ``::error`` line for each case that failed or was in error."""
    for case in run.cases:
        if case.outcome in FAILED:
            title = _property(f"kvmnest: {case.id}")
            text = case.detail + (f"\nrerun: {case.rerun}" if case.rerun else "")
            yield f"::error title={title}::{_data(text)}"


def summary(run: Run) -> Iterator[str]:
    """Lines of Markdown for GITHUB_STEP_SUMMARY: a table by patch."""
    yield f"### kvmnest: {run.kernel or 'unknown'} ({run.target})"
    yield ""
    yield f"| patch | {' | '.join(OUTCOMES)} |"
    yield f"|---{'|---:' * len(OUTCOMES)}|"
    for patch, counts in run.by_patch().items():
        cells = " | ".join(str(counts[outcome] or "") for outcome in OUTCOMES)
        yield f"| {patch_title(patch)} | {cells} |"


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
