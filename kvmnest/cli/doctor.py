"""``kvmnest doctor``: can the suite run here, and if not, what to do."""

from __future__ import annotations

import argparse
import json
from typing import Any


def add_parser(subparsers: Any) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "doctor",
        help="say whether this machine is ready, and how to make it so",
        epilog="exit codes: 0 the suite can run (on /dev/kvm or in the lab), 3 it cannot",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON document")


def run(options: argparse.Namespace) -> int:
    """Run the verb."""
    from kvmnest.doctor.checks import examine

    report = examine()
    if options.json:
        print(json.dumps(report.document(), indent=1))
    else:
        width = max(len(check.name) for check in report.checks)
        for check in report.checks:
            print(f"{check.state:7}  {check.name:{width}}  {check.text}")
            if check.fix:
                print(f"{'':7}  {'':{width}}  fix: {check.fix}")
        where = {
            "kvm": "ready: the suite runs on this machine's /dev/kvm",
            "lab": "ready: the suite runs in the lab; /dev/kvm cannot run L1 here",
            "": "not ready: neither /dev/kvm nor the lab does (see what is bad above)",
        }
        print(f"\n{where[report.target]}")
    return 0 if report.target else 3
