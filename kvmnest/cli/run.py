"""``kvmnest run``: run cases and report."""

from __future__ import annotations

import argparse
import dataclasses
import os
import shlex
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from kvmnest import settings
from kvmnest.cli.lab import add_options as add_lab_options
from kvmnest.cli.lab import emulator, first_given, lab_only, parameters
from kvmnest.cli.numbers import seconds
from kvmnest.errors import KvmnestError, UsageError
from kvmnest.files import require_writable
from kvmnest.host import require_kvm, why_not_kvm
from kvmnest.kmsg import LEVELS, WARNING
from kvmnest.known import REFERENCE
from kvmnest.lab.debian import NEWEST
from kvmnest.reports.model import Run
from kvmnest.reports.progress import Progress, slowest
from kvmnest.run import last_failed, names, under_settings
from kvmnest.run.collect import Collected, collect
from kvmnest.run.lab_target import LabTarget
from kvmnest.run.loop import Plan, pytest_arguments, run_cases, split_selection
from kvmnest.run.reference_target import ReferenceTarget
from kvmnest.run.reporter import Reporter
from kvmnest.run.shards import Shards
from kvmnest.run.targets import LocalTarget, Target

_MOST_LABS = 4
MakeLab = Callable[..., LabTarget]
_CODES = "exit codes: 0 all passed or known, 1 a case failed, 2 usage, 3 harness or environment"


def add_parser(subparsers: Any) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "run",
        help="run the conformance suite, or some cases of it",
        description="Run the conformance suite, or the cases and test files named.",
        epilog=f"{_CODES} error, 4 nothing ran, 130 and 143 after SIGINT and SIGTERM",
    )
    parser.add_argument(
        "--target",
        choices=("auto", "kvm", "lab", "reference"),
        default="auto",
        help="this machine's /dev/kvm or a kernel in the software lab (default: /dev/kvm if it"
        " offers VMX to guests, else the lab); reference: no KVM, L1 on a bare CPU of Bochs",
    )
    add_run_options(parser)


def add_run_options(parser: Any) -> None:
    """What to run, in which lab, how, and the reports."""
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
    lab = parser.add_argument_group("lab")
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
    how = parser.add_argument_group("how")
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
    out = parser.add_argument_group("reports")
    out.add_argument("--json", type=Path, metavar="FILE", help="results, whole after each case")
    out.add_argument("--junit", type=Path, metavar="FILE", help="JUnit XML")
    out.add_argument("--html", type=Path, metavar="FILE", help="a page, at the end of the run")
    out.add_argument("--ktap", type=Path, metavar="FILE", help="KTAP version 1, at the end")
    out.add_argument("-v", "--verbose", action="store_true", help="a line for each case")
    out.add_argument(
        "--durations", type=int, default=0, metavar="N", help="name the N slowest cases"
    )
    out.add_argument("-q", "--quiet", action="store_true", help="exit code and files only")


