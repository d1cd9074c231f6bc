"""What changed between two runs."""

from __future__ import annotations

from dataclasses import dataclass

from kvmnest.reports.model import FAILED, Run

#: Kinds of change, in the order in which they are shown.
KINDS = ("new failure", "fixed", "new skip", "no longer skipped", "known", "added", "gone")


@dataclass(frozen=True)
class Change:
    """A case whose outcome differs: ``before`` or ``after`` is "" where it is not in that run."""

    kind: str
    id: str
    before: str
    after: str
    text: str


def compare(old: Run, new: Run) -> list[Change]:
    """Changes from one run to another, by kind and then by id.

    A case that fails is a new failure unless it failed before, also when it was not there.
    """
    before = {case.id: case for case in old.cases}
    after = {case.id: case for case in new.cases}
    changes = []
    for name in [*after, *(name for name in before if name not in after)]:
        was = before[name].outcome if name in before else ""
        now = after[name].outcome if name in after else ""
        kind = _kind(was, now)
        if kind:
            case = after.get(name) or before[name]
            changes.append(Change(kind, name, was, now, case.headline))
    return sorted(changes, key=lambda change: (KINDS.index(change.kind), change.id))


def _kind(was: str, now: str) -> str:
    if was == now or (was in FAILED and now in FAILED):
        return ""
    if now in FAILED:
        return "new failure"
    if not now:
        return "gone"
    if was in FAILED:
        return "fixed" if now in ("passed", "known") else "new skip"
    if not was:
        return "added"
    if now == "skipped":
        return "new skip"
    if was == "skipped":
        return "no longer skipped"
    return "known"
