"""The trial of one kernel, over as many restarts as it takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from kvmnest.bisect.probe import BAD, SKIP, Answer
from kvmnest.bisect.reboot.host import Host, RebootNeeded
from kvmnest.bisect.reboot.state import ARMED, BOOT, INSTALL, TEST, State, Trial
from kvmnest.errors import HarnessError

#: Boots after which a kernel that did not come up is taken for one that does not boot: the first
#: time it may have been the power.
TRIES = 2
#: Restarts for one kernel, whatever the reason.
MOST_BOOTS = 8


class Candidates(Protocol):
    """Where the kernels to try come from."""

    def install(self, name: str, state: State) -> str | Answer:
        """Bring a kernel into the boot menu; returns its release, or the answer if it has none.

        What is put there is noted in ``state`` first. May be done twice.
        """
        ...


def decide(trial: Trial, repeat: int) -> Answer | None:
    """The answer of a trial once there is one: ``repeat`` runs that agree.

    A run in which the machine went down counts as bad, with one exception: one that is alone may
    have been the power. If no more than one run is asked for, two good ones outweigh it.
    """
    skipped = next((run for run in trial.runs if run.verdict == SKIP), None)
    if skipped:
        return skipped
    verdicts = [run.verdict for run in trial.runs] + [BAD] * trial.lost
    outweighed = trial.lost == 1 and repeat == 1 and BAD not in verdicts[:-1]
    if len(set(verdicts)) > 1 and not outweighed:
        told = [run.verdict for run in trial.runs] + ["crash"] * trial.lost
        return Answer(SKIP, ", ".join(told), trial.release, "flaky")
    if trial.lost > 1 or (trial.lost and len(verdicts) >= max(repeat, 2) and not outweighed):
        went = f"the machine went down in {trial.lost} of {len(verdicts)} runs"
        text = f"{trial.runs[0].text}; {went}" if trial.runs else went
        return Answer(BAD, text, trial.release, "crash")
    if len(trial.runs) < repeat + trial.lost:
        return None
    first = trial.runs[0]
    if trial.lost:
        return replace(first, evidence=f"{first.evidence} (the machine went down once before)")
    return first


class Trials:
    """Answers about kernels of this machine; ``ask`` is what the searches take.

    It raises RebootNeeded when the machine has to restart first, and is asked again then: the
    search replays from its journal up to the same question.
    """

    def __init__(
        self, host: Host, candidates: Candidates, state: State, say: Callable[[str], None]
    ) -> None:
        self._host = host
        self._candidates = candidates
        self._state = state
        self._say = say

    def ask(self, name: str) -> Answer:
        """The answer for a kernel. Raises RebootNeeded, HarnessError."""
        trial = self._state.trial
        if trial is None or trial.name != name:
            trial = self._state.trial = Trial(name)
            self._state.save()
        steps = {INSTALL: self._install, BOOT: self._boot, ARMED: self._arrive, TEST: self._resume}
        while True:
            answer = decide(trial, self._state.plan.repeat)
            if answer is not None:
                return answer
            steps[trial.phase](trial)

    def _install(self, trial: Trial) -> None:
        self.remove_installed(spare=trial.name)
        found = self._candidates.install(trial.name, self._state)
        if isinstance(found, Answer):
            trial.runs.append(found)
        else:
            trial.release, trial.phase = found, BOOT
        self._state.save()

    def _runs(self, trial: Trial) -> bool:
        # The boot in which the menu was changed has a used machine and none of our parameters.
        fresh = self._host.boot_id() != self._state.prepared_in
        return fresh and self._host.running() == trial.release

    def _boot(self, trial: Trial) -> None:
        if self._runs(trial):
            self._test(trial)
            return
        if trial.boots >= MOST_BOOTS:
            why = f"given up after {trial.boots} restarts"
            trial.runs.append(Answer(SKIP, why, trial.release, "no start"))
            self._state.save()
            return
        trial.boots += 1
        self._state.save()
        self._arm(trial)

    def _arm(self, trial: Trial) -> None:
        # Only once the choice is made is the next boot a try of this kernel: if the power fails
        # before, another kernel comes up and that is nobody's fault.
        self._host.choose(trial.release)
        trial.phase, trial.boot_id = ARMED, self._host.boot_id()
        self._state.save()
        raise RebootNeeded(trial.release)

    def _arrive(self, trial: Trial) -> None:
        if self._host.boot_id() == trial.boot_id:
            self._say(f"the restart into {trial.release} has not happened yet: once more")
            self._arm(trial)
        if self._host.still_chosen():
            self._host.forget_choice()
            raise HarnessError(
                "GRUB did not take back its choice of the next boot, so a kernel that crashes"
                " would be booted for ever: the bisection ends here (kvmnest bisect stop)"
            )
        trial.phase = BOOT
        if not self._runs(trial):
            trial.missed += 1
            self._say(f"{trial.release} did not come up, {self._host.running()} did")
            if trial.missed >= TRIES:
                why = f"{trial.missed} boots ended in {self._host.running()}"
                trial.runs.append(Answer(SKIP, why, trial.release, "no start"))
        self._state.save()

    def _test(self, trial: Trial) -> None:
        trial.phase, trial.boot_id = TEST, self._host.boot_id()
        self._state.save()
        trial.runs.append(self._host.test(self._state.plan.question))
        trial.phase = BOOT
        self._state.save()

    def _resume(self, trial: Trial) -> None:
        if self._host.boot_id() != trial.boot_id:
            trial.lost += 1
            self._say(f"the machine went down in the case on {trial.release}")
        trial.phase = BOOT
        self._state.save()

    def remove_installed(self, spare: str = "") -> None:
        """Remove the kernels that we installed, but the running one and ``spare``."""
        if self._state.keep_kernels:
            return
        for release in list(self._state.installed):
            if release in (self._host.running(), self._state.home, spare):
                continue
            try:
                self._host.remove(release)
            except HarnessError as error:
                self._say(f"{release} stays installed: {error}")
            self._state.installed.remove(release)
            self._state.save()
