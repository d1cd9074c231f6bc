"""``kvmnest found``: defects of KVM that kvmnest shows on kernels of today."""

from __future__ import annotations

import argparse
import json
import textwrap
from dataclasses import asdict
from typing import Any

from kvmnest.errors import UsageError

_LINES = ("seen", "right", "function", "loss", "fix")


def add_parser(subparsers: Any) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "found",
        help="list the defects of KVM that kvmnest shows on kernels of today",
        description="List defects of KVM: what is seen, what the SDM says, which kernels have it,"
        " where it is in the source. The witness was the lab's emulated CPU in each case.",
        epilog="exit codes: 0 listed, 2 no such defect",
    )
    parser.add_argument("ids", nargs="*", metavar="ID", help="only these, in full")
    parser.add_argument("--json", action="store_true", help="print a JSON document")


def run(options: argparse.Namespace) -> int:
    """Run the verb."""
    from kvmnest import found

    defects = found.load()
    unknown = set(options.ids) - {defect.id for defect in defects}
    if unknown:
        raise UsageError(f"no such defect: {sorted(unknown)[0]} (kvmnest found lists them)")
    chosen = [defect for defect in defects if not options.ids or defect.id in options.ids]
    if options.json:
        entries = [{**asdict(defect), "kernels": defect.kernels} for defect in chosen]
        print(json.dumps(entries, indent=1))
        return 0
    for defect in chosen:
        print(f"{defect.id}: {defect.title}")
        print(f'    kernels: {defect.kernels}; SDM: "{defect.sdm}"')
        if options.ids:
            for name in _LINES:
                text = f"{name}: {getattr(defect, name)}"
                print(textwrap.indent(textwrap.fill(text, 92), "    "))
            print("    run: kvmnest run " + " ".join(dict.fromkeys(map(_function, defect.cases))))
    if not options.ids:
        print(f"{len(defects)} defects; kvmnest found ID tells more of one")
    return 0


def _function(case: str) -> str:
    """The case without its parameters, which kvmnest run takes as it is."""
    return case.partition("[")[0].rstrip("*")
