"""One run of cases on one target: starts the process, restarts it when it is lost."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvmnest.cases.events import DamagedEvent, Event
from kvmnest.errors import HarnessError, KvmnestError, UsageError
from kvmnest.reports.model import Run
from kvmnest.reports.progress import Progress
from kvmnest.run import names
from kvmnest.run.collect import why_broken
from kvmnest.run.reporter import Enough, Reporter
from kvmnest.run.targets import Ended, Stuck, Target

_INTERRUPTED = 2  # pytest.ExitCode.INTERRUPTED

#: Losses in a row without a finished case in between, after which a run gives up.
MOST_LOSSES = 3

# Plugins of pytest that no case uses; each costs time, most of all in the lab.
_UNUSED_PLUGINS = (
    "cacheprovider",
    "debugging",
    "doctest",
    "faulthandler",
    "junitxml",
    "legacypath",
    "logging",
    "nose",
    "pastebin",
    "recwarn",
    "setuponly",
    "setupplan",
    "stepwise",
    "subtests",
    "threadexception",
    "unittest",
    "unraisableexception",
    "warnings",
)

_SUITE = "kvmnest.suite"
_REPRODUCERS = "kvmnest.repro.bugs."
_SUITE_FILE = re.compile(r"(test_\w+)(?:\.py)?((?:::.*)?)", re.DOTALL)


@dataclass(frozen=True)
class Plan:
    """Which cases to run and how.

    ``selected`` holds ids of the suite ("test_vmxon.py", "test_vmxon.py::test_name[param]") and
    paths of further test files; empty means the whole suite. ``only``, if it is not empty, are the
    ids of the cases of the suite to run among those. ``budget`` is in seconds of the target's
    clock.
    """

    selected: Sequence[str] = ()
    keyword: str = ""
    marks: str = ""
    deselected: Sequence[str] = ()
    only: Sequence[str] = ()
    budget: float = 5.0
    nested_roundtrip: bool = False
    shuffle: int | None = None
    kernel_log: str = "warning"


def split_selection(selected: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return (arguments that name modules of kvmnest, paths of other files).

    The modules are those of the suite and, by their dotted names, the reproducers. A case may be
    named by its function alone, if one file only has it. Raises UsageError for what is neither a
    file nor one of them.
    """
    if not selected:
        return [_SUITE], []
    suite_dir = Path(__file__).parent.parent / "suite"
    modules, paths = [], []
    for name in selected:
        if name.startswith(_REPRODUCERS):
            modules.append(name)
            continue
        path = Path(name.partition("::")[0])
        if not path.exists() and not (suite_dir / path.with_suffix(".py").name).is_file():
            name = names.complete(name)
        found = _SUITE_FILE.fullmatch(name)
        if found and (suite_dir / f"{found[1]}.py").is_file() and not path.exists():
            if not names.is_case(found[1], found[2]):
                raise names.unknown(name)
            modules.append(f"{_SUITE}.{found[1]}{found[2]}")
        elif path.exists() and path.resolve().is_relative_to(suite_dir.resolve()):
            inside = path.resolve().relative_to(suite_dir.resolve()).with_suffix("")
            dotted = ".".join((_SUITE, *inside.parts))
            modules.append(dotted + name[len(name.partition("::")[0]) :])
        elif path.exists():
            paths.append(name)
        else:
            raise names.unknown(name)
    return modules, paths


def pytest_arguments(plan: Plan, target: str, modules: list[str], paths: list[str]) -> list[str]:
    """Arguments for ``python -m pytest``, without the event channel and the starting point."""
    arguments = ["-p", "kvmnest.plugin"]
    for name in _UNUSED_PLUGINS:
        arguments += ["-p", f"no:{name}"]
    if not paths:
        # The suite obeys no configuration of the folder that one happens to stand in.
        arguments += ["-c", "/dev/null", "--rootdir", "/"]
    arguments += ["--capture=fd", "--tb=short", "-q", "--color=no", "--require-kvm"]
    arguments += [f"--kvmnest-target={target}", f"--kvmnest-budget={plan.budget:g}"]
    if plan.kernel_log != "warning":
        arguments.append(f"--kernel-log={plan.kernel_log}")
    if plan.nested_roundtrip:
        arguments.append("--nested-roundtrip")
    if plan.shuffle is not None:
        arguments.append(f"--kvmnest-shuffle={plan.shuffle}")
    if plan.keyword:
        arguments += ["-k", plan.keyword]
    if plan.marks:
        arguments += ["-m", plan.marks]
    arguments += [f"--kvmnest-deselect={name}" for name in plan.deselected]
    arguments += [f"--kvmnest-only={name}" for name in plan.only]
    # With --pyargs pytest looks for a module of a path's name, and then leaves the file's
    # assertions as they are.
    return [*arguments, *(["--pyargs"] if modules else []), *modules, *paths]


