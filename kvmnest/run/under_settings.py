"""One run under several settings of KVM: each result is reported as CASE@SETTING."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

from kvmnest.errors import first_line
from kvmnest.reports.model import OUTCOMES, Case, Run
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
    told += [f"  {case.id}: {first_line(case.detail)}" for case in nowhere]
    return [line.rstrip() for line in (*told, "")]
