"""What differs between the columns of a matrix: cases, patches, neighbours."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from kvmnest.reports.model import OUTCOMES, headline

Documents = Mapping[str, Mapping[str, Any]]

# What a kernel says of its own death: why the emulator ended is the lesser news then.
_DEATH = re.compile(r"kernel BUG at .*|BUG: .*|Oops: .*")


@dataclass(frozen=True)
class Change:
    """A case that has another outcome in a column than in the one before ("" for not run).

    ``reason`` is one line: why it did not simply pass, of the later column if that says anything.
    """

    case: str
    before: str
    after: str
    reason: str = ""


@dataclass(frozen=True)
class Step:
    """Two neighbours and what changed from the one to the other."""

    left: str
    right: str
    changes: list[Change]


def reason(case: Mapping[str, Any] | None) -> str:
    """Why a case did not simply pass, in one line; "" if there is nothing to say."""
    if case is None or case["outcome"] == "passed":
        return ""
    text = headline(case.get("summary", ""), case.get("detail", ""))
    died = _DEATH.search(case.get("kernel_log", "")) if case["outcome"] == "error" else None
    return f"{text} ({died[0].strip()})" if died else text


def ran(documents: Documents) -> list[str]:
    """Columns with any result: a kernel that could not be run differs from none."""
    return [name for name, document in documents.items() if document["cases"]]


def by_case(documents: Documents) -> dict[str, list[Mapping[str, Any] | None]]:
    """Rows in running order: the cases of that id in each column, None where it did not run."""
    columns = [{case["id"]: case for case in d["cases"]} for d in documents.values()]
    ids = dict.fromkeys(name for column in columns for name in column)
    return {name: [column.get(name) for column in columns] for name in ids}


def differences(documents: Documents) -> list[tuple[str, list[str]]]:
    """Cases whose outcome is not the same everywhere: (id, outcome by column, "" for not run).

    A column without any result does not count.
    """
    names = list(documents)
    counted = [names.index(name) for name in ran(documents)]
    rows = []
    for case, found in by_case(documents).items():
        outcomes = [one["outcome"] if one else "" for one in found]
        if len({outcomes[index] for index in counted}) > 1:
            rows.append((case, outcomes))
    return rows


def ran_nowhere(documents: Documents) -> list[tuple[str, str]]:
    """Cases that were skipped in every column that has them: (id, why in the first of these)."""
    kept = {name: documents[name] for name in ran(documents)}
    return [
        (case, next(reason(one) for one in found if one))
        for case, found in by_case(kept).items()
        if all(one["outcome"] == "skipped" for one in found if one)
    ]


def changes(documents: Documents) -> list[Step]:
    """Between which two neighbours cases changed; columns without results are left out."""
    names = ran(documents)
    kept = {name: documents[name] for name in names}
    steps = [Step(left, right, []) for left, right in pairwise(names)]
    for case, row in by_case(kept).items():
        for step, (was, now) in zip(steps, pairwise(row), strict=True):
            before, after = was["outcome"] if was else "", now["outcome"] if now else ""
            if before != after:
                step.changes.append(Change(case, before, after, reason(now) or reason(was)))
    return [step for step in steps if step.changes]


def patch_of(case: Mapping[str, Any]) -> int:
    """The patch that a case belongs to; 0 for none."""
    return case.get("series") or 0


def by_patch(documents: Documents) -> dict[int, list[dict[str, int]]]:
    """Rows of patches in order: counts by outcome in each column."""
    columns = []
    for document in documents.values():
        counts: dict[int, dict[str, int]] = {}
        for case in document["cases"]:
            row = counts.setdefault(patch_of(case), dict.fromkeys(OUTCOMES, 0))
            row[case["outcome"]] += 1
        columns.append(counts)
    patches = sorted({patch for column in columns for patch in column})
    none = dict.fromkeys(OUTCOMES, 0)
    return {patch: [column.get(patch, none) for column in columns] for patch in patches}


def as_json(documents: Documents) -> dict[str, Any]:
    """The document of ``--json``: see the page "The matrix" of the documentation.

    ``schema`` 1; ``columns``: results document by column; ``changes``: neighbours that differ;
    ``ran_nowhere``: cases that every column skipped.
    """
    steps = [
        {
            "from": step.left,
            "to": step.right,
            "cases": [
                {"id": c.case, "before": c.before, "after": c.after, "reason": c.reason}
                for c in step.changes
            ],
        }
        for step in changes(documents)
    ]
    nowhere = [{"id": case, "reason": why} for case, why in ran_nowhere(documents)]
    return {
        "schema": 1,
        "changes": steps,
        "ran_nowhere": nowhere,
        "columns": dict(documents),
    }
