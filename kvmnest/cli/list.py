"""``kvmnest list``: the cases, what they need, and whether they can run here."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from kvmnest.errors import UsageError


def add_parser(subparsers: Any) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "list",
        help="list the cases with their patch, SDM section title and needs",
        description="List cases; HERE says whether /dev/kvm of this machine can run them.",
        epilog="exit codes: 0 listed, 2 usage, 3 harness or environment error, 4 no such case",
    )
    parser.add_argument("selected", nargs="*", metavar="CASE", help="files or ids of the suite")
    parser.add_argument("-k", dest="keyword", default="", metavar="EXPR", help="as in pytest")
    parser.add_argument("--patch", type=int, metavar="N", help="only those of this patch")
    parser.add_argument(
        "--needs", metavar="TEXT", help="only those that need something of which this is a part"
    )
    parser.add_argument(
        "--against",
        metavar="SUITE",
        help="list the tests of another suite (kvm-unit-tests, selftests, XTF, guest-tests) with"
        " the cases that assert the same, and what is missing",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON document")


def run(options: argparse.Namespace) -> int:
    """Run the verb."""
    from kvmnest.run import listing, names

    if options.against is not None:
        return _against(options)
    found = listing.cases(options.selected, options.keyword)
    if options.patch is not None:
        found = [case for case in found if case.series == options.patch]
    if options.needs is not None:
        part = options.needs.lower()
        found = [case for case in found if any(part in need.lower() for need in case.needs)]
    if options.json:
        print(json.dumps([asdict(case) for case in found], indent=1))
        return 0 if found else 4
    if not found:
        words = [*options.selected]
        words += [f"--patch {options.patch}"] if options.patch is not None else []
        words += [f"--needs {options.needs}"] if options.needs is not None else []
        raise names.nothing(words, options.keyword)
    rows = [
        (
            f"{case.series or '-':>5}",
            "no" if case.skip else "yes",
            case.id,
            case.sdm or "-",
            ", ".join(case.needs) or "-",
        )
        for case in found
    ]
    for line in _table(("PATCH", "HERE", "CASE", "SDM SECTION", "NEEDS"), rows):
        print(line)
    able = sum(not case.skip for case in found)
    print(f"{len(found)} cases, {able} can run on this machine's /dev/kvm")
    reasons = {case.skip for case in found if case.skip}
    if len(reasons) == 1:
        print(f"the others cannot: {reasons.pop()}")
    return 0


def _against(options: argparse.Namespace) -> int:
    from kvmnest import anchors

    if options.selected or options.keyword or options.patch is not None or options.needs:
        raise UsageError("--against lists another suite: it goes with --json only")
    if options.json:
        found = [{**asdict(row), "state": row.state} for row in anchors.of(options.against)]
        print(json.dumps(found, indent=1))
        return 0
    for line in anchors.lines(options.against):
        print(line)
    return 0


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Lines of a table; a column is as wide as its widest cell, within reason."""
    widths = [min(80, max(map(len, column))) for column in zip(head, *rows, strict=True)]
    for row in (head, *rows):
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        yield "  ".join(cells).rstrip()
