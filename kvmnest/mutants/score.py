"""Score mutants: build each, run cases on it in the lab, stop at the first that fails."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvmnest.cases.events import Event
from kvmnest.errors import HarnessError
from kvmnest.kernel.build import BuildError, build_modules, end_builds
from kvmnest.kernel.edits import EditError
from kvmnest.lab import cache
from kvmnest.lab.emulators import BOCHS, Choice
from kvmnest.mutants import record
from kvmnest.mutants.catalogue import Mutant
from kvmnest.mutants.record import Record, Score
from kvmnest.reports.model import FAILED, Case, Run
from kvmnest.run.judge import Enough, Judge, Listener
from kvmnest.run.lab_target import LabTarget
from kvmnest.run.loop import run_cases
from kvmnest.run.selection import Selection, pytest_arguments, split_selection
from kvmnest.run.suite_state import suite_state
from kvmnest.run.targets import LocalTarget

_BUDGET = 5.0
_SKIPPED = "skipped"
_PATIENCE = 60.0


class _Hunt(Listener):
    """Has enough of a run when ``stop`` is set and, unless it goes on, at the first failure."""

    def __init__(self, stop: threading.Event, *, go_on: bool) -> None:
        self._stop = stop
        self._go_on = go_on

    def watch(self, event: Event) -> None:
        """Look whether to stop at an event."""
        if self._stop.is_set():
            raise Enough

    def ended(self, case: Case) -> None:
        """Look whether this is the failure that is hunted; a lost process ends a case too."""
        if self._stop.is_set() or (case.outcome in FAILED and not self._go_on):
            raise Enough


def _failures(run: Run) -> list[Case]:
    return [case for case in run.cases if case.outcome in FAILED]


@dataclass
class Scorer:
    """Scores mutants of one kernel.

    Args:
        kernel: SPEC of the lab's kernel; ``release`` is what it stands for.
        results: the record to fill.
        emulator: what boots the kernels.
        first_only: run only the cases that a mutant names, not the rest of the suite.
        on_line: gets lines for the user.
    """

    kernel: str | None
    release: str
    results: Record
    emulator: Choice = BOCHS
    first_only: bool = False
    on_line: Callable[[str], None] = lambda line: None
    stop: threading.Event = field(default_factory=threading.Event)
    _ids: list[str] = field(default_factory=list)
    _suite: str = ""
    # Parameters -> cases that tell nothing, with why they are skipped, "" if they fail.
    _useless: dict[str, dict[str, str]] = field(default_factory=dict)

    def score(self, mutants: Sequence[Mutant], jobs: int) -> None:
        """Score those whose score is not known, ``jobs`` at a time.

        A case that fails on the unmodified modules is not used. Raises HarnessError if all do.
        After Ctrl-C everything that was scored is in the record.
        """
        # What a machine offers decides which cases run.
        self._suite = cache.digest([suite_state(), self.emulator])
        self._ids = collect_ids()
        todo = [mutant for mutant in mutants if not self._settled(mutant)]
        if not todo:
            return
        self._check_unmodified(todo)
        with ThreadPoolExecutor(max_workers=jobs) as pool:
            try:
                running = {pool.submit(self._score, mutant) for mutant in todo}
                while running:
                    # A short wait, so that Ctrl-C is seen at once.
                    done, running = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
                    for future in done:
                        future.result()
            except BaseException:
                self.stop.set()
                _cancel(running)
                end_builds()
                raise

    def _settled(self, mutant: Mutant) -> bool:
        key = record.mutant_key(mutant, self.release)
        if mutant.masked:
            self.results.add(mutant.id, Score(record.MASKED, key, text=mutant.masked))
            return True
        return self.results.holds(mutant, key, self._suite, self._scope(mutant))

    def _scope(self, mutant: Mutant) -> str:
        """Name of the cases that a run without a failure speaks for."""
        if not self.first_only:
            return self._suite
        return cache.digest([self._suite, *mutant.first_cases(self._ids)])

    def _check_unmodified(self, mutants: Sequence[Mutant]) -> None:
        """Run the cases that ``mutants`` name on modules without an edit."""
        wanted: dict[str, tuple[dict[str, str], dict[str, None]]] = {}
        for mutant in mutants:
            _, cases = wanted.setdefault(
                record.params_text(mutant.params), (mutant.params, dict.fromkeys([]))
            )
            cases.update(dict.fromkeys(mutant.first_cases(self._ids)))
        for params, cases in wanted.values():
            self._find_clean(params, list(cases))

    def _find_clean(self, params: Mapping[str, str], cases: Sequence[str]) -> None:
        """See which cases pass on modules without an edit: only those tell anything."""
        useless = self._useless.setdefault(record.params_text(params), {})
        left = set(cases) - self.results.clean_cases(params, self._suite) - set(useless)
        ids = [name for name in self._ids if name in left]
        if not ids:
            return
        shown = record.params_text(params)
        self.on_line(
            f"unmodified modules{f' with {shown}' if shown else ''}: {len(ids)} cases first"
        )
        run = self._run(build_modules([], self.release), params, ids, go_on=True)
        if run.problems:
            raise HarnessError(f"on the unmodified modules: {run.problems[0]}")
        bad = {case.id: case.summary for case in _failures(run)}
        skipped = {case.id: case.summary for case in run.cases if case.outcome == _SKIPPED}
        useless |= {**skipped, **dict.fromkeys(bad, "")}
        good = [case.id for case in run.cases if case.id not in useless]
        self.results.add_clean(params, self._suite, good)
        for name in bad:
            self.on_line(f"not used, since it fails on the unmodified modules: {name}")
        if bad and len(bad) == len(run.cases):
            name, summary = next(iter(bad.items()))
            raise HarnessError(
                f"all {len(bad)} cases fail on the unmodified modules, so a failure means nothing:"
                f" {name}: {summary}"
            )

    def _score(self, mutant: Mutant) -> None:
        if self.stop.is_set():
            return
        began = time.monotonic()
        key = record.mutant_key(mutant, self.release)
        skipped = self._skipped(mutant)
        if skipped:
            self._note(mutant, Score(record.MASKED, key, self._suite, text=skipped))
            return
        if not mutant.exists_on(self.release):
            text = f"Linux {mutant.since} and later only"
            self._note(mutant, Score(record.UNFIT, key, self._suite, text=text))
            return
        try:
            folder = build_modules([mutant.edit_for(self.release)], self.release)
        except (EditError, BuildError) as error:
            if self.stop.is_set():
                return
            score = Score(record.UNFIT, key, self._suite, text=str(error))
        else:
            found, ran = self._hunt(mutant, folder)
            if self.stop.is_set() and found is None:
                return
            seconds = round(time.monotonic() - began, 1)
            if found is None:
                what = "the cases it names" if self.first_only else "the suite"
                text = f"no failure in {what} ({ran} cases)"
                if not ran:
                    text = "each case that it names fails or is skipped on the unmodified modules"
                scope = self._scope(mutant)
                score = Score(record.MISSED, key, scope, text=text, ran=ran, seconds=seconds)
            else:
                score = Score(
                    record.DETECTED,
                    key,
                    self._suite,
                    case=found.id,
                    outcome=found.outcome,
                    text=found.summary,
                    ran=ran,
                    seconds=seconds,
                )
        self._note(mutant, score)

    def _note(self, mutant: Mutant, score: Score) -> None:
        self.results.add(mutant.id, score)
        self.on_line(f"{mutant.id}: {score.verdict} {score.case or score.text}".rstrip())

    def _skipped(self, mutant: Mutant) -> str:
        """Why none of the cases that a mutant names runs on this machine, "" if one does."""
        useless = self._useless.get(record.params_text(mutant.params), {})
        reasons = [useless.get(name, "") for name in mutant.first_cases(self._ids)]
        return reasons[0] if reasons and all(reasons) else ""

    def _hunt(self, mutant: Mutant, folder: Path) -> tuple[Case | None, int]:
        """The first case that fails, and how many cases ended."""
        first = self._clean(mutant, mutant.first_cases(self._ids))
        ran = 0
        if first:
            run = self._run(folder, mutant.params, first)
            ran = len(run.cases)
            for case in _failures(run):
                return case, ran
        if self.first_only or self.stop.is_set():
            return None, ran
        with _UNMODIFIED:
            # Once for all the mutants that come this far.
            self._find_clean(mutant.params, self._ids)
        run = self._run(folder, mutant.params, self._clean(mutant, self._ids))
        return next(iter(_failures(run)), None), len(run.cases)

    def _clean(self, mutant: Mutant, cases: Sequence[str]) -> list[str]:
        clean = self.results.clean_cases(mutant.params, self._suite)
        return [name for name in cases if name in clean]

    def _run(
        self, folder: Path, params: Mapping[str, str], cases: Sequence[str], *, go_on: bool = False
    ) -> Run:
        run = Run("lab")
        hunt = _Hunt(self.stop, go_on=go_on)
        judge = Judge(run, hunt, own_clock=True, watch=hunt.watch)
        whole = list(cases) == self._ids
        modules, _ = split_selection([] if whole else cases)
        arguments = pytest_arguments(Selection(budget=_BUDGET), "lab", modules, [])
        target = LabTarget(
            kernel=self.kernel,
            kvm_modules=folder,
            kvm_params=params,
            emulator=self.emulator,
            patience=_PATIENCE,
        )
        run_cases(target, arguments, judge)
        return run


_UNMODIFIED = threading.Lock()


def collect_ids() -> list[str]:
    """Ids of all cases of the suite, in their order. Raises HarnessError if it is broken."""
    ids: list[str] = []
    broken: list[str] = []

    def take(event: dict[str, Any]) -> None:
        if event["e"] == "collected":
            ids.extend(case[0] for case in event["cases"])
        elif event["e"] == "broken":
            broken.append(event["where"])

    modules, _ = split_selection([])
    arguments = [*pytest_arguments(Selection(), "lab", modules, []), "--collect-only"]
    ended = LocalTarget().run(arguments, take)
    if broken or not ids:
        where = broken[0] if broken else ended.output.strip()[-200:]
        raise HarnessError(f"cannot collect the suite: {where}")
    return ids


def _cancel(futures: set[Future[None]]) -> None:
    for future in futures:
        future.cancel()
