"""The options of ``kvmnest run``, and what the results and a rerun make of them."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kvmnest import settings
from kvmnest.cli.lab import add_options as add_lab_options
from kvmnest.cli.lab import parameters
from kvmnest.cli.numbers import seconds
from kvmnest.kmsg import LEVELS, WARNING
from kvmnest.known import REFERENCE


def add_options(parser: Any) -> None:
    """What to run, in which lab, how, and the reports."""
    _add_selection(parser)
    _add_lab(parser.add_argument_group("lab"))
    _add_manner(parser.add_argument_group("how"))
    _add_reports(parser.add_argument_group("reports"))


def _add_selection(parser: Any) -> None:
    parser.add_argument("selected", nargs="*", metavar="CASE|PATH", help="ids or files to run")
    parser.add_argument("-k", dest="keyword", default="", metavar="EXPR", help="as in pytest")
    parser.add_argument("-m", dest="marks", default="", metavar="EXPR", help="as in pytest")
    parser.add_argument(
        "--deselect", action="append", default=[], metavar="CASE", help="leave a case or file out"
    )
    parser.add_argument(
        *("--lf", "--last-failed"),
        dest="last_failed",
        action="store_true",
        help="only what failed the last time it ran, all if nothing did",
    )
    parser.add_argument(
        *("-x", "--exitfirst"),
        dest="maxfail",
        action="store_const",
        const=1,
        default=0,
        help="stop at the first failure",
    )
    parser.add_argument("--maxfail", type=int, metavar="N", help="stop after N failures")


def _add_lab(lab: Any) -> None:
    add_lab_options(lab)
    lab.add_argument(
        "-j",
        "--jobs",
        type=int,
        metavar="N",
        help="labs at once that share the cases (default: one for each core, at most 4)",
    )
    lab.add_argument("--cpus", type=int, default=1, metavar="N", help="CPUs (default: 1)")
    lab.add_argument(
        "--settings",
        nargs="+",
        default=[],
        metavar="NAME",
        help="then run again under these settings of KVM, each a set of parameters"
        f" ({', '.join(setting.name for setting in settings.every())}; all: every one),"
        " the cases that may answer differently; results are called CASE@NAME",
    )
    lab.add_argument(
        "--every-case",
        action="store_true",
        help="with --settings: run all cases again under each setting",
    )


def _add_manner(how: Any) -> None:
    how.add_argument(
        "--nested-roundtrip",
        action="store_true",
        help="save, destroy, rebuild and restore the VM between the commands of every case",
    )
    how.add_argument("--shuffle", type=int, metavar="SEED", help="run in a seeded random order")
    how.add_argument(
        "--budget",
        type=seconds,
        default=5.0,
        metavar="SECONDS",
        help="time after which a vCPU that does not come back counts as hung (default: 5)",
    )
    how.add_argument(
        "--kernel-log",
        choices=LEVELS[WARNING:],
        default=LEVELS[WARNING],
        metavar="LEVEL",
        help="keep kernel messages of this level and more severe ones with each case: warning"
        " (default), notice, info or debug; a WARNING, BUG, oops or the like fails the case",
    )
    how.add_argument(
        "--strict-known",
        action="store_true",
        help="exit 1 when a known deviation no longer happens",
    )


def _add_reports(out: Any) -> None:
    out.add_argument("--json", type=Path, metavar="FILE", help="results, whole after each case")
    out.add_argument("--junit", type=Path, metavar="FILE", help="JUnit XML")
    out.add_argument("--html", type=Path, metavar="FILE", help="a page, at the end of the run")
    out.add_argument("--ktap", type=Path, metavar="FILE", help="KTAP version 1, at the end")
    out.add_argument("-v", "--verbose", action="store_true", help="a line for each case")
    out.add_argument(
        "--durations", type=int, default=0, metavar="N", help="name the N slowest cases"
    )
    out.add_argument(
        "--color",
        choices=("auto", "yes", "no"),
        default="auto",
        help="colour outcomes (default: on a terminal, unless NO_COLOR is set)",
    )
    out.add_argument("-q", "--quiet", action="store_true", help="exit code and files only")


def recorded(options: argparse.Namespace) -> dict[str, Any]:
    """Options that belong to the results."""
    left_out = ("verb", "json", "junit", "html", "ktap", "quiet", "verbose", "durations", "color")
    return {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(options).items()
        if name not in left_out and value not in (None, False, [], "")
    }


def again(
    options: argparse.Namespace, target: str, params: Mapping[str, str] | None = None
) -> Callable[[str], str]:
    """What gives the command that runs one case again."""
    name = target if target in ("kvm", REFERENCE) else "lab"
    words = ["kvmnest", "run", "--target", name]
    for name in ("kernel", "kvm_modules", "boot", "bochs", "cpu_model", "qemu"):
        value = getattr(options, name)
        if value is not None:
            words += [f"--{name.replace('_', '-')}", str(value)]
    for name, value in {**parameters(options.kvm_param), **(params or {})}.items():
        words += ["--kvm-param", f"{name}={value}"]
    if options.cpus != 1:
        words += ["--cpus", str(options.cpus)]
    if options.nested_roundtrip:
        words.append("--nested-roundtrip")
    command = shlex.join(words)
    return lambda case_id: f"{command} {shlex.quote(case_id)}"
