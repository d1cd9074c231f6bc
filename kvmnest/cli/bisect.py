"""``kvmnest bisect``: the kernel or the commit that changed the outcome of a case."""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvmnest.cli.lab import add_options, emulator, parameters
from kvmnest.errors import HarnessError, UsageError

if TYPE_CHECKING:
    from kvmnest.bisect.probe import Answer, Question


def add_parser(subparsers: Any) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "bisect",
        help="find the kernel or the commit that changed the outcome of a case",
        usage="kvmnest bisect --good SPEC --bad SPEC (--case ID | --repro ID) [options] |"
        " kvmnest bisect --git DIR --good REV --bad REV --build CMD ... |"
        " kvmnest bisect step (--case ID | --repro ID) [--kernel SPEC] [--kvm-modules DIR]",
        description="Without --git: over Debian's kernels between two, or --kernels. With --git:"
        " over commits, each built with CMD. step: one answer, for `git bisect run`.",
        epilog="exit codes: 0 found (step: good), 1 step: bad, 125 step: cannot be tested,"
        " 2 usage or good and bad are not, 3 harness or environment error, 130 interrupted",
    )
    parser.add_argument("words", nargs="*", metavar="step")
    parser.add_argument("--good", metavar="SPEC|REV")
    parser.add_argument("--bad", metavar="SPEC|REV")
    parser.add_argument("--case", metavar="ID", help="case, or file of cases, of the suite")
    parser.add_argument("--repro", metavar="ID", help="bug as in kvmnest repro")
    parser.add_argument("--find", choices=("bug", "fix"), default="bug", help="what to look for")
    parser.add_argument("--kernels", metavar="SPEC,...", help="these, in this order")
    parser.add_argument("--git", type=Path, metavar="DIR", help="bisect commits of this work tree")
    parser.add_argument("--build", metavar="CMD", help="command that builds a commit, run in DIR")
    parser.add_argument("--repeat", type=int, default=1, metavar="N", help="runs that must agree")
    parser.add_argument("--state", type=Path, metavar="FILE", help="where answers are kept")
    parser.add_argument("--continue", dest="go_on", action="store_true", help="go on")
    add_options(parser)


def run(options: argparse.Namespace) -> int:
    """Run the verb."""
    if options.words not in ([], ["step"]):
        raise UsageError(f"unexpected: {' '.join(options.words)}")
    if options.repeat < 1:
        raise UsageError(f"--repeat must be at least 1, not {options.repeat}")
    question = _question(options)
    if options.words:
        from kvmnest.bisect.probe import EXIT_CODES

        answer = question.ask(options.kernel, _modules(options, Path()))
        print(f"{answer.verdict}: {answer.evidence}")
        return EXIT_CODES[answer.verdict]
    if not (options.good and options.bad) and not (options.git and options.go_on):
        raise UsageError("say --good and --bad")
    return _commits(options, question) if options.git else _kernels(options, question)


def _question(options: argparse.Namespace) -> Question:
    from kvmnest.bisect.probe import Question

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
    return Question(case, params, options.repeat, emulator(options))


def _asked(options: argparse.Namespace, question: Question) -> str:
    """What the answers belong to: those to another question are of no use."""
    words = [options.find, question.case, str(sorted(question.params.items()))]
    if question.emulator.boot != "lab":
        words.append(question.emulator.boot)
    return " ".join(words)


def _modules(options: argparse.Namespace, base: Path) -> Path | None:
    return base / options.kvm_modules if options.kvm_modules else None


def _swap(options: argparse.Namespace, answer: Answer) -> Answer:
    """For --find fix "bad" is what is looked for: the case passes."""
    from dataclasses import replace

    if options.find == "bug":
        return answer
    other = {"good": "bad", "bad": "good"}
    return replace(answer, verdict=other.get(answer.verdict, answer.verdict))


def _kernels(options: argparse.Namespace, question: Question) -> int:
    from kvmnest.bisect import search
    from kvmnest.lab import kernels

    names = options.kernels.split(",") if options.kernels else []
    if names and not {options.good, options.bad} <= set(names):
        raise UsageError("--kernels must hold --good and --bad")
    if not names:
        names = kernels.between(options.good, options.bad)
    else:
        names = names[names.index(options.good) : names.index(options.bad) + 1]
    if len(names) < 2:
        raise UsageError(f"no kernels from {options.good} to {options.bad}: are they swapped?")
    asked = _asked(options, question)
    log = search.Log(options.state, asked)
    if options.go_on:
        if not options.state:
            raise UsageError("--continue needs the --state file of the search")
        log = search.load_log(options.state, asked)
    print(f"{len(names)} kernels from {names[0]} to {names[-1]}", flush=True)
    found = search.search(
        names,
        lambda name: _swap(options, question.ask(name, _modules(options, Path()))),
        log,
        _show,
    )
    what = "fixed" if options.find == "fix" else "first bad"
    print(f"{what}: {found.first_bad}")
    print(f"before: {found.last_good}: {log.answers[found.last_good].evidence}")
    print(f"since:  {found.first_bad}: {log.answers[found.first_bad].evidence}")
    if found.skipped:
        print(f"not tested in between: {', '.join(found.skipped)}")
    return 0


def _show(name: str, answer: Answer) -> None:
    print(f"{answer.verdict:4}  {name}: {answer.evidence}", flush=True)


def _commits(options: argparse.Namespace, question: Question) -> int:
    from kvmnest.bisect import git
    from kvmnest.bisect.probe import SKIP, Answer

    if not options.build:
        raise UsageError("--git needs --build CMD")
    folder = options.git.resolve()
    repository = git.Repository(folder)
    command = shlex.split(options.build)

    def ask() -> Answer:
        try:
            done = subprocess.run(
                command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True,
                text=True, errors="replace", check=False,
            )  # fmt: skip
        except OSError as error:
            raise UsageError(f"cannot run {command[0]}: {error.strerror}") from error
        if done.returncode:
            lines = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
            if any("No space left on device" in line for line in lines):
                free = shutil.disk_usage(folder).free >> 20
                raise HarnessError(f"no space left for the build in {folder} ({free} MiB free)")
            return Answer(SKIP, f"the build fails: {lines[-1]}", kind="build")
        answer = question.ask(options.kernel or str(folder), _modules(options, folder))
        return _swap(options, answer)

    asked = f"{_asked(options, question)} {options.build}"
    try:
        found, journal = git.bisect(
            repository, options.good, options.bad, ask, _show,
            question=asked, state=options.state, go_on=options.go_on,
        )  # fmt: skip
    except KeyboardInterrupt:
        print(f"interrupted: --continue goes on in {folder}", file=sys.stderr)
        raise
    if found.last_good:
        evidence = journal.answers[found.last_good].evidence
        print(f"before: {repository.describe(found.last_good)}: {evidence}")
    since = journal.answers[found.first_bad].evidence
    print(f"since:  {repository.describe(found.first_bad)}: {since}")
    print(f"all steps: {journal.path}")
    what = "fixed by" if options.find == "fix" else "first bad commit"
    print(f"{what}: {repository.describe(found.first_bad)}")
    return 0
