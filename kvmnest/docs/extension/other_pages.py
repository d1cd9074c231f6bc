"""``(other pages)`` in the first page's table of contents: those that it does not name, by name.

A glob would list the pages of the other tables once more.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

MARK = "(other pages)"


def complete(text: str, pages: list[str]) -> str:
    """The page with the mark replaced by those of ``pages`` that have no line of their own."""
    named = set(re.findall(r"^[\w/-]+$", text, re.M))
    return text.replace(MARK, "\n".join(sorted(set(pages) - named - {"index"})))


def setup(app: Any) -> dict[str, bool]:
    """Called by Sphinx."""

    def read(app: Any, page: str, source: list[str]) -> None:
        if page == "index":
            pages = [path.stem for path in Path(app.srcdir).glob("*.md")]
            source[0] = complete(source[0], pages)

    def outdated(app: Any, env: Any, added: set[str], changed: set[str], removed: set[str]) -> Any:
        return ["index"] if added or removed else []

    app.connect("source-read", read)
    app.connect("env-get-outdated", outdated)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
