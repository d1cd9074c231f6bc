"""``kvmnest bisect``: the kernel or the commit that changed the outcome of a case."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvmnest.cli.lab import add_options, emulator, first_given, parameters
from kvmnest.cli.numbers import seconds
from kvmnest.errors import KvmnestError, UsageError

if TYPE_CHECKING:
    from kvmnest.bisect.plan import Plan
    from kvmnest.bisect.probe import Answer


def add_parser(subparsers: Any) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "bisect",
        help="find the kernel or the commit that changed the outcome of a case",
        usage="kvmnest bisect --good SPEC --bad SPEC (--case ID | --repro ID) [options] |"
        " kvmnest bisect --git DIR --good REV --bad REV --build CMD ... |"
        " kvmnest bisect step (--case ID | --repro ID) [--kernel SPEC] [--kvm-modules DIR] |"
        " kvmnest bisect log [--git DIR | --state PATH] | kvmnest bisect stop [--state DIR]",
        description="Without --git: over Debian's kernels between two, or --kernels. With --git:"
        " over commits, each built with CMD. step: one answer, for `git bisect run`. log: the"
        " steps of the last search. stop: give up a search of --boot reboot.",
        epilog="exit codes: 0 found, or the machine restarts (step: good), 1 step: bad, 125 step:"
        " cannot be tested, 129 step: usage, harness or environment error, 2 usage or good and"
        " bad are not, 3 harness or environment error, 130 interrupted",
    )
    parser.add_argument("words", nargs="*", metavar="step|log|stop")
    parser.add_argument("--good", metavar="SPEC|REV")
    parser.add_argument("--bad", metavar="SPEC|REV")
    parser.add_argument("--case", metavar="ID", help="case, or file of cases, of the suite")
    parser.add_argument("--repro", metavar="ID", help="bug as in kvmnest repro")
    parser.add_argument("--find", choices=("bug", "fix"), default="bug", help="what to look for")
    parser.add_argument("--kernels", metavar="SPEC,...", help="these, in this order")
    parser.add_argument("--git", type=Path, metavar="DIR", help="bisect commits of this work tree")
    parser.add_argument("--build", metavar="CMD", help="command that builds a commit, run in DIR")
    parser.add_argument(
        "--build-limit",
        type=seconds,
        metavar="SECONDS",
        help="a build that takes longer has failed",
    )
    parser.add_argument("--repeat", type=int, default=1, metavar="N", help="runs that must agree")
    parser.add_argument(
        "--state", type=Path, metavar="PATH", help="where the steps are kept (default: the cache"
        " of kvmnest; with --git the git directory)",
    )  # fmt: skip
    parser.add_argument("--continue", dest="go_on", action="store_true", help="go on")
    add_options(parser, boots=("lab", "qemu", "reboot"))
    group = parser.add_argument_group(
        "--boot reboot", "each kernel is installed on this machine, which is restarted into it"
    )
    group.add_argument("--install", metavar="CMD", help="installs what --build built (default:"
        " make INSTALL_MOD_STRIP=1 modules_install install)")  # fmt: skip
    group.add_argument("--release", metavar="CMD", help="prints the release of what --build built"
        " (default: make -s kernelrelease)")  # fmt: skip
    group.add_argument("--keep-kernels", action="store_true", help="remove no kernel afterwards")
    group.add_argument("--stay", action="store_true", help="at the end do not restart into the"
        " kernel that ran at the beginning")  # fmt: skip
    group.add_argument("--dry-run", action="store_true", help="print the commands, change nothing")


def run(options: argparse.Namespace) -> int:
    """Run the verb."""
    if options.words not in ([], ["step"], ["log"], ["stop"]):
        raise UsageError(f"unexpected: {' '.join(options.words)}")
    if options.words == ["log"]:
        return _log(options)
    if options.repeat < 1:
        raise UsageError(f"--repeat must be at least 1, not {options.repeat}")
    if options.build_limit is not None and options.build_limit <= 0:
        raise UsageError(f"--build-limit must be above 0, not {options.build_limit:g}")
    if options.words == ["step"]:
        if options.boot == "reboot":
            raise UsageError("step has no --boot reboot: a restart ends git bisect run")
        return _step(options)
    if options.boot == "reboot" or options.words == ["stop"]:
        return _reboot(options)
    given = first_given(options, *_REBOOT_ONLY)
    if given:
        raise UsageError(f"{given} needs --boot reboot")
    signal.signal(signal.SIGTERM, _terminated)
    plan = _plan(options)
    if not (options.good and options.bad) and not (options.git and options.go_on):
        raise UsageError("say --good and --bad")
    return _commits(options, plan) if options.git else _kernels(options, plan)


_REBOOT_ONLY = ("install", "release", "keep_kernels", "stay", "dry_run")
_LAB_ONLY = ("kernel", "kvm_modules", "bochs", "qemu")
_SEARCH = ("case", "repro", "good", "bad", "git", "kernels", "build", "kvm_param", *_REBOOT_ONLY)


def _plan(options: argparse.Namespace) -> Plan:
    from kvmnest.bisect import plan
    from kvmnest.lab.emulators import BOCHS

    # With --boot reboot there is none.
    chosen = BOCHS if options.boot == "reboot" else emulator(options)
    if bool(options.case) == bool(options.repro):
        raise UsageError("say one of --case and --repro")
    case, params = options.case, parameters(options.kvm_param)
    if options.repro:
        from kvmnest.repro import corpus

        if corpus.is_file(options.repro):
            raise UsageError(f"--repro takes an id, not a file ({options.repro})")
        bugs = corpus.select([options.repro])
        if len(bugs) > 1:
            names = ", ".join(bug.id for bug in bugs)
            raise UsageError(f"{options.repro} names several bugs, say one: {names}")
        (bug,) = bugs
        case, params = bug.case, {**bug.params, **params}
    return plan.Plan(
        case=case,
        params=params,
        find=options.find,
        repeat=options.repeat,
        good=options.good or "",
        bad=options.bad or "",
        git=os.path.realpath(options.git) if options.git else "",
        build=options.build or "",
        limit=options.build_limit,
        kernel=options.kernel,
        kvm_modules=options.kvm_modules,
        boot=chosen.boot,
        emulator=chosen.program,
    )


#: Above 127 stops ``git bisect run``, to which 2 and 3 would mean bad.
_NO_ANSWER = 129


def _step(options: argparse.Namespace) -> int:
    from kvmnest.bisect.probe import EXIT_CODES

    try:
        plan = _plan(options)
        answer = plan.question.ask(plan.kernel, _modules(plan, Path()))
    except KvmnestError as error:
        print(f"kvmnest: {error}", file=sys.stderr)
        return _NO_ANSWER
    print(f"{answer.verdict}: {answer.text}")
    return EXIT_CODES[answer.verdict]


def _modules(plan: Plan, base: Path) -> Path | None:
    return base / plan.kvm_modules if plan.kvm_modules else None


def _say(line: str) -> None:
    print(line, flush=True)


def _kernels(options: argparse.Namespace, plan: Plan) -> int:
    from dataclasses import replace

    from kvmnest.bisect import over
    from kvmnest.bisect.plan import choose_kernels

    names = choose_kernels(options.kernels, options.good, options.bad)
    plan = replace(plan, kernels=names)
    path = options.state or plan.journal

    def ask(name: str) -> Answer:
        return plan.question.ask(name, _modules(plan, Path()))

    return _told(
        lambda: over.kernels(plan, path, ask, _say, go_on=options.go_on),
        "--continue goes on with the next kernel",
    )


def _commits(options: argparse.Namespace, plan: Plan) -> int:
    from kvmnest.bisect import git, over

    if not plan.build:
        raise UsageError("--git needs --build CMD")
    folder = Path(plan.git)
    repository = git.Repository(folder)

    def ask() -> Answer:
        failed = plan.build_commit()
        return failed or plan.question.ask(plan.kernel or plan.git, _modules(plan, folder))

    def hint() -> str:
        end = f"; git bisect reset gives it up, HEAD is {repository.describe()}"
        return f"--continue goes on in {folder}{end if repository.bisecting else ''}"

    return _told(lambda: over.commits(plan, options.state, ask, _say, go_on=options.go_on), hint)


def _told(search: Callable[[], list[str]], hint: str | Callable[[], str]) -> int:
    """Print the result of a search, or when it is interrupted how it goes on."""
    try:
        lines = search()
    except (KeyboardInterrupt, SystemExit):
        print(f"interrupted: {hint if isinstance(hint, str) else hint()}", file=sys.stderr)
        raise
    print("\n".join(lines))
    return 0


def _reboot(options: argparse.Namespace) -> int:
    from kvmnest.bisect.reboot import dry, fitness, session, state
    from kvmnest.bisect.reboot.commands import Commands
    from kvmnest.bisect.reboot.debian_grub import DebianGrub
    from kvmnest.bisect.reboot.host import RebootNeeded

    folder = Path(os.path.realpath(options.state or state.FOLDER))
    if options.dry_run:
        dry.dry_run(_reboot_plan(options), folder, _say)
        return 0
    fitness.require_root()
    machine = DebianGrub(Commands(), folder / "state.json")
    with state.locked(folder):
        if options.go_on or options.words:
            given = first_given(options, *_SEARCH)
            if given:
                raise UsageError(f"{given} is settled already, in {folder}")
            found = state.load(folder)
            if found is None:
                raise UsageError(f"nothing to continue in {folder}")
            if options.words:
                session.stop(found)
        else:
            found = session.begin(
                folder, _reboot_plan(options), machine, keep_kernels=options.keep_kernels,
                stay=options.stay,
            )  # fmt: skip
        try:
            return session.go_on(found, machine, _say)
        except RebootNeeded as needed:
            _say(f"restarting into {needed.into}; it goes on by itself: journalctl -u {_UNIT}")
            machine.reboot()
            return 0


_UNIT = "kvmnest-bisect"


def _reboot_plan(options: argparse.Namespace) -> Plan:
    from dataclasses import replace

    from kvmnest.bisect.plan import choose_kernels
    from kvmnest.bisect.reboot.candidates import INSTALL, RELEASE

    given = first_given(options, *_LAB_ONLY)
    if given:
        raise UsageError(f"{given} is for the lab, not for --boot reboot")
    if not (options.good and options.bad):
        raise UsageError("say --good and --bad")
    plan = _plan(options)
    if options.git:
        if not plan.build:
            raise UsageError("--git needs --build CMD")
        install, release = options.install or INSTALL, options.release or RELEASE
        return replace(plan, install=install, release=release)
    names = choose_kernels(options.kernels, options.good, options.bad, here=True)
    return replace(plan, kernels=names)


def _log(options: argparse.Namespace) -> int:
    from kvmnest.bisect import git, journal
    from kvmnest.bisect.plan import folder
    from kvmnest.bisect.reboot.state import journal_in

    if options.state or options.git:
        path = options.state or git.Repository(Path(os.path.realpath(options.git))).journal
        path = journal_in(path) if path.is_dir() else path
    else:
        found = sorted(folder().glob("*.jsonl"), key=lambda path: path.stat().st_mtime)
        if not found:
            raise UsageError("no search over kernels so far (--git DIR: over its commits)")
        path = found[-1]
    steps = journal.load(path)
    if steps is None:
        raise UsageError(f"there is no {path}")
    print(f"{steps.header.question}\ngood is {steps.header.good}, bad is {steps.header.bad}")
    for step in steps.steps:
        print(f"{step.at}  {step.line}")
    print(steps.summary)
    return 0


def _terminated(number: int, _: object) -> None:
    # As with Ctrl-C: a build is ended, the work tree goes back.
    raise SystemExit(128 + number)