def run(options: argparse.Namespace, lab: MakeLab = LabTarget) -> int:
    """Run the verb; ``lab`` makes the target that boots the lab."""
    for name in ("maxfail", "durations"):
        if getattr(options, name) < 0:
            raise UsageError(f"--{name} must not be negative")
    selected = last_failed.narrow(options.selected) if options.last_failed else options.selected
    split_selection(selected)  # a name that is nothing is told at once
    chosen = _settings(options)
    if options.jobs is not None and options.jobs < 1:
        raise UsageError(f"--jobs must be at least 1, not {options.jobs}")
    require_writable(options.json, options.junit, options.html, options.ktap)
    progress = Progress(sys.stdout, quiet=options.quiet, verbose=options.verbose)
    plan = Plan(
        selected=selected,
        keyword=options.keyword,
        marks=options.marks,
        deselected=options.deselect,
        budget=options.budget,
        nested_roundtrip=options.nested_roundtrip,
        shuffle=options.shuffle,
        kernel_log=options.kernel_log,
    )
    try:
        target = _target(options, progress, plan, lab)
    except names.NothingSelected:
        empty = Run(emulator(options).boot, options=_recorded(options))
        Reporter(empty, progress, json_path=options.json, junit_path=options.junit).finish(
            summary=False
        )
        raise
    reporter = Reporter(
        Run(target.name, target.emulator, options=_recorded(options)),
        progress,
        json_path=options.json,
        junit_path=options.junit,
        rerun=_rerun(options, target),
        strict_known=options.strict_known,
        maxfail=options.maxfail,
        own_clock=target.guest_clock,
    )
    signal.signal(signal.SIGTERM, _terminated)
    try:
        if chosen:
            _run_under(chosen, target, plan, reporter, options, lab)
        else:
            _run(target, plan, reporter, options.jobs)
    except KvmnestError as error:
        reporter.run.problems.append(str(error).partition("\n")[0])
        reporter.finish(summary=bool(reporter.run.cases))
        raise
    except (KeyboardInterrupt, SystemExit):
        reporter.run.problems.append("interrupted")
        reporter.finish()
        raise
    finally:
        last_failed.remember(reporter.run)
    if not (reporter.run.planned or reporter.run.problems):
        reporter.finish(summary=False)
        raise names.nothing(options.selected, options.keyword, options.marks)
    status = reporter.finish()
    if options.durations:
        for line in slowest(reporter.run, options.durations):
            progress.line(line)
    if options.html or options.ktap:
        from kvmnest.reports import pages

        pages.write(reporter.run, options.html, options.ktap)
    return status


def _run(target: Target, plan: Plan, reporter: Reporter, jobs: int | None) -> None:
    modules, paths = split_selection(plan.selected)
    arguments = pytest_arguments(plan, target.name, modules, target.place(paths))
    targets = _split(target, arguments, jobs)
    if len(targets) > 1:
        Shards(reporter).run(targets, arguments)
    else:
        run_cases(targets[0], arguments, reporter)


def _settings(options: argparse.Namespace) -> Sequence[settings.Setting]:
    """The settings that are asked for. Raises UsageError."""
    if options.every_case and not options.settings:
        raise UsageError("--every-case needs --settings")
    return settings.choose(options.settings)


def _run_under(
    chosen: Sequence[settings.Setting],
    default: Target,
    plan: Plan,
    whole: Reporter,
    options: argparse.Namespace,
    lab: MakeLab,
) -> None:
    """Run all under the default, and under each setting again what may answer differently."""
    assert isinstance(default, LabTarget)
    progress = whole.progress
    whole.more_to_come = True
    _part(default, plan, whole, settings.DEFAULT, options)
    first = [*whole.run.cases]
    for setting in chosen:
        only = under_settings.chosen(setting, first, every_case=options.every_case)
        if whole.run.stopped or not only:
            continue
        if not setting.exists_on(default.release):
            progress.line(f"{setting.name}: left out, this kernel has no such parameter")
            continue
        progress.line(f"{setting.name} ({_shown(setting.params)}): {len(only)} cases")
        try:
            target = _lab(options, progress, setting.params, lab)
            _part(target, dataclasses.replace(plan, only=only), whole, setting, options)
        except KvmnestError as error:
            whole.problem(f"{setting.name}: {str(error).partition(chr(10))[0]}")
    whole.more_to_come = False
    whole.run.complete = len(whole.run.cases) == len(whole.run.planned)
    for line in under_settings.lines(whole.run, chosen):
        progress.line(line)


def _part(
    target: LabTarget,
    plan: Plan,
    whole: Reporter,
    setting: settings.Setting,
    options: argparse.Namespace,
) -> None:
    rerun = _rerun(options, target, setting.params)
    part = under_settings.UnderSetting(whole, setting, rerun)
    try:
        _run(target, plan, part, options.jobs)
    finally:
        part.end()


def _shown(params: Mapping[str, str]) -> str:
    return " ".join(f"{name}={value}" for name, value in params.items())


