"""The matrix as one HTML page that needs nothing else: kernels across, patches and cases down."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from typing import Any
from urllib.parse import quote

from kvmnest.matrix.compare import (
    Documents,
    by_case,
    by_patch,
    changes,
    differences,
    patch_of,
    reason,
)
from kvmnest.matrix.table import LETTERS
from kvmnest.reports.model import OUTCOMES, patch_title

_LONGEST_REASON = 300


def page(documents: Documents) -> str:
    """The page: what changed between neighbours, patches by kernel, then every case."""
    template = files("kvmnest.data").joinpath("matrix.html").read_text(encoding="utf-8")
    parts = {
        "FACTS": "".join(_facts(documents)),
        "CHANGES": "".join(_changes(documents)),
        "HEAD": "".join(f"<th scope=col><span>{_text(name)}</span></th>" for name in documents),
        "PATCHES": "".join(_patches(documents)),
        "CASES": "".join(_cases(documents)),
        "SPAN": str(len(documents) + 1),
    }
    # In one pass: a text of a case that looks like a mark of the template stays a text.
    return re.sub(r"<!--([A-Z]+)-->", lambda found: parts[found[1]], template)


def _text(value: object) -> str:
    return html.escape("" if value is None else str(value), quote=True)


def _anchor(case: str) -> str:
    """The id of a row: the case's own id, for links that people can read and keep."""
    return "".join("_" if c.isspace() else c for c in case)


def _facts(documents: Documents) -> Iterator[str]:
    for name, document in documents.items():
        counts = ", ".join(
            f"{document['summary'][o]} {o}" for o in OUTCOMES if document["summary"][o]
        )
        release = document["kernel"] or "did not run"
        problems = "".join(f"<br><b class=problem>{_text(p)}</b>" for p in document["problems"])
        yield (
            f"<tr><th scope=row>{_text(name)}</th><td>{_text(release)}</td><td>{_text(counts)}"
            f"{problems}</td><td>{_text(document.get('started'))}</td></tr>"
        )


def _changes(documents: Documents) -> Iterator[str]:
    steps = changes(documents)
    if not steps:
        yield "<p>None: every case has the same outcome everywhere.</p>"
    for step in steps:
        yield f"<h3>{_text(step.left)} &rarr; {_text(step.right)} ({len(step.changes)})</h3><ul>"
        for change in step.changes:
            yield (
                f'<li><a href="#{_text(quote(_anchor(change.case)))}">{_text(change.case)}</a> '
                f"{_badge(change.before)} &rarr; {_badge(change.after)}"
                f" <span class=why>{_text(change.reason[:_LONGEST_REASON])}</span></li>"
            )
        yield "</ul>"


def _badge(outcome: str) -> str:
    return f'<b class="o {outcome or "none"}">{outcome or "not run"}</b>'


def _patches(documents: Documents) -> Iterator[str]:
    names = list(documents)
    for patch, row in by_patch(documents).items():
        yield (f'<tr><th scope=row><a href="#patch-{patch}">{_text(patch_title(patch))}</a></th>')
        for index, counts in enumerate(row):
            total = sum(counts.values())
            bad, known = counts["failed"] + counts["error"], counts["known"]
            kind = "failed" if bad else "known" if known else "passed" if total else "none"
            # A single failure among hundreds must be seen: the shade starts at 35 %.
            part = {"failed": bad, "known": known}.get(kind, counts["passed"]) / max(total, 1)
            words = ", ".join(f"{n} {o}" for o, n in counts.items() if n) or "not run"
            shown = "".join(
                f"<small>{number} {letter}</small>"
                for number, letter in ((bad, "F"), (known, "K"), (counts["skipped"], "S"))
                if number
            )
            same = " changed" if index and row[index - 1] != counts else ""
            yield (
                f'<td tabindex=-1 class="{kind}{same}" style="--p:{35 + 65 * part:.0f}%"'
                f' data-why="{_text(f"{patch_title(patch)}, {names[index]}: {words}")}"'
                f' title="{_text(words)}">{counts["passed"] if total else "-"}{shown}</td>'
            )
        yield "</tr>"


def _cases(documents: Documents) -> Iterator[str]:
    names = list(documents)
    differing = {case for case, _ in differences(documents)}
    groups: dict[int, list[tuple[str, list[Mapping[str, Any] | None]]]] = {}
    for case, row in by_case(documents).items():
        some = next(one for one in row if one)
        groups.setdefault(patch_of(some), []).append((case, row))
    for patch, rows in sorted(groups.items()):
        rows.sort(key=lambda entry: entry[0] not in differing)
        yield (
            f'<tbody><tr class=group id="patch-{patch}"><th scope=rowgroup'
            f" colspan={len(names) + 1}>{_text(patch_title(patch))}</th></tr>"
        )
        for case, row in rows:
            yield _row(case, row, names, differs=case in differing)
        yield "</tbody>\n"


def _row(
    case: str, row: Sequence[Mapping[str, Any] | None], names: Sequence[str], *, differs: bool
) -> str:
    cells, before = [], None
    for index, one in enumerate(row):
        outcome = one["outcome"] if one else ""
        why = f"{outcome or 'not run'}"
        text = reason(one)[:_LONGEST_REASON]
        if text:
            why += f": {text}"
        changed = " changed" if index and outcome != before else ""
        title = f' title="{_text(why)}"' if outcome != "passed" else ""
        note = f' data-why="{_text(why)}"' if text else ""
        cells.append(
            f'<td tabindex=-1 class="{outcome or "none"}{changed}"{title}{note}>'
            f"{LETTERS[outcome]}</td>"
        )
        before = outcome
    kind = " class=differs" if differs else ""
    head = f'<tr id="{_text(_anchor(case))}"{kind}><th scope=row>{_text(case)}</th>'
    return f"{head}{''.join(cells)}</tr>\n"
