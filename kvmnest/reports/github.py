"""Workflow commands of GitHub Actions, which show failures where people look for them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kvmnest.reports.model import FAILED, OUTCOMES, PATCHES


def error_lines(document: dict[str, Any]) -> Iterator[str]:
    """An ``::error`` line for each case of a results document that failed or was in error."""
    for case in document["cases"]:
        if case["outcome"] in FAILED:
            title = _property(f"kvmnest: {case['id']}")
            text = case.get("detail", "")
            if case.get("rerun"):
                text += f"\nrerun: {case['rerun']}"
            yield f"::error title={title}::{_data(text)}"


def summary(document: dict[str, Any]) -> Iterator[str]:
    """Lines of Markdown for GITHUB_STEP_SUMMARY: a table by patch."""
    yield f"### kvmnest: {document['kernel']} ({document['target']})"
    yield ""
    yield f"| patch | {' | '.join(OUTCOMES)} |"
    yield f"|---{'|---:' * len(OUTCOMES)}|"
    counts: dict[int, dict[str, int]] = {}
    for case in document["cases"]:
        row = counts.setdefault(case.get("series") or 0, dict.fromkeys(OUTCOMES, 0))
        row[case["outcome"]] += 1
    for series, row in sorted(counts.items()):
        name = f"{series} {PATCHES[series]}" if series in PATCHES else "other"
        yield f"| {name} | {' | '.join(str(row[outcome] or '') for outcome in OUTCOMES)} |"


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
