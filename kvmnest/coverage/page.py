"""Coverage as HTML pages that need nothing else: an index, and one for each source file."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Mapping
from importlib.resources import files
from pathlib import Path

from kvmnest.coverage.record import Record, Source, counts
from kvmnest.coverage.text import percent
from kvmnest.errors import HarnessError
from kvmnest.files import write_text

_INDEX = "index.html"


def write(record: Record, texts: Mapping[str, str], folder: Path) -> list[Path]:
    """Write the pages of a record into a folder, the index first; ``texts`` are the sources.

    Raises HarnessError if a page cannot be written.
    """
    title = f"Coverage of {record.kernel}"
    pages = {_INDEX: _page(title, _index(record))}
    for name, source in record.sources.items():
        pages[_file(name)] = _page(f"{name}, {record.kernel}", _lines(source, texts[name]))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise HarnessError(f"cannot write {error.filename}: {error.strerror}") from error
    for name, page in pages.items():
        write_text(folder / name, page)
    return [folder / name for name in pages]


def _file(source: str) -> str:
    return f"{re.sub(r'[^A-Za-z0-9.-]', '-', source)}.html"


def _page(title: str, body: Iterator[str]) -> str:
    template = files("kvmnest.data").joinpath("coverage.html").read_text(encoding="utf-8")
    parts = {"TITLE": html.escape(title), "BODY": "\n".join(body)}
    # In one pass: a source that holds a mark of the template keeps it.
    return re.sub(r"<!--([A-Z]+)-->", lambda found: parts[found[1]], template)


def _index(record: Record) -> Iterator[str]:
    yield f"<p>Package version {html.escape(record.version)}. A line counts as covered if a basic"
    yield "block that begins on it ran.</p>"
    for name, source in record.sources.items():
        covered, lines = counts(source.by_line())
        link = f'<a href="{_file(name)}">{html.escape(name)}</a>'
        yield f"<h2>{link}: {percent(covered, lines)} ({covered}/{lines} lines)</h2>"
        yield "<table><thead><tr><th>function</th><th>lines</th><th>covered</th></tr></thead>"
        starts = {function: line for line, function in source.functions}
        holes = sorted(
            ((function, *counts(each)) for function, each in source.by_function().items()),
            key=lambda row: row[1] - row[2],
        )
        for function, ran, every in holes:
            shown = html.escape(function)
            if function in starts:
                shown = f'<a href="{_file(name)}#L{starts[function]}">{shown}</a>'
            yield (
                f"<tr><td>{shown}</td><td class=number>{ran}/{every}</td>"
                f"<td class=number>{percent(ran, every)}</td></tr>"
            )
        yield "</table>"


def _lines(source: Source, text: str) -> Iterator[str]:
    by_line = source.by_line()
    covered, lines = counts(by_line)
    yield f"<p>{percent(covered, lines)} ({covered}/{lines} lines)."
    yield f'<a href="{_INDEX}">All files</a></p>'
    yield "<table class=source><thead>"
    yield "<tr><th>line</th><th>source</th><th>first reached by</th></tr></thead>"
    for number, line in enumerate(text.splitlines(), 1):
        by = by_line.get(number)
        kind = "" if by is None else " class=ran" if by else " class=not"
        yield (
            f"<tr id=L{number}{kind}><td class=number>{number}</td>"
            f"<td class=code>{html.escape(line)}</td><td class=by>{html.escape(by or '')}</td></tr>"
        )
    yield "</table>"
