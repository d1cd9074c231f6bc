"""KTAP version 1, as the kernel's own CI reads it (kernel document "The Kernel Test Anything
Protocol (KTAP), version 1"): a test per patch of the series, in it a test per case."""

from __future__ import annotations

from collections.abc import Iterator

from kvmnest.reports.model import FAILED, PATCHES, Case, Run


def lines(run: Run) -> Iterator[str]:
    """Lines for a run."""
    groups = run.cases_by_patch()
    yield "KTAP version 1"
    yield f"# kernel {_plain(run.kernel or 'unknown')}, target {_plain(run.target)}"
    yield f"1..{len(groups) + len(run.problems)}"
    for number, (patch, cases) in enumerate(groups.items(), 1):
        yield "  KTAP version 1"
        yield f"  1..{len(cases)}"
        for position, case in enumerate(cases, 1):
            yield from (f"  {line}" for line in _case(position, case))
        bad = any(case.outcome in FAILED for case in cases)
        name = f"patch {patch}: {PATCHES[patch]}" if patch in PATCHES else "other"
        yield f"{'not ok' if bad else 'ok'} {number} {_plain(name)}"
    for number, problem in enumerate(run.problems, len(groups) + 1):
        yield f"not ok {number} the run as a whole: {_plain(problem)}"


def _case(position: int, case: Case) -> Iterator[str]:
    outcome, text = case.outcome, _plain(case.headline)
    if outcome in FAILED:
        for line in case.detail.splitlines():
            yield f"# {_plain(line)}".rstrip()
    directive = {"skipped": f" # SKIP {text}", "known": f" # XFAIL {text}"}.get(outcome, "")
    yield f"{'not ok' if outcome in FAILED else 'ok'} {position} {_plain(case.id)}{directive}"


def _plain(text: object) -> str:
    # "#" starts a directive; a control character could start a line.
    shown = "".join(char if char.isprintable() else " " for char in str(text))
    return shown.replace("#", "\N{FULLWIDTH NUMBER SIGN}")
