"""``kvmnest list``: the cases, what they need, and whether they can run here."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import Any


def add_parser(subparsers: Any) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "list",
        help="list the cases with their patch, SDM section title and needs",
        description="List cases. Those that /dev/kvm of this machine cannot run are marked with -.",
        epilog="exit codes: 0 listed, 2 usage, 3 harness or environment error, 4 no such case",
    )
    parser.add_argument("selected", nargs="*", metavar="CASE", help="files or ids of the suite")
    parser.add_argument("-k", dest="keyword", default="", metavar="EXPR", help="as in pytest")
    parser.add_argument("--patch", type=int, metavar="N", help="only those of this patch")
    parser.add_argument("--json", action="store_true", help="print a JSON document")


def run(options: argparse.Namespace) -> int:
    """Run the verb."""
    from kvmnest.results import listing

    found = listing.cases(options.selected, options.keyword)
    if options.patch is not None:
        found = [case for case in found if case.series == options.patch]
    if options.json:
        print(json.dumps([asdict(case) for case in found], indent=1))
        return 0 if found else 4
    for case in found:
        needs = f"  [{', '.join(case.needs)}]" if case.needs else ""
        print(f"{'-' if case.skip else ' '} {case.series or '':>2}  {case.id}  ({case.sdm}){needs}")
    able = sum(not case.skip for case in found)
    print(f"{len(found)} cases, {able} can run on this machine's /dev/kvm")
    reasons = {case.skip for case in found if case.skip}
    if len(reasons) == 1:
        print(f"the others cannot: {reasons.pop()}")
    return 0 if found else 4
