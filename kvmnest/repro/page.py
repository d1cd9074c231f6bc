"""Bugs by kernels as one HTML page that needs nothing else."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Sequence
from importlib.resources import files

from kvmnest.repro.check import VULNERABLE
from kvmnest.repro.corpus import Reproducer
from kvmnest.repro.ladder import Ladder, short
from kvmnest.repro.table import LETTERS, fixed_in

_CLASS = {"V": "bad", "-": "good", "n": "low", "?": "mid", " ": "low"}


def page(reproducers: Sequence[Reproducer], ladder: Ladder) -> str:
    """The page: a row for each bug, those that some kernel has first."""
    template = files("kvmnest.data").joinpath("repro-ladder.html").read_text(encoding="utf-8")
    parts = {
        "HEAD": "".join(
            f"<th scope=col><span>{_text(short(release))}</span></th>" for release in ladder.kernels
        ),
        "ROWS": "".join(_rows(reproducers, ladder)),
    }
    return re.sub(r"<!--([A-Z]+)-->", lambda found: parts[found[1]], template)


def _text(value: str) -> str:
    return html.escape(value, quote=True)


def _rows(reproducers: Sequence[Reproducer], ladder: Ladder) -> Iterator[str]:
    def seen(each: Reproducer) -> int:
        return -[*ladder.verdicts.get(each.id, {}).values()].count(VULNERABLE)

    for each in sorted(reproducers, key=lambda one: (seen(one), one.id)):
        bug, row = each.bug, ladder.verdicts.get(each.id, {})
        since = bug.since or ladder.since(each.id) or "?"
        cells = []
        for release in ladder.kernels:
            verdict = row.get(release, "")
            letter = LETTERS[verdict]
            why = ladder.evidence.get((each.id, release), verdict)
            cells.append(f'<td class={_CLASS[letter]} title="{_text(why)}">{letter}</td>')
        yield (
            f"<tr id={_text(each.id)}><th scope=row>{_text(each.id)}<br>"
            f"<small>{_text(each.title)}</small></th><td>{_text(bug.cve)}</td>"
            f"<td>{_text(since)}</td><td>{_text(fixed_in(bug))}</td>{''.join(cells)}</tr>\n"
        )
