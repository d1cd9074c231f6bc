"""KTAP version 1, as the kernel's own CI reads it (kernel document "The Kernel Test Anything
Protocol (KTAP), version 1"): a test per patch of the series, in it a test per case."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kvmnest.reports.model import FAILED, PATCHES


def lines(document: dict[str, Any]) -> Iterator[str]:
    """Lines of a results document (schema 1)."""
    groups: dict[int, list[dict[str, Any]]] = {}
    for case in document["cases"]:
        groups.setdefault(case.get("series") or 0, []).append(case)
    yield "KTAP version 1"
    yield f"# kernel {_plain(document['kernel'])}, target {_plain(document['target'])}"
    problems = document["problems"]
    yield f"1..{len(groups) + len(problems)}"
    for number, (series, cases) in enumerate(sorted(groups.items()), 1):
        yield "  KTAP version 1"
        yield f"  1..{len(cases)}"
        for position, case in enumerate(cases, 1):
            yield from (f"  {line}" for line in _case(position, case))
        bad = any(case["outcome"] in FAILED for case in cases)
        name = f"patch {series}: {PATCHES[series]}" if series in PATCHES else "other"
        yield f"{'not ok' if bad else 'ok'} {number} {_plain(name)}"
    for number, problem in enumerate(problems, len(groups) + 1):
        yield f"not ok {number} the run as a whole: {_plain(problem)}"


def _case(position: int, case: dict[str, Any]) -> Iterator[str]:
    outcome = case["outcome"]
    text = _plain(case.get("summary") or case.get("detail", "").partition("\n")[0])
    if outcome in FAILED:
        for line in case.get("detail", "").splitlines():
            yield f"# {_plain(line)}".rstrip()
    directive = {"skipped": f" # SKIP {text}", "known": f" # XFAIL {text}"}.get(outcome, "")
    yield f"{'not ok' if outcome in FAILED else 'ok'} {position} {_plain(case['id'])}{directive}"


def _plain(text: object) -> str:
    # "#" starts a directive; a control character could start a line.
    shown = "".join(char if char.isprintable() else " " for char in str(text))
    return shown.replace("#", "\N{FULLWIDTH NUMBER SIGN}")
