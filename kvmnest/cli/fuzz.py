"""``kvmnest fuzz``: random near-valid VMCSs against the SDM's rules of VM entry."""

from __future__ import annotations

import argparse
import os
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvmnest.cli import fuzz_common, fuzz_programs
from kvmnest.cli.lab import add_options
from kvmnest.cli.numbers import seconds
from kvmnest.errors import UsageError
from kvmnest.files import require_writable, write_json, write_text

if TYPE_CHECKING:
    from kvmnest.coverage.collect import Collector
    from kvmnest.fuzz.machines import FuzzMachine


def add_parser(subparsers: Any) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "fuzz",
        help="try random near-valid VMCSs, and compare the kernel with the SDM's rules",
        description="Enter VMCSs that differ from a legal one in a few fields, and compare how"
        " VM entry ends with what the rules of VM entry say.",
        epilog="exit codes: 0 all agree (or disagree in a known way), 1 a new disagreement or a"
        " crash, 2 usage, 3 harness or environment error, 130 interrupted",
    )
    add_what(parser)
    parser.add_argument("--target", choices=("auto", "kvm", "lab"), default="auto")
    add_fuzz_options(parser)
    fuzz_programs.add_options(parser)
    fuzz_programs.add_machines(parser)
    add_options(parser)


def add_what(parser: argparse.ArgumentParser) -> None:
    """The argument that says whether entries or programs are tried."""
    parser.add_argument(
        "what",
        nargs="?",
        choices=("entries", "programs"),
        default="entries",
        help="single VM entries against the rules of VM entry (default), or programs: sequences of"
        " VMX instructions and VM entries, on KVM and on the reference CPU",
    )


def add_fuzz_options(parser: argparse.ArgumentParser) -> None:
    """Options that say what to try, and where the findings go."""
    parser.add_argument("--seed", type=int, metavar="S", help="(default: a random one, printed)")
    parser.add_argument("--cases", type=int, metavar="N", help="how many (default: 1000)")
    parser.add_argument("--seconds", type=seconds, metavar="N", help="stop after this time")
    parser.add_argument("--jobs", type=int, metavar="N", help="labs at once (default: the cores)")
    parser.add_argument("--journal", type=Path, metavar="FILE", help="where cases are noted")
    parser.add_argument(
        "--continue", dest="go_on", action="store_true", help="go on with a journal, after a crash"
    )
    parser.add_argument("--tests", type=Path, metavar="DIR", help="write a test for each finding")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report")
    parser.add_argument("--no-shrink", action="store_true", help="keep findings as they are")


def run(
    options: argparse.Namespace,
    lab: Callable[..., FuzzMachine] | None = None,
    collector: Collector | None = None,
) -> int:
    """Run the verb; ``lab`` makes the machine that boots the lab, usually LabMachine.

    ``collector`` takes the coverage of programs.
    """
    from kvmnest.fuzz.journal import Journal
    from kvmnest.fuzz.run import Fuzzer

    for name in ("cases", "seconds", "jobs"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            raise UsageError(f"--{name} must be above 0, not {value:g}")
    if options.go_on and options.seed is None:
        raise UsageError("--continue needs the --seed of the run")
    seed = random.SystemRandom().randrange(1 << 32) if options.seed is None else options.seed
    require_writable(options.json, options.tests and options.tests / "test_fuzz.py")
    if options.what == "programs":
        return fuzz_programs.run(options, seed, collector)
    machine: FuzzMachine = fuzz_common.machine(options, lab)
    chosen = {"seed": seed, "target": machine.name, "kernel": options.kernel}
    chosen |= {"kvm_modules": options.kvm_modules, "kvm_params": options.kvm_param}
    path = fuzz_common.journal_path(options, chosen)
    journal = Journal(path, chosen, go_on=options.go_on)
    print(f"seed {seed}, journal {path}", flush=True)
    fuzzer = Fuzzer(machine, journal, seed, lambda line: print(line, flush=True))
    count = options.cases or (None if options.seconds else 1000)
    cores = len(os.sched_getaffinity(0))
    jobs = 1 if machine.name == "kvm" else options.jobs or min(4, cores)
    report = fuzzer.run(count, options.seconds, jobs)
    _print(report)
    findings = list(report.findings.values())
    for finding in findings:
        print(f"case {finding.number} ({finding.count} like it): {finding.verdict.text}")
    if not options.no_shrink:
        findings = [_shrunk(fuzzer, finding) for finding in findings]
        report.findings = {str(finding.number): finding for finding in findings}
    _write(options, fuzzer, report)
    return 1 if findings or report.warnings else 0


def _print(report: Any) -> None:
    outcomes = ", ".join(f"{number} {name}" for name, number in report.outcomes.most_common())
    print(f"{report.tried} cases: {outcomes}")
    kinds = report.kinds
    print(f"{kinds['agree']} agree, {kinds['known']} known, {kinds['disagree']} disagree")
    for reason, number in report.known.most_common():
        print(f"known, {number}: {reason}")
    for line in report.warnings:
        print(f"kernel warning in {line}")


def _shrunk(fuzzer: Any, finding: Any) -> Any:
    from kvmnest.fuzz.journal import CRASHED
    from kvmnest.fuzz.shrink import NotAgain, Shrinker

    if finding.seen[0] == CRASHED:
        return finding
    whole = replace(finding, before=fuzzer.before(finding.number))
    try:
        small = Shrinker(fuzzer.machine, fuzzer.judge, whole).run()
    except NotAgain:
        print(f"case {finding.number} does not show it again, alone or after those before it")
        return finding
    for number, case in enumerate((*small.before, small.case)):
        changes = " ".join(f"{field.name}={value:#x}" for field, value in case.changes.items())
        what = f"smallest: case {small.number}" if not number else "then"
        mode = "VIRTUAL-8086" if case.v8086 else case.mode.name
        print(f"{what}: {mode} {changes or 'as it is'}")
    print(f"ends in {small.verdict.text}")
    return small


def _write(options: argparse.Namespace, fuzzer: Any, report: Any) -> None:
    from kvmnest.fuzz.testfile import write

    if options.json:
        write_json(options.json, report.document())
    for finding in report.findings.values() if options.tests else ():
        path = options.tests / f"test_fuzz_{fuzzer.seed}_{finding.number}.py"
        write_text(path, write(finding, fuzzer.judge, fuzzer.seed, fuzzer.machine.name))
        print(f"test: {path}")