def _target(options: argparse.Namespace, progress: Progress, plan: Plan, lab: MakeLab) -> Target:
    wants_lab = lab_only(options) or ("--cpus" if options.cpus != 1 else "")
    wants_lab = wants_lab or ("--settings" if options.settings else "")
    if options.target == "kvm":
        if wants_lab:
            raise UsageError(f"{wants_lab} needs --target lab: the host's kernel stays as it is")
        require_kvm()
        return LocalTarget(patience=_patience(options))
    if options.target == REFERENCE:
        return _reference(options)
    reason = why_not_kvm() if options.target == "auto" and not wants_lab else ""
    if options.target == "auto" and not (wants_lab or reason):
        progress.line("target: this machine's /dev/kvm, which offers VMX to guests")
        return LocalTarget(patience=_patience(options))
    collected = _collected(emulator(options).boot, plan)
    if reason:
        progress.line(f"target: the lab, because /dev/kvm cannot run L1: {reason}")
    if options.kernel is None and options.kvm_modules is None:
        progress.line("kernel: the newest that Debian has released (--kernel names another)")
    return _lab(options, progress, {}, lab, collected)


def _patience(options: argparse.Namespace) -> float:
    """Seconds without a sign of life after which the cases' process is lost."""
    return max(120.0, 4 * float(options.budget))


def _collected(name: str, plan: Plan) -> Collected | None:
    """What is selected of the suite, known before a kernel is prepared for it.

    None where that is not in doubt, or files of the user have to be asked, which run in the guest.
    Raises what ``Collected.require_cases`` raises.
    """
    modules, paths = split_selection(plan.selected)
    doubtful = plan.keyword or plan.marks or plan.deselected or any("[" in m for m in modules)
    if paths or not doubtful:
        return None
    collected = collect(pytest_arguments(plan, name, modules, []))
    collected.require_cases(plan.selected, plan.keyword, plan.marks)
    return collected


def _lab(
    options: argparse.Namespace,
    progress: Progress,
    params: Mapping[str, str],
    make: MakeLab,
    collected: Collected | None = None,
) -> LabTarget:
    newest = options.kernel is None and options.kvm_modules is None
    target = make(
        kernel=NEWEST if newest else options.kernel,
        kvm_modules=options.kvm_modules,
        kvm_params={**parameters(options.kvm_param), **params},
        cpus=options.cpus,
        emulator=emulator(options),
        patience=_patience(options),
        on_line=progress.line,
    )
    target.collected = collected
    return target


def _reference(options: argparse.Namespace) -> Target:
    useless = ("kernel", "kvm_modules", "kvm_param", "boot", "qemu", "nested_roundtrip")
    given = first_given(options, *useless) or ("--cpus" if options.cpus != 1 else "")
    if given:
        raise UsageError(f"{given} is nothing for --target reference, which has no KVM")
    return ReferenceTarget(options.bochs, options.cpu_model, _patience(options))


def _split(target: Target, arguments: Sequence[str], jobs: int | None) -> Sequence[Target]:
    """Deal the cases out to several labs; a real machine is not shared by two runs."""
    if jobs is None:
        jobs = min(len(os.sched_getaffinity(0)), _MOST_LABS)
    if isinstance(target, ReferenceTarget):
        return target.split(jobs)
    return target.split(arguments, jobs) if isinstance(target, LabTarget) else [target]


def _recorded(options: argparse.Namespace) -> dict[str, Any]:
    """Options that belong to the results."""
    left_out = ("verb", "json", "junit", "html", "ktap", "quiet", "verbose", "durations")
    return {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(options).items()
        if name not in left_out and value not in (None, False, [], "")
    }


def _rerun(
    options: argparse.Namespace, target: Target, params: Mapping[str, str] | None = None
) -> Callable[[str], str]:
    """What gives the command that runs one case again."""
    name = target.name if target.name in ("kvm", REFERENCE) else "lab"
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
    again = shlex.join(words)
    return lambda case_id: f"{again} {shlex.quote(case_id)}"


def _terminated(number: int, frame: FrameType | None) -> None:
    # As with Ctrl-C: the child ends, the reports are finished, the exit code is the shell's.
    raise SystemExit(128 + number)
