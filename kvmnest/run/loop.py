"""One run of cases on one target: starts the process, restarts it when it is lost."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

from kvmnest.cases.events import DamagedEvent, Event
from kvmnest.errors import HarnessError, KvmnestError, UsageError, first_line
from kvmnest.reports.model import Run
from kvmnest.run.judge import Enough, Judge
from kvmnest.run.pytest_errors import last_error, refusal, why_broken
from kvmnest.run.selection import Selection, pytest_arguments, split_selection
from kvmnest.run.targets import Ended, Stuck, Target

_INTERRUPTED = 2  # pytest.ExitCode.INTERRUPTED

#: Unexpected losses in a row without a finished case in between, after which a run gives up.
MOST_LOSSES = 3


def outcome(
    target: Target,
    selection: Selection,
    options: Sequence[str] = (),
    on_event: Callable[[Event], None] = lambda event: None,
) -> Run:
    """Run cases without a word: what became of them.

    ``options`` are more of pytest's; ``on_event`` sees each event first. Raises what ``run_cases``
    raises.
    """
    run = Run(target.name, target.emulator)
    modules, paths = split_selection(selection.selected)
    arguments = pytest_arguments(selection, target.name, modules, target.place(paths))
    judge = Judge(run, own_clock=target.guest_clock, watch=on_event)
    run_cases(target, [*options, *arguments], judge)
    return run


def run_cases(target: Target, arguments: Sequence[str], judge: Judge) -> None:
    """Run all cases, in as many processes as it takes, or until the judge's listener has enough.

    Raises UsageError if pytest refuses the selection, HarnessError (or what the target raises) if
    no case could be started at all. Trouble after that becomes part of the results.
    """
    with contextlib.suppress(Enough):
        _run_cases(target, arguments, judge)


def _run_cases(target: Target, arguments: Sequence[str], judge: Judge) -> None:
    run = judge.run
    while True:
        judge.ended = None
        try:
            ended = target.run(arguments, judge.event, len(run.cases))
        except DamagedEvent as error:
            # The case that runs wrote to the channel: its process is ended, the next one goes on.
            ended, judge.ended = Ended(None, str(error)), None
        except KvmnestError as error:
            if not run.planned:
                raise
            report = judge.stuck if isinstance(error, Stuck) else judge.problem
            report(first_line(error))
            return
        if judge.ended is not None:
            _check_end(judge, ended)
            if run.complete or not run.planned or ended.status is None:
                return
        elif not run.planned:
            raise _no_start(ended)
        if judge.ended is not None:
            judge.interrupted(judge.why_ended or f"pytest's exit status {judge.ended}")
        else:
            judge.lost(_why(ended), ended.loss)
        if run.complete:
            return
        left = len(run.not_run())
        if judge.losses_in_a_row >= MOST_LOSSES:
            judge.problem(f"gave up after {MOST_LOSSES} losses in a row, {left} cases not run")
            return
        judge.note(f"the cases' process was lost; starting again for {left} cases")


def _check_end(judge: Judge, ended: Ended) -> None:
    if judge.broken:
        for where, text in judge.broken:
            judge.note(f"cannot collect {where}:\n{text}")
        where, text = judge.broken[0]
        raise HarnessError(f"cannot collect {where}: {why_broken(text)}")
    if judge.ended == 4:
        raise _refused(ended)
    if judge.ended == 3:
        why = judge.why_ended or last_error(ended.output)
        raise HarnessError(f"pytest broke down: {why}")
    if judge.ended == _INTERRUPTED:
        why = judge.why_ended or "interrupted"
        if not judge.run.planned:
            raise HarnessError(f"the session ended while cases were collected: {why}")
        if judge.run.complete:
            judge.problem(f"the session was ended after its last case: {why}")
    if ended.status is None and not judge.run.complete:
        judge.problem(ended.why)


def _refused(ended: Ended) -> KvmnestError:
    return refusal(ended.output) or UsageError(last_error(ended.output))


def _no_start(ended: Ended) -> KvmnestError:
    if ended.status == 4:
        return _refused(ended)
    reason = ended.why or f"exit status {ended.status}"
    return HarnessError(f"the cases' process did not start ({reason}): {last_error(ended.output)}")


def _why(ended: Ended) -> str:
    why = ended.why or f"the process ended with status {ended.status} in the middle"
    return f"{why}\n{ended.output}".rstrip()
