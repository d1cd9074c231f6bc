"""``(mutants by programs)`` in a page: the table of kvmnest/data/mutants-by-programs.json."""

from __future__ import annotations

from typing import Any

from kvmnest.mutants import by_programs

MARK = "(mutants by programs)"
_HEAD = ("mutant", "what is broken", "programs", "seconds", "first difference")


def table() -> str:
    """The table in Markdown."""
    found = by_programs.read()
    lines = [" | ".join(_HEAD), " | ".join("---" for _ in _HEAD)]
    for row in by_programs.rows(found):
        lines.append(" | ".join(cell.replace("|", r"\|") for cell in row))
    return "\n".join(f"| {line} |" for line in lines)


def setup(app: Any) -> dict[str, bool]:
    """Called by Sphinx."""

    def read(app: Any, page: str, source: list[str]) -> None:
        if MARK in source[0]:
            source[0] = source[0].replace(MARK, table())

    app.connect("source-read", read)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
