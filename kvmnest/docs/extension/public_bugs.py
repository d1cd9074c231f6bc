"""``(public bugs)`` in a page: the table of kvmnest/data/public-bugs.toml and its records."""

from __future__ import annotations

from typing import Any

from kvmnest.repro import public

MARK = "(public bugs)"
_HEAD = ("#", "bug", "cases", "fails on", "passes on", "notes")


def table() -> str:
    """The table in Markdown."""
    lines = [" | ".join(_HEAD), " | ".join("---" for _ in _HEAD)]
    lines += [" | ".join(cell.replace("|", r"\|") for cell in row) for row in public.rows()]
    return "\n".join(f"| {line} |" for line in lines)


def setup(app: Any) -> dict[str, bool]:
    """Called by Sphinx."""

    def read(app: Any, page: str, source: list[str]) -> None:
        if MARK in source[0]:
            source[0] = source[0].replace(MARK, table())

    app.connect("source-read", read)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
