"""``kvmnest trace``: one case, command by command."""

from __future__ import annotations

import argparse
import json
from typing import Any

from kvmnest.cli.lab import add_options, target


def add_parser(subparsers: Any) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "trace",
        help="run one case and show every command of L1: for bug reports",
        epilog="exit codes: 0 the case passed (or is a known deviation), 1 it failed, 2 usage,"
        " 3 harness or environment error, 4 it was skipped",
    )
    parser.add_argument("case", metavar="CASE", help="FILE::NAME of the suite, or of your file")
    parser.add_argument("--target", choices=("auto", "kvm", "lab"), default="auto")
    parser.add_argument("--all", action="store_true", help="the fields of the baseline too")
    parser.add_argument("--json", action="store_true", help="print the commands as JSON")
    add_options(parser)


def run(options: argparse.Namespace) -> int:
    """Run the verb."""
    from kvmnest.disassembly import available
    from kvmnest.trace.run import check, trace
    from kvmnest.trace.show import lines

    check(options.case)  # before a kernel is fetched or prepared
    done, case, commands = trace(target(options), options.case)
    cpu = done.facts.get("cpu", "")
    if options.json:
        document = {"schema": 1, "case": case.id, "outcome": case.outcome}
        document |= {"kernel": done.kernel, "cpu": cpu, "commands": commands}
        print(json.dumps(document, indent=1))
    else:
        print(f"{case.id}: {case.outcome} ({done.target}, kernel {done.kernel}, {cpu})")
        if case.sdm:
            print(f"SDM: {case.sdm}")
        if not available():
            print("L2's code is shown as bytes: pip install 'kvmnest[disassembly]'")
        for line in lines(commands, every=options.all):
            print(line)
        if case.detail:
            print(f"{case.outcome}: {case.detail}")
    return {"passed": 0, "known": 0, "skipped": 4}.get(case.outcome, 1)
