"""Verdicts as tables on a terminal: one kernel with what to upgrade to, or bugs by kernels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from kvmnest.repro.bug import Bug
from kvmnest.repro.check import FIXED, NO_VERDICT, NOT_APPLICABLE, VULNERABLE, Verdict
from kvmnest.repro.corpus import Reproducer
from kvmnest.repro.ladder import Ladder, short, worst_first

LETTERS = {VULNERABLE: "V", FIXED: "-", NOT_APPLICABLE: "n", NO_VERDICT: "?", "": " "}


def fixed_in(bug: Bug) -> str:
    """The upstream version that has the fix, as a cell of a table."""
    return bug.fixed or ("?" if bug.subject else "not fixed")


def lines(verdicts: Sequence[Verdict], record: Ladder) -> Iterator[str]:
    """One row for each bug, VULNERABLE first, with the versions that have the fix."""
    rows = [("verdict", "bug", "CVE", "upstream", "Debian")]
    ordered = worst_first(verdicts)
    for verdict in ordered:
        bug = verdict.reproducer.bug
        upstream = fixed_in(bug)
        debian = record.first_fixed(verdict.reproducer.id, verdict.kernel)
        if not debian:
            debian = "no fix seen" if verdict.verdict == VULNERABLE else "-"
        rows.append((verdict.verdict, verdict.reproducer.id, bug.cve or "-", upstream, debian))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    for row, each in zip(rows, (None, *ordered), strict=True):
        yield "  ".join(f"{text:{width}}" for text, width in zip(row, widths, strict=True)).rstrip()
        if each and each.verdict in (VULNERABLE, NO_VERDICT):
            yield f"    {each.reproducer.title}"
            yield f"    {each.evidence}"
    counts = Counter(each.verdict for each in verdicts)
    said = [f"{counts[kind]} {kind}" for kind in LETTERS if counts[kind]]
    yield f"{', '.join(said)} ({verdicts[0].kernel})" if verdicts else "nothing was asked"


def grid(reproducers: Sequence[Reproducer], ladder: Ladder) -> Iterator[str]:
    """Bugs down, kernels across, and what each column is."""
    kernels = ladder.kernels
    width = max((len(each.id) for each in reproducers), default=0)
    for number, release in enumerate(kernels):
        yield f"{'':{width}}  {'| ' * number}{short(release)}"
    for each in reproducers:
        row = ladder.verdicts.get(each.id, {})
        cells = " ".join(LETTERS[row.get(release, "")] for release in kernels)
        yield f"{each.id:{width}}  {cells}".rstrip()
    yield "V VULNERABLE, - FIXED, n NOT APPLICABLE, ? NO VERDICT"
