"""One-line edits of C sources: which function, which expression, what instead."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from kvmnest.errors import KvmnestError


class EditError(KvmnestError):
    """An edit that does not fit the source it was meant for."""


@dataclass(frozen=True)
class Edit:
    """Replace ``expression`` by ``replacement`` in ``function`` of ``file``.

    ``file`` is relative to the kernel's top folder. An empty ``function`` means anywhere in the
    file. The expression must occur exactly once there; runs of white space in it stand for any
    white space, so that a line that is wrapped differently in another kernel still matches.
    """

    file: str
    function: str
    expression: str
    replacement: str

    def apply(self, source: str) -> str:
        """Return the edited source. Raises EditError if it does not match exactly once."""
        first, last = self._place(source)
        return source[:first] + self.replacement.strip() + source[last:]

    def line(self, source: str) -> int:
        """Number of the line where the expression begins. Raises EditError as ``apply``."""
        return source.count("\n", 0, self._place(source)[0]) + 1

    def _place(self, source: str) -> tuple[int, int]:
        start, end = function_span(source, self.function) if self.function else (0, len(source))
        pattern = r"\s+".join(re.escape(word) for word in self.expression.split())
        found = list(re.finditer(pattern, source[start:end])) if pattern else []
        if len(found) != 1:
            count = "does not occur" if not found else f"occurs {len(found)} times"
            where = f"{self.function}()" if self.function else "the file"
            shown = " ".join(self.expression.split())
            raise EditError(f"{self.file}: {shown!r:.90} {count} in {where}")
        first, last = found[0].span()
        return start + first, start + last


@dataclass(frozen=True)
class Newer:
    """The text of an edit for kernels whose version is ``since`` (major, minor) or later."""

    since: tuple[int, int]
    edit: Edit


_CHANGES = ("file", "function", "expression", "replacement")


def newer_texts(first: Edit, tables: Sequence[Mapping[str, str]]) -> tuple[Newer, ...]:
    """Read other texts of an edit: tables of ``since`` ("7.2") and of what differs from ``first``.

    Raises ValueError with one line if one is not as it should be.
    """
    found = []
    for table in tables:
        since = re.fullmatch(r"(\d+)\.(\d+)", str(table.get("since", "")))
        unknown = sorted(set(table) - {"since", *_CHANGES})
        if since is None:
            raise ValueError('newer needs since = "MAJOR.MINOR"')
        if unknown:
            raise ValueError(f"unknown key {unknown[0]} of newer")
        changes = {key: table[key] for key in _CHANGES if key in table}
        if not changes or not all(isinstance(text, str) for text in changes.values()):
            raise ValueError(f"newer since {since[0]} changes no text")
        found.append(Newer((int(since[1]), int(since[2])), replace(first, **changes)))
    if found != sorted(found, key=lambda each: each.since):
        raise ValueError("newer goes from old to new")
    return tuple(found)


def series_of(release: str) -> tuple[int, int]:
    """(7, 3) of a kernel release such as "7.3.4+deb13-amd64"; (0, 0) for what is none."""
    version = re.match(r"(\d+)\.(\d+)", release)
    return (int(version[1]), int(version[2])) if version else (0, 0)


def text_for(first: Edit, newer: Iterable[Newer], release: str) -> Edit:
    """The text of an edit that is meant for a kernel ``release`` such as "7.3.4+deb13-amd64"."""
    number = series_of(release)
    text = first
    for each in newer:
        if each.since <= number:
            text = each.edit
    return text


def function_span(source: str, name: str) -> tuple[int, int]:
    """Offsets of the definition of function ``name``, from its first line to its last brace.

    Kernel style is taken for granted: the definition starts in the first column and its body
    ends with a brace there. Raises EditError if there is no such definition, or more than one.
    """
    starts = []
    for found in re.finditer(rf"^[A-Za-z_][^;{{}}=]*?\b{re.escape(name)}\(", source, re.MULTILINE):
        opening = re.compile(r"[^;{}]*\n\{").match(source, found.end())
        if opening and "\n\n" not in source[found.start() : found.end()]:
            starts.append(found.start())
    if len(starts) != 1:
        count = "no definition" if not starts else f"{len(starts)} definitions"
        raise EditError(f"{count} of function {name}()")
    end = source.find("\n}", starts[0])
    return starts[0], end + 2 if end >= 0 else len(source)


def apply_all(edits: Iterable[Edit], folder: Path) -> None:
    """Edit the files below ``folder``. Raises EditError; files are then as they were."""
    texts: dict[Path, str] = {}
    for edit in edits:
        path = folder / edit.file
        if path not in texts:
            try:
                texts[path] = path.read_text(encoding="utf-8")
            except OSError as error:
                raise EditError(f"{edit.file}: {error.strerror}") from error
        texts[path] = edit.apply(texts[path])
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")
