"""``kvmnest run``: run cases and report."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any

from kvmnest import settings
from kvmnest.cases.events import Event
from kvmnest.cli import run_options
from kvmnest.cli.lab import emulator, first_given, lab_only, parameters
from kvmnest.errors import KvmnestError, UsageError, first_line
from kvmnest.files import require_writable
from kvmnest.host import require_kvm, why_not_kvm
from kvmnest.known import REFERENCE
from kvmnest.lab.debian import NEWEST
from kvmnest.reports.model import Run
from kvmnest.reports.progress import Progress, slowest
from kvmnest.run import last_failed, names, under_settings
from kvmnest.run.collect import Collecting
from kvmnest.run.judge import Judge
from kvmnest.run.lab_target import LabTarget
from kvmnest.run.loop import run_cases
from kvmnest.run.reference_target import ReferenceTarget
from kvmnest.run.report import Report
from kvmnest.run.selection import Selection, pytest_arguments, split_selection
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
    run_options.add_options(parser)


def run(options: argparse.Namespace, lab: MakeLab = LabTarget) -> int:
    """Run the verb; ``lab`` makes the target that boots the lab."""
    for name in ("maxfail", "durations"):
        if getattr(options, name) < 0:
            raise UsageError(f"--{name} must not be negative")
    failed = last_failed.among(options.selected) if options.last_failed else []
    selected = failed or options.selected
    split_selection(selected)  # a name that is nothing is told at once
    chosen = _settings(options)
    if options.jobs is not None and options.jobs < 1:
        raise UsageError(f"--jobs must be at least 1, not {options.jobs}")
    require_writable(options.json, options.junit, options.html, options.ktap)
    progress = Progress(
        sys.stdout,
        quiet=options.quiet,
        verbose=options.verbose,
        colour={"yes": True, "no": False}.get(options.color),
    )
    if options.last_failed and not failed:
        progress.line("--lf: none of these failed the last time, so all of them run")
    selection = Selection(
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
        target = _target(options, progress, selection, lab)
    except names.NothingSelected:
        empty = Run(emulator(options).boot, options=run_options.recorded(options))
        Report(empty, progress, json_path=options.json, junit_path=options.junit).finish(
            summary=False
        )
        raise
    report = Report(
        Run(target.name, target.emulator, options=run_options.recorded(options)),
        progress,
        json_path=options.json,
        junit_path=options.junit,
        strict_known=options.strict_known,
        maxfail=options.maxfail,
    )
    signal.signal(signal.SIGTERM, _terminated)
    _run_all(chosen, target, selection, report, options, lab)
    return _finish(report, options)


def _run_all(
    chosen: Sequence[settings.Setting],
    target: Target,
    selection: Selection,
    report: Report,
    options: argparse.Namespace,
    lab: MakeLab,
) -> None:
    """Run the cases; whatever ends that, the reports are whole and what failed is remembered."""
    try:
        if chosen:
            _run_under(chosen, target, selection, report, options, lab)
        else:
            _run(target, selection, report, options)
    except KvmnestError as error:
        report.run.problems.append(first_line(error))
        report.finish(summary=bool(report.run.cases))
        raise
    except (KeyboardInterrupt, SystemExit):
        report.run.problems.append("interrupted")
        report.finish()
        raise
    finally:
        last_failed.remember(report.run)


def _finish(report: Report, options: argparse.Namespace) -> int:
    """Write what is written at the end; returns the exit code."""
    if not (report.run.planned or report.run.problems):
        report.finish(summary=False)
        raise names.nothing(options.selected, options.keyword, options.marks)
    status = report.finish()
    if options.durations:
        for line in slowest(report.run, options.durations):
            report.note(line)
    if options.html or options.ktap:
        from kvmnest.reports import pages

        pages.write(report.run, options.html, options.ktap)
    return status


def _run(
    target: Target,
    selection: Selection,
    report: Report,
    options: argparse.Namespace,
    setting: settings.Setting = settings.DEFAULT,
) -> None:
    """Run the cases on one target, or dealt out to several like it, and tell the report."""
    modules, paths = split_selection(selection.selected)
    arguments = pytest_arguments(selection, target.name, modules, target.place(paths))
    targets = _split(target, arguments, options.jobs)
    rerun = run_options.again(options, target.name, setting.params)

    def judge(watch: Callable[[Event], None] = lambda event: None) -> Judge:
        return Judge(
            Run(target.name, target.emulator, options=report.run.options),
            report,
            setting=setting,
            rerun=rerun,
            own_clock=target.guest_clock or len(targets) > 1,
            watch=watch,
        )

    if len(targets) > 1:
        Shards(report, judge).run(targets, arguments)
    else:
        run_cases(targets[0], arguments, judge())


def _settings(options: argparse.Namespace) -> Sequence[settings.Setting]:
    """The settings that are asked for. Raises UsageError."""
    if options.every_case and not options.settings:
        raise UsageError("--every-case needs --settings")
    return settings.choose(options.settings)


def _run_under(
    chosen: Sequence[settings.Setting],
    default: Target,
    selection: Selection,
    report: Report,
    options: argparse.Namespace,
    lab: MakeLab,
) -> None:
    """Run all under the default, and under each setting again what may answer differently."""
    assert isinstance(default, LabTarget)
    progress = report.progress
    report.more_to_come = True
    _run(default, selection, report, options)
    first = [*report.run.cases]
    for setting in chosen:
        only = under_settings.chosen(setting, first, every_case=options.every_case)
        if report.run.stopped or not only:
            continue
        why = setting.why_left_out(default.release, report.run.facts.get("cpu_flags", ""))
        if why:
            progress.line(f"{setting.name}: left out, {why}")
            continue
        progress.line(f"{setting.name} ({_shown(setting.params)}): {len(only)} cases")
        try:
            target = _lab(options, progress, setting.params, lab)
            _run(target, dataclasses.replace(selection, only=only), report, options, setting)
        except KvmnestError as error:
            report.problem(f"{setting.name}: {first_line(error)}")
    report.no_more()
    for line in under_settings.lines(report.run, chosen):
        progress.line(line)


def _shown(params: Mapping[str, str]) -> str:
    return " ".join(f"{name}={value}" for name, value in params.items())


def _target(
    options: argparse.Namespace, progress: Progress, selection: Selection, lab: MakeLab
) -> Target:
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
    modules, paths = split_selection(selection.selected)
    with contextlib.ExitStack() as ending:
        collecting = None
        if not paths:  # files of the user are collected in the guest
            # While it runs the lab is prepared, which takes about as long.
            arguments = pytest_arguments(selection, emulator(options).boot, modules, [])
            collecting = ending.enter_context(Collecting(arguments))
            if _doubtful(selection, modules):
                # A kernel that may have to be fetched would be fetched for nothing.
                found = collecting.result()
                found.require_cases(selection.selected, selection.keyword, selection.marks)
        if reason:
            progress.line(f"target: the lab, because /dev/kvm cannot run L1: {reason}")
        if options.kernel is None and options.kvm_modules is None:
            progress.line("kernel: the newest that Debian has released (--kernel names another)")
        target = _lab(options, progress, {}, lab)
        target.collected = collecting.result() if collecting else None
    return target


def _doubtful(selection: Selection, modules: Sequence[str]) -> bool:
    """Whether it may be that nothing is selected of the suite."""
    names = any("[" in module for module in modules)
    return bool(selection.keyword or selection.marks or selection.deselected or names)


def _patience(options: argparse.Namespace) -> float:
    """Seconds without a sign of life after which the cases' process is lost."""
    return max(120.0, 4 * float(options.budget))


def _lab(
    options: argparse.Namespace,
    progress: Progress,
    params: Mapping[str, str],
    make: MakeLab,
) -> LabTarget:
    newest = options.kernel is None and options.kvm_modules is None
    return make(
        kernel=NEWEST if newest else options.kernel,
        kvm_modules=options.kvm_modules,
        kvm_params={**parameters(options.kvm_param), **params},
        cpus=options.cpus,
        emulator=emulator(options),
        patience=_patience(options),
        on_line=progress.line,
    )


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


def _terminated(number: int, frame: FrameType | None) -> None:
    # As with Ctrl-C: the child ends, the reports are finished, the exit code is the shell's.
    raise SystemExit(128 + number)
