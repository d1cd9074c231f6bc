"""``kvmnest coverage``: which lines of KVM do cases, a fuzz run or a command reach?"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvmnest.cli.coverage_modules import collector_for
from kvmnest.cli.lab import add_options, emulator, parameters
from kvmnest.cli.numbers import seconds
from kvmnest.errors import HarnessError, UsageError
from kvmnest.files import require_writable

if TYPE_CHECKING:
    from kvmnest.coverage.collect import Collector
    from kvmnest.coverage.record import Record


def add_parser(subparsers: Any) -> None:
    """Add the verb."""
    from kvmnest.cli import fuzz_programs, run_options
    from kvmnest.cli.fuzz import add_fuzz_options, add_what

    parser = subparsers.add_parser(
        "coverage",
        help="tell which lines of KVM run in the lab",
        description="Build KVM's modules so that they tell which basic blocks run, run cases, the"
        " fuzzer or a command on them in the lab, and tell which lines were reached. A line counts"
        " as covered if a basic block that begins on it ran.",
    )
    verbs = parser.add_subparsers(dest="coverage_verb", required=True, metavar="VERB")
    run_parser = verbs.add_parser("run", help="of cases: arguments are those of kvmnest run")
    run_options.add_options(run_parser)
    fuzz_parser = verbs.add_parser("fuzz", help="of kvmnest fuzz, whose arguments it takes")
    add_what(fuzz_parser)
    add_fuzz_options(fuzz_parser)
    fuzz_programs.add_options(fuzz_parser)
    add_options(fuzz_parser)
    command_parser = verbs.add_parser(
        "command",
        help="of a command in the lab",
        usage="kvmnest coverage command [options] -- COMMAND...",
    )
    add_options(command_parser)
    command_parser.add_argument("--limit", type=seconds, metavar="SECONDS", help="end it then")
    command_parser.add_argument("command", nargs="+", metavar="COMMAND")
    show_parser = verbs.add_parser("show", help="of files that --data wrote, taken together")
    show_parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    for each in (run_parser, fuzz_parser, command_parser):
        each.epilog = (
            "exit codes: those of what is run; 2 usage, 3 the modules cannot be built, or harness"
            " or environment error, 130 interrupted"
        )
        group = each.add_argument_group("what is watched")
        group.add_argument(
            "--source",
            action="append",
            default=[],
            metavar="FILE",
            help="a C file of arch/x86/kvm, as vmx/nested.c (repeatable; default: vmx/nested.c and"
            " vmx/vmx.c)",
        )
        group.add_argument("--add", action="store_true", help="to what --data FILE already holds")
    for each in (run_parser, fuzz_parser, command_parser, show_parser):
        group = each.add_argument_group("coverage")
        group.add_argument("--data", type=Path, metavar="FILE", help="keep it as JSON")
        group.add_argument(
            "--against", type=Path, metavar="FILE", help="tell what is new against this --data"
        )
        group.add_argument(
            "--missing", action="store_true", help="name functions and lines that did not run"
        )
        group.add_argument(
            "--pages", type=Path, metavar="DIR", help="write an HTML page for each source file"
        )


def run(options: argparse.Namespace) -> int:
    """Run the verb."""
    from kvmnest.coverage import record as records

    require_writable(options.data)
    if options.pages and options.pages.exists() and not options.pages.is_dir():
        raise UsageError(f"{options.pages} is not a directory")
    old = records.load(options.against) if options.against else None
    if options.coverage_verb == "show":
        whole, *others = map(records.load, options.files)
        for other in others:
            whole.add(other)
        _tell(options, whole, old)
        return 0
    if options.add and not options.data:
        raise UsageError("--add needs --data FILE")
    before = records.load(options.data) if options.add and options.data.exists() else None
    collector = collector_for(options, before, old)
    try:
        status = _RUN[options.coverage_verb](options, collector)
    finally:
        # What was found must not be lost with the rest.
        if collector.told:
            whole = collector.record
            if before:
                before.add(whole)
                whole = before
            _tell(options, whole, old)
    if not collector.told:
        raise HarnessError("the lab told of no block: nothing ran, or it was lost at once")
    return status


def _run(options: argparse.Namespace, collector: Collector) -> int:
    from kvmnest.cli import run as verb
    from kvmnest.coverage.collect import CoveredTarget

    return verb.run(options, partial(CoveredTarget, collector))


def _fuzz(options: argparse.Namespace, collector: Collector) -> int:
    from kvmnest.cli import fuzz
    from kvmnest.coverage.collect import CoveredMachine

    if options.seed is None:
        options.seed = random.SystemRandom().randrange(1 << 32)
    return fuzz.run(options, partial(CoveredMachine, collector, options.seed), collector)


def _command(options: argparse.Namespace, collector: Collector) -> int:
    from kvmnest.coverage.collect import run_command
    from kvmnest.lab.machine import Lab, write_error

    lab = Lab(
        options.kernel,
        kvm_params=parameters(options.kvm_param),
        kvm_modules=options.kvm_modules,
        emulator=emulator(options),
    )
    status = run_command(collector, lab, options.command, write_error, options.limit)
    return status if status >= 0 else 128 - status


_RUN = {"run": _run, "fuzz": _fuzz, "command": _command}


def _tell(options: argparse.Namespace, found: Record, old: Record | None) -> None:
    from kvmnest.coverage import record, text

    if options.data:
        record.save(found, options.data)
    lines: list[str] = [*text.summary(found)]
    lines += text.missing(found) if options.missing else ()
    lines += text.news(found, old) if old else ()
    for line in lines:
        print(line, flush=True)
    if options.pages:
        _write_pages(found, options.pages)


def _write_pages(found: Record, folder: Path) -> None:
    from kvmnest.coverage import page
    from kvmnest.kernel import source

    tree = source.prepare(found.kernel)
    if tree.version != found.version:
        raise HarnessError(
            f"the coverage is of {found.version}, the source at hand of {tree.version}"
        )
    texts = {name: (tree.tree / name).read_text(encoding="utf-8") for name in found.sources}
    written: Sequence[Path] = page.write(found, texts, folder)
    print(f"pages: {written[0]}")
