"""``kvmnest mutants``: how many broken KVMs does the suite notice?"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvmnest.errors import UsageError
from kvmnest.lab import DEFAULT_KERNEL

if TYPE_CHECKING:
    from kvmnest.mutants.catalogue import Mutant


def add_parser(subparsers: Any) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "mutants",
        help="build KVM with known bugs put in and see which of them the suite notices",
        description="Rebuild kvm.ko and kvm-intel.ko with one bug at a time, run the suite on each"
        " in the lab, and print which case noticed it. Goes on where an earlier run stopped.",
        epilog="exit codes: 0 all noticed that can be, 1 some missed without a known reason,"
        " 2 usage, 3 harness or environment error, 130 interrupted",
    )
    parser.add_argument("--list", action="store_true", help="show the mutants and stop")
    parser.add_argument(
        "--only", default="", metavar="ID,...", help="only these (patterns as vmxon-*)"
    )
    parser.add_argument(
        "--first-only",
        action="store_true",
        help="run only the cases that a mutant names, not the whole suite after them",
    )
    parser.add_argument(
        "--programs",
        type=int,
        metavar="N",
        help="instead of cases run up to N programs of `kvmnest fuzz programs`, until one shows it",
    )
    parser.add_argument(
        "--seed", type=int, default=1, metavar="S", help="of the programs (default: 1)"
    )
    parser.add_argument("--fresh", action="store_true", help="forget earlier results of these")
    parser.add_argument(
        "--jobs",
        type=int,
        default=os.cpu_count() or 1,
        metavar="N",
        help="mutants at a time (default: one per core)",
    )
    parser.add_argument("--state", type=Path, metavar="FILE", help="where results are kept")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the detection table")
    parser.add_argument(
        "--kernel", metavar="SPEC", help=f"Debian version (default: {DEFAULT_KERNEL})"
    )
    parser.add_argument("--bochs", metavar="PATH", help="the Bochs to use")
    parser.add_argument("--cpu-model", metavar="NAME", help="the CPU that Bochs emulates")


def run(options: argparse.Namespace) -> int:
    """Run the verb."""
    from kvmnest.files import require_writable, write_json
    from kvmnest.mutants import catalogue, record, table

    mutants = catalogue.select(catalogue.load(), options.only)
    if options.jobs < 1:
        raise UsageError(f"--jobs must be at least 1, not {options.jobs}")
    if options.list:
        for line in table.listing(mutants):
            print(line)
        return 0
    require_writable(options.json, options.state)
    if options.programs is not None:
        return _by_programs(options, mutants)
    from kvmnest.lab import kernels
    from kvmnest.lab.emulators import Choice
    from kvmnest.mutants.score import Scorer

    release = kernels.resolve(options.kernel).release
    path = options.state or record.default_path(release)
    if options.fresh and not options.only:
        path.unlink(missing_ok=True)
    results = record.load(path, release)
    if options.fresh:
        for mutant in mutants:
            results.scores.pop(mutant.id, None)
    scorer = Scorer(
        kernel=options.kernel,
        release=release,
        results=results,
        emulator=Choice(program=options.bochs, cpu_model=options.cpu_model),
        first_only=options.first_only,
        on_line=lambda line: print(line, flush=True),
    )
    try:
        scorer.score(mutants, options.jobs)
    except KeyboardInterrupt:
        print(f"stopped; what was found is in {path}", file=sys.stderr)
        raise
    scores = {mutant.id: results.scores[mutant.id] for mutant in mutants}
    for line in table.table(mutants, scores, release):
        print(line)
    if options.json:
        write_json(options.json, table.document(mutants, scores, release))
    missed = [m for m in mutants if scores[m.id].verdict == record.MISSED and not m.missed]
    return 1 if missed else 0


def _by_programs(options: argparse.Namespace, mutants: Sequence[Mutant]) -> int:
    from kvmnest.files import write_json
    from kvmnest.lab import kernels
    from kvmnest.lab.emulators import Choice
    from kvmnest.mutants.by_programs import Hunter

    if options.programs < 1:
        raise UsageError(f"--programs must be at least 1, not {options.programs}")
    release = kernels.resolve(options.kernel).release
    hunter = Hunter(
        release,
        options.seed,
        options.programs,
        Choice(program=options.bochs, cpu_model=options.cpu_model),
        lambda line: print(line, flush=True),
    )
    hunts = []
    for mutant in mutants:
        hunts.append(hunter.hunt(mutant))
        if options.json:
            # After each, since a hunt is long.
            write_json(options.json, hunter.document(hunts))
    found = [each for each in hunts if each.program >= 0]
    tried = [each for each in hunts if not each.why]
    print(f"{len(found)} of {len(tried)} found by at most {hunter.clean} programs")
    return 1 if len(found) < len(tried) else 0
