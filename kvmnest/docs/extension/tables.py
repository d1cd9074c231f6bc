"""Tables of the project's data: each stands in a page where its mark does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from kvmnest.mutants import by_programs
from kvmnest.repro import public

MUTANTS, BUGS = "(mutants by programs)", "(public bugs)"
_TABLES: Mapping[str, tuple[Sequence[str], Callable[[], Iterable[Sequence[str]]]]] = {
    MUTANTS: (
        ("mutant", "what is broken", "programs", "seconds", "first difference"),
        lambda: by_programs.rows(by_programs.read()),
    ),
    BUGS: (("#", "bug", "cases", "fails on", "passes on", "notes"), public.rows),
}


def table(mark: str) -> str:
    """The table of a mark in Markdown."""
    head, rows = _TABLES[mark]
    lines = [" | ".join(head), " | ".join("---" for _ in head)]
    lines += [" | ".join(cell.replace("|", r"\|") for cell in row) for row in rows()]
    return "\n".join(f"| {line} |" for line in lines)


def setup(app: Any) -> dict[str, bool]:
    """Called by Sphinx."""

    def read(app: Any, page: str, source: list[str]) -> None:
        for mark in _TABLES:
            if mark in source[0]:
                source[0] = source[0].replace(mark, table(mark))

    app.connect("source-read", read)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
