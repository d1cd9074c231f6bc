"""``kvmnest repro``: does this kernel have that bug?"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import Any

from kvmnest.cli.lab import add_options, target


def add_parser(subparsers: Any) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "repro",
        help="say whether a kernel has a known bug of nested VMX",
        usage="kvmnest repro list [--json] | kvmnest repro [options] ID... (or all)",
        epilog="exit codes: 0 FIXED, 1 VULNERABLE (any of them), 2 usage, 3 harness or environment"
        " error, 4 NOT APPLICABLE",
    )
    parser.add_argument("words", nargs="+", metavar="ID", help="id or CVE of a bug, all, or list")
    parser.add_argument("--target", choices=("auto", "kvm", "lab"), default="auto")
    parser.add_argument("--json", action="store_true", help="print a JSON document")
    add_options(parser)


def run(options: argparse.Namespace) -> int:
    """Run the verb."""
    from kvmnest.repro import corpus
    from kvmnest.repro.check import FIXED, VULNERABLE, check, document

    known = corpus.load()
    if options.words == ["list"]:
        _list(known, as_json=options.json)
        return 0
    verdicts = check(
        known.select(options.words), lambda params: target(options, params), known.bugs
    )
    if options.json:
        print(json.dumps(document(verdicts), indent=1))
    else:
        for verdict in verdicts:
            bug = verdict.bug
            print(f"{verdict.verdict:14} {bug.id}: {bug.title} ({verdict.kernel})")
            print(f"{'':14} {verdict.evidence}")
            print(f'{"":14} upstream: "{bug.subject}"{f", {bug.cve}" if bug.cve else ""}')
    seen = {verdict.verdict for verdict in verdicts}
    return 1 if VULNERABLE in seen else 0 if FIXED in seen else 4


def _list(known: Any, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps([asdict(bug) for bug in known.bugs], indent=1))
        return
    width = max(len(bug.id) for bug in known.bugs)
    for bug in known.bugs:
        notes = [note for note in (bug.cve, bug.fixed and f"fixed in {bug.fixed}") if note]
        shown = f" ({', '.join(notes)})" if notes else ""
        print(f"{bug.id:{width}}  {bug.title}{shown}")
        print(f'{"":{width}}  "{bug.subject}"')
        print(f"{'':{width}}  {bug.case}")
        print(f"{'':{width}}  {known.kernel}: FIXED; with the bug put back: {bug.vulnerable}")
    print(
        f"{len(known.bugs)} bugs; each reproducer passes on {known.kernel} and fails on the same"
        " kernel with the bug put back (kvmnest mutants)"
    )
