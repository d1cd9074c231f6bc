"""A bisection by restarts from its beginning to its end: each call goes on where the last ended."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from kvmnest.bisect import disk, git, journal, over
from kvmnest.bisect.plan import Plan
from kvmnest.bisect.reboot.candidates import Commits, DebianKernels
from kvmnest.bisect.reboot.host import Host, RebootNeeded
from kvmnest.bisect.reboot.state import DONE, FINISH, PREPARE, SEARCH, State, journal_in, load
from kvmnest.bisect.reboot.trial import Candidates, Trials
from kvmnest.bisect.search import NotBisectable
from kvmnest.errors import UsageError

# A panic restarts the machine by itself, into its default; nested VMX is on from the start.
_PARAMETERS = ("panic=10", "kvm_intel.nested=1")
_MOST_HOMEWARD = 2

Say = Callable[[str], None]


def begin(folder: Path, plan: Plan, host: Host, *, keep_kernels: bool, stay: bool) -> State:
    """Write down what is to be done. Nothing of the machine is changed yet.

    Raises UsageError if the folder has an unfinished bisection, HarnessError if the machine cannot
    be bisected.
    """
    old = load(folder)
    if old and old.phase != DONE:
        raise UsageError(
            f"{folder} has a bisection that is not over: --continue, or kvmnest bisect stop"
        )
    plan.question.check()
    if plan.git:
        git.check_start(git.Repository(Path(plan.git)), plan.good, plan.bad)
    host.check(own_kernels=bool(plan.git))
    disk.remove(journal_in(folder))
    state = State(
        folder, plan, host.running(), host.default(), host.boot_id(), keep_kernels, stay
    )  # fmt: skip
    state.save()
    return state


def stop(state: State) -> None:
    """Give the bisection up; ``go_on`` then puts the machine back."""
    if state.phase in (PREPARE, SEARCH):
        _end(state, ["given up"], 0)


def go_on(state: State, host: Host, say: Say) -> int:
    """Do all that can be done before the next restart; returns the exit code at the end.

    Raises RebootNeeded when the machine has to restart now, and KvmnestError for what stops the
    bisection: the state stays, and the same call goes on.
    """
    trials = Trials(host, _candidates(host, state.plan), state, say)
    if state.phase == PREPARE:
        # The unit first: from here on a restart at any moment is followed by this again.
        host.install_unit(unit_arguments(state.folder))
        host.prepare(state.home, parameters(state.plan))
        state.phase = SEARCH
        state.save()
    if state.phase == SEARCH:
        try:
            _end(state, _search(state, trials, say), 0)
        except NotBisectable as error:
            _end(state, [str(error)], error.exit_code)
    if state.phase == FINISH:
        _put_back(state, host, trials, say)
    # The unit last: whatever is cut before, it goes on.
    host.remove_unit()
    for line in state.result:
        say(line)
    return state.code


def parameters(plan: Plan) -> list[str]:
    """What every kernel is booted with: ours, and the parameters of the modules."""
    given = [
        f"{name if '.' in name else f'kvm_intel.{name}'}={value}"
        for name, value in plan.params.items()
    ]
    return [*_PARAMETERS, *given]


def unit_arguments(folder: Path) -> list[str]:
    """How the unit goes on."""
    return ["bisect", "--continue", "--boot", "reboot", "--state", str(folder)]


def _candidates(host: Host, plan: Plan) -> Candidates:
    return Commits(host, plan) if plan.git else DebianKernels(host)


def _search(state: State, trials: Trials, say: Say) -> list[str]:
    plan, path = state.plan, state.journal
    started = path.exists()
    if not plan.git:
        return over.kernels(plan, path, trials.ask, say, go_on=started)
    repository = git.Repository(Path(plan.git))
    if started:
        repository.repair()
    return over.commits(
        plan, path, lambda: trials.ask(repository.commit("HEAD")), say, go_on=started
    )


def _end(state: State, lines: list[str], code: int) -> None:
    state.result, state.code, state.phase, state.trial = lines, code, FINISH, None
    disk.replace(state.folder / "result.txt", "\n".join(lines) + "\n")
    state.save()


def _put_back(state: State, host: Host, trials: Trials, say: Say) -> None:
    """Leave the machine as it was found: its kernel, its kernels, its menu, no unit."""
    plan = state.plan
    steps = journal.load(state.journal)
    if plan.git and steps:
        repository = git.Repository(Path(plan.git))
        if repository.bisecting:
            repository.reset(steps.header.came_from)
    host.forget_choice()
    if host.running() != state.home and not state.stay:
        if state.homeward < _MOST_HOMEWARD:
            state.homeward += 1
            state.save()
            raise RebootNeeded(state.home)
        say(f"{state.home} did not come up, {host.running()} did: it stays")
    trials.remove_installed()
    if state.installed and not state.keep_kernels:
        say(f"{', '.join(state.installed)} stays installed, since it runs")
    host.restore(state.default)
    state.phase = DONE
    state.save()
