"""The matrix on a terminal: differences first, no line longer than the terminal is wide."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from textwrap import wrap

from kvmnest.matrix.compare import (
    Documents,
    by_patch,
    changes,
    differences,
    ran,
    ran_nowhere,
)
from kvmnest.reports.model import patch_title

#: A letter for each outcome; "" is for a case that did not run.
LETTERS = {"passed": "P", "failed": "F", "skipped": "S", "known": "K", "error": "E", "": "-"}
_COLOURS = {"failed": "31;1", "error": "31;1", "known": "33", "skipped": "2", "": "2"}
_LEAST_TITLE, _MOST_TITLE = 20, 40


def lines(documents: Documents, width: int, *, colour: bool = False) -> Iterator[str]:
    """The whole report: changes between neighbours, cases that differ, patches, legend."""
    width = max(width, 40)
    names = ran(documents)
    steps = changes(documents)
    for step in steps:
        yield _cut(f"{step.left} -> {step.right}: {_cases(len(step.changes))}", width)
        for change in step.changes:
            yield from _folded(
                f"{change.case}: {change.before or '-'} -> {change.after or '-'}", width, 2
            )
            if change.reason:
                yield _cut(f"      {change.reason}", width)
        yield ""
    if not steps:
        same = "every case has the same outcome everywhere"
        yield from wrap(same if names else "nothing ran", width)
        yield ""
    kept = {name: documents[name] for name in names}
    differing = differences(kept)
    if differing:
        yield from wrap(f"cases that differ ({', '.join(_legend(differing))})", width)
        yield from _cases_table(names, differing, width, colour)
        yield ""
    if kept:
        legend = "passed, failed or in error (F), known (K), skipped (S); * marks what differs"
        yield from wrap(legend, width)
        yield from _patch_table(kept, width, colour)
        yield ""
    nowhere = ran_nowhere(kept)
    if nowhere:
        yield f"skipped everywhere: {_cases(len(nowhere))}"
        for case, why in nowhere:
            yield from _folded(case, width, 2)
            yield _cut(f"      {why}", width)
        yield ""


def _cases(number: int) -> str:
    return f"{number} case{'' if number == 1 else 's'}"


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def _folded(text: str, width: int, indent: int) -> Iterator[str]:
    """Never cut what one may want to copy: the id of a case."""
    room = width - indent
    for start in range(0, len(text), room):
        yield " " * indent + text[start : start + room]


def _legend(rows: Sequence[tuple[str, Sequence[str]]]) -> list[str]:
    used = {outcome for _, row in rows for outcome in row}
    return [f"{letter} {name or 'not run'}" for name, letter in LETTERS.items() if name in used]


def _paint(text: str, outcome: str, colour: bool) -> str:
    code = _COLOURS.get(outcome)
    return f"\x1b[{code}m{text}\x1b[0m" if colour and code else text


def _cases_table(
    names: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]], width: int, colour: bool
) -> Iterator[str]:
    """One letter for a case in a column; numbers stand for the columns."""
    cell = len(str(len(names))) + 1
    title = min(max(len(case) for case, _ in rows), max(_LEAST_TITLE, width - cell * len(names)))
    at_once = max(1, (width - title) // cell)
    for start in range(0, len(names), at_once):
        part = range(start, min(start + at_once, len(names)))
        for index in part:
            yield _cut(f"  {index + 1:>{cell - 1}} = {names[index]}", width)
        yield " " * title + "".join(f"{index + 1:>{cell}}" for index in part)
        for case, outcomes in rows:
            letters = "".join(
                " " * (cell - 1) + _paint(LETTERS[outcomes[i]], outcomes[i], colour) for i in part
            )
            yield f"{_cut(case, title):{title}}{letters}"


def _patch_table(documents: Documents, width: int, colour: bool) -> Iterator[str]:
    """Counts of each patch in each column, patches that differ first."""
    names = list(documents)
    rows = by_patch(documents)
    changed = _patches_that_differ(documents)
    order = sorted(rows, key=lambda patch: (patch not in changed, patch))
    texts = {patch: [_count(counts) for counts in rows[patch]] for patch in order}
    cells = [
        max(len(name), *(len(texts[patch][i]) for patch in order)) + 2
        for i, name in enumerate(names)
    ]
    title = max(len(patch_title(patch)) for patch in order) + 3
    if sum(cells) + title > width:
        # Titles are cut if that puts all columns side by side.
        title = max(width - sum(cells), 0)
        if title < _LEAST_TITLE:
            title = min(_MOST_TITLE, width // 2)
            cells = [min(size, width - title) for size in cells]
    for part in _parts(cells, width - title):
        yield " " * title + "".join(_cut(names[i], cells[i] - 2).rjust(cells[i]) for i in part)
        for patch in order:
            mark = "*" if patch in changed else " "
            line = _cut(f"{mark} {patch_title(patch)}", title - 1).ljust(title)
            for i in part:
                counts = rows[patch][i]
                worst = next((o for o in ("failed", "error", "known") if counts[o]), "passed")
                line += _paint(texts[patch][i].rjust(cells[i]), worst, colour)
            yield line.rstrip()


def _patches_that_differ(documents: Documents) -> set[int]:
    patches = {c["id"]: c.get("series") or 0 for d in documents.values() for c in d["cases"]}
    return {patches[case] for case, _ in differences(documents)}


def _parts(cells: Sequence[int], room: int) -> Iterator[list[int]]:
    """Columns that fit beside each other; at least one at a time."""
    part: list[int] = []
    for index, size in enumerate(cells):
        if part and sum(cells[i] for i in part) + size > room:
            yield part
            part = []
        part.append(index)
    if part:
        yield part


def _count(counts: Mapping[str, int]) -> str:
    bad = counts["failed"] + counts["error"]
    words = [str(counts["passed"])]
    words += [f"{bad}F"] if bad else []
    words += [f"{counts['known']}K"] if counts["known"] else []
    words += [f"{counts['skipped']}S"] if counts["skipped"] else []
    return " ".join(words)