def outcome(
    target: Target,
    plan: Plan,
    options: Sequence[str] = (),
    on_event: Callable[[Event], None] = lambda event: None,
) -> Run:
    """Run cases without a word: what became of them.

    ``options`` are more of pytest's; ``on_event`` sees each event first. Raises what ``run_cases``
    raises.
    """
    run = Run(target.name, target.emulator)
    reporter = _Watched(run, on_event, own_clock=target.guest_clock)
    modules, paths = split_selection(plan.selected)
    arguments = pytest_arguments(plan, target.name, modules, target.place(paths))
    run_cases(target, [*options, *arguments], reporter)
    return run


class _Watched(Reporter):
    def __init__(self, run: Run, watch: Callable[[Event], None], *, own_clock: bool) -> None:
        super().__init__(run, Progress(io.StringIO(), quiet=True), own_clock=own_clock)
        self._watch = watch

    def event(self, event: Event) -> None:
        self._watch(event)
        super().event(event)


def run_cases(target: Target, arguments: Sequence[str], reporter: Reporter) -> None:
    """Run all cases, in as many processes as it takes, or until the reporter has enough.

    Raises UsageError if pytest refuses the selection, HarnessError (or what the target raises) if
    no case could be started at all. Trouble after that becomes part of the results.
    """
    with contextlib.suppress(Enough):
        _run_cases(target, arguments, reporter)


def _run_cases(target: Target, arguments: Sequence[str], reporter: Reporter) -> None:
    losses = 0
    while True:
        done = len(reporter.run.cases)
        reporter.ended = None
        try:
            ended = target.run(arguments, reporter.event, done)
        except DamagedEvent as error:
            # The case that runs wrote to the channel: its process is ended, the next one goes on.
            ended, reporter.ended = Ended(None, str(error)), None
        except KvmnestError as error:
            if not reporter.run.planned:
                raise
            if isinstance(error, Stuck) and reporter.run.running:
                reporter.run.lost[reporter.run.running] = "hang"
            reporter.problem(str(error).partition("\n")[0])
            return
        if reporter.ended is not None:
            _check_end(reporter, ended)
            if reporter.run.complete or not reporter.run.planned or ended.status is None:
                return
        elif not reporter.run.planned:
            raise _no_start(ended)
        losses = 1 if reporter.finished_since_loss else losses + 1
        if reporter.ended is not None:
            reporter.interrupted(reporter.why_ended or f"pytest's exit status {reporter.ended}")
        else:
            reporter.lost(_why(ended), ended.loss)
        if reporter.run.complete:
            return
        left = len(reporter.run.not_run())
        if losses >= MOST_LOSSES:
            reporter.problem(f"gave up after {losses} losses in a row, {left} cases not run")
            return
        reporter.note(f"the cases' process was lost; starting again for {left} cases")


def _check_end(reporter: Reporter, ended: Ended) -> None:
    if reporter.broken:
        for where, text in reporter.broken:
            reporter.note(f"cannot collect {where}:\n{text}")
        where, text = reporter.broken[0]
        raise HarnessError(f"cannot collect {where}: {why_broken(text)}")
    if reporter.ended == 4:
        raise UsageError(_last_error(ended.output))
    if reporter.ended == 3:
        why = reporter.why_ended or _last_error(ended.output)
        raise HarnessError(f"pytest broke down: {why}")
    if reporter.ended == _INTERRUPTED:
        why = reporter.why_ended or "interrupted"
        if not reporter.run.planned:
            raise HarnessError(f"the session ended while cases were collected: {why}")
        if reporter.run.complete:
            reporter.problem(f"the session was ended after its last case: {why}")
    if ended.status is None and not reporter.run.complete:
        reporter.problem(ended.why)


def _no_start(ended: Ended) -> KvmnestError:
    if ended.status == 4:
        return UsageError(_last_error(ended.output))
    reason = ended.why or f"exit status {ended.status}"
    return HarnessError(f"the cases' process did not start ({reason}): {_last_error(ended.output)}")


def _last_error(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return errors[-1] if errors else lines[-1] if lines else "it said nothing"


def _why(ended: Ended) -> str:
    why = ended.why or f"the process ended with status {ended.status} in the middle"
    return f"{why}\n{ended.output}".rstrip()
