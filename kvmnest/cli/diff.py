"""``kvmnest diff``: what changed between two runs."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any


def add_parser(subparsers: Any) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "diff",
        help="compare two results files: new failures, fixes, new skips; or whose they are",
        description="Compare two results files. If one is of the reference target, each failure of"
        " the other gets a verdict: what passes on the bare CPU is KVM's.",
        epilog="exit codes: 0 no new failure, 1 a new failure, 2 usage or no such file, 3 a file"
        " cannot be read",
    )
    parser.add_argument("old", type=Path, metavar="OLD.json")
    parser.add_argument("new", type=Path, metavar="NEW.json")
    parser.add_argument("--json", action="store_true", help="print a JSON document")


def run(options: argparse.Namespace) -> int:
    """Run the verb."""
    from kvmnest.known import REFERENCE
    from kvmnest.reports import diff, jsonfile

    old, new = jsonfile.load(options.old), jsonfile.load(options.new)
    if (old["target"] == REFERENCE) is not (new["target"] == REFERENCE):
        return _verdicts(*((new, old) if old["target"] == REFERENCE else (old, new)), options.json)
    before, after = jsonfile.run_of(old), jsonfile.run_of(new)
    changes = diff.compare(before, after)
    if options.json:
        print(json.dumps([asdict(change) for change in changes], indent=1))
    else:
        for found, path in ((before, options.old), (after, options.new)):
            unfinished = "" if found.complete else ", not complete"
            print(f"{path}: {found.kernel or 'no kernel'} ({found.target}{unfinished})")
        for change in changes:
            outcomes = f"{change.before or '-'} -> {change.after or '-'}"
            text = f": {change.text}" if change.text and change.after != "passed" else ""
            print(f"{change.kind:17}  {change.id} ({outcomes}){text}")
        counts = {kind: sum(c.kind == kind for c in changes) for kind in diff.KINDS}
        shown = ", ".join(f"{number} {kind}" for kind, number in counts.items() if number)
        print(shown or "no change")
    return 1 if any(change.kind == "new failure" for change in changes) else 0


def _verdicts(kvm: dict[str, Any], reference: dict[str, Any], as_json: bool) -> int:
    """The verdict on each failure; 1 if one that is not known is KVM's."""
    from kvmnest.reports import verdicts

    outcomes = verdicts.of_results(reference)
    found = verdicts.of_failures(kvm, outcomes)
    if as_json:
        print(
            json.dumps([{**asdict(f), "verdict": f.verdict.name.lower()} for f in found], indent=1)
        )
    else:
        print(f"{kvm['kernel']} ({kvm['target']}), judged by {outcomes.emulator} without KVM")
        for verdict in verdicts.Verdict:
            chosen = [failed for failed in found if failed.verdict is verdict]
            if chosen:
                print(f"{verdict.value} ({len(chosen)}):")
            for failed in chosen:
                print(
                    f"  {failed.id} ({failed.outcome}){f': {failed.text}' if failed.text else ''}"
                )
        if not found:
            print("no failure")
    new = (f for f in found if f.outcome != "known" and f.verdict is verdicts.Verdict.KVM)
    return int(any(new))
