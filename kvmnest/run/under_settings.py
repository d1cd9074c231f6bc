"""One run under several settings of KVM: each result is reported as CASE@SETTING."""

from __future__ import annotations

import fnmatch
import io
from collections.abc import Callable, Sequence
from dataclasses import replace

from kvmnest.reports.model import OUTCOMES, Case, Run
from kvmnest.reports.progress import Progress
from kvmnest.run.reporter import Reporter
from kvmnest.settings import Setting


def name(case_id: str, setting: Setting) -> str:
    """Id of the result of a case under a setting; under the default that of the case."""
    return f"{case_id}@{setting.name}" if setting.name else case_id


def chosen(setting: Setting, default: Sequence[Case], *, every_case: bool = False) -> list[str]:
    """Of the cases that ran under the default, the ids of those to run again under a setting.

    They are those whose answer the setting can change: the ones that ``settings.toml`` names, and
    those that were skipped, because the setting may bring what they lack.
    """
    return [
        case.id
        for case in default
        if every_case
        or case.outcome == "skipped"
        or any(fnmatch.fnmatchcase(case.id.partition("::")[0], file) for file in setting.files)
    ]


def ran_nowhere(run: Run) -> list[Case]:
    """The cases of a run under several settings that were skipped under each, with the reason."""
    ran = {case_of(case.id) for case in run.cases if case.outcome != "skipped"}
    first = {case_of(case.id): case for case in reversed(run.cases)}
    return [case for case_id, case in first.items() if case_id not in ran][::-1]


def case_of(case_id: str) -> str:
    """Id of the case of a result: without the setting, if it has one."""
    before, at, after = case_id.rpartition("@")
    return before if at and not {"]", ":"} & {*after} else case_id


class UnderSetting(Reporter):
    """Judges the cases that run under one setting, and passes each result on to the whole run.

    The whole run is incomplete (``more_to_come``) until the last setting, each part for itself is
    not: that is what tells ``run_cases`` when it is done.
    The record of known deviations is looked up for the parameters of this setting.
    """

    def __init__(self, whole: Reporter, setting: Setting, rerun: Callable[[str], str]) -> None:
        run = Run(whole.run.target, whole.run.emulator, options=whole.run.options)
        progress = _Passed(self)
        super().__init__(run, progress, rerun=rerun, own_clock=whole.own_clock)
        self.setting = setting
        self.whole = whole
        self._planned_before = list(whole.run.planned)

    def planned(self) -> None:
        """Add the cases of this setting to the plan of the whole run."""
        self.whole.run.facts = self.whole.run.facts or self.run.facts
        ids = [name(case_id, self.setting) for case_id in self.run.planned]
        self.whole.run.planned = [*self._planned_before, *ids]
        self.whole.progress.planned(len(self.whole.run.planned), again=bool(self._planned_before))

    def running(self, case_id: str) -> None:
        """Show that a case starts."""
        self.whole.run.running = name(case_id, self.setting)
        self.whole.progress.running(self.whole.run, self.whole.run.running)

    def store(self, case: Case) -> None:
        """Add a case here and to the whole run. Raises Enough as the whole run does."""
        super().store(case)
        self.whole.store(replace(case, id=name(case.id, self.setting)))

    def problem(self, text: str) -> None:
        """Record a problem of the whole run."""
        self.whole.problem(f"{self.setting.name}: {text}" if self.setting.name else text)

    def note(self, text: str) -> None:
        """Show a line to the user."""
        self.whole.note(text)

    def end(self) -> None:
        """Hand over what is told at the end of the whole run."""
        whole = self.whole.run
        whole.no_longer += [(name(case, self.setting), why) for case, why in self.run.no_longer]
        whole.lost |= {name(case, self.setting): loss for case, loss in self.run.lost.items()}
        whole.interrupted += [name(case, self.setting) for case in self.run.interrupted]


class _Passed(Progress):
    """The progress of a part is that of the whole run."""

    def __init__(self, part: UnderSetting) -> None:
        super().__init__(io.StringIO(), quiet=True)
        self._part = part

    def planned(self, total: int, *, again: bool = False) -> None:
        """The number of cases of this setting is known."""
        self._part.planned()

    def running(self, run: Run, case_id: str) -> None:
        """A case starts."""
        self._part.running(case_id)


def lines(run: Run, settings: Sequence[Setting]) -> list[str]:
    """A table of outcomes by setting, and the cases that ran under none."""
    told = [f"{'setting':24}" + "".join(f"{outcome:>9}" for outcome in OUTCOMES)]
    for label in ("default", *(setting.name for setting in settings)):
        counts = dict.fromkeys(OUTCOMES, 0)
        for case in run.cases:
            under = case.id[len(case_of(case.id)) + 1 :] or "default"
            counts[case.outcome] += under == label
        told.append(f"{label:24}" + "".join(f"{count or '':>9}" for count in counts.values()))
    nowhere = ran_nowhere(run)
    told += ["", f"cases that ran under no setting: {len(nowhere)}"]
    told += [f"  {case.id}: {case.detail.partition(chr(10))[0]}" for case in nowhere]
    return [line.rstrip() for line in (*told, "")]
