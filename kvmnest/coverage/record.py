"""What was covered, as data: kept in a JSON file, joined with other runs, compared with one."""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvmnest import reading
from kvmnest.errors import UsageError
from kvmnest.files import write_json
from kvmnest.schema import COUNT, TEXT, TEXTS, by_name, exactly

SCHEMA = 1


@dataclass
class Source:
    """A source file: its functions, (first line, name) in order, and its basic blocks.

    Block N begins on line ``lines[N]``; ``first[N]`` is what first reached it, "" if nothing did.
    """

    functions: list[tuple[int, str]]
    lines: list[int]
    first: list[str]

    def by_line(self) -> dict[int, str]:
        """Each line on which a block begins -> what first reached one of these, "" if nothing."""
        found: dict[int, str] = {}
        for line, first in sorted(zip(self.lines, self.first, strict=True), key=lambda b: b[0]):
            found[line] = found.get(line) or first
        return found

    def by_function(self) -> dict[str, dict[int, str]]:
        """``by_line`` of each function that has a block."""
        starts = [line for line, _ in self.functions]
        found: dict[str, dict[int, str]] = {}
        for line, first in self.by_line().items():
            at = bisect.bisect_right(starts, line) - 1
            name = self.functions[at][1] if at >= 0 else "(before the first function)"
            found.setdefault(name, {})[line] = first
        return found


@dataclass
class Record:
    """Coverage of the ``sources`` of one kernel: its release and the version of its package."""

    kernel: str
    version: str
    sources: dict[str, Source]

    def add(self, other: Record) -> None:
        """Take over what another run reached. Raises UsageError if that was of another build."""
        if (other.kernel, other.version) != (self.kernel, self.version):
            raise UsageError(
                f"coverage of {other.kernel} ({other.version}) cannot be added to that of"
                f" {self.kernel} ({self.version})"
            )
        for name, theirs in other.sources.items():
            ours = self.sources.setdefault(name, theirs)
            if ours.lines != theirs.lines:
                raise UsageError(
                    f"the two builds of {name} differ: another compiler or another kvmnest"
                )
            ours.first = [a or b for a, b in zip(ours.first, theirs.first, strict=True)]

    def new_against(self, old: Record) -> dict[str, dict[str, dict[int, str]]]:
        """Lines that this run reached and ``old`` did not: file -> function -> line -> by what.

        Raises UsageError if the two are of different kernels: their lines have other numbers.
        """
        if (old.kernel, old.version) != (self.kernel, self.version):
            raise UsageError(
                f"coverage of {old.kernel} ({old.version}) says nothing about lines of"
                f" {self.kernel} ({self.version})"
            )
        found: dict[str, dict[str, dict[int, str]]] = {}
        for name, source in self.sources.items():
            before = old.sources[name].by_line() if name in old.sources else {}
            for function, lines in source.by_function().items():
                new = {n: first for n, first in lines.items() if first and not before.get(n)}
                if new:
                    found.setdefault(name, {})[function] = new
        return found


def counts(lines: dict[int, str]) -> tuple[int, int]:
    """(covered, all) of what ``by_line`` gives."""
    return sum(map(bool, lines.values())), len(lines)


def save(record: Record, path: Path) -> None:
    """Write a record. Raises HarnessError if that is impossible."""
    write_json(path, document(record))


def document(record: Record) -> dict[str, Any]:
    """A record as a JSON document: schema 1."""
    reached = dict.fromkeys(name for s in record.sources.values() for name in s.first if name)
    numbers = {name: number for number, name in enumerate(reached)}
    return {
        "schema": SCHEMA,
        "kernel": record.kernel,
        "version": record.version,
        "reached_by": list(reached),
        "sources": {
            name: {
                "functions": [list(function) for function in source.functions],
                "lines": source.lines,
                "first": [numbers.get(first, -1) for first in source.first],
            }
            for name, source in record.sources.items()
        },
    }


def load(path: Path) -> Record:
    """Read a record. Raises NoSuchFile, or HarnessError for what is not a record."""
    found = reading.document(path, _WHAT, _SCHEMA)
    names = [*found["reached_by"], ""]
    sources = {}
    for name, each in found["sources"].items():
        problem = next(_problems(each, len(found["reached_by"])), "")
        if problem:
            raise reading.Damaged(f"{reading.shown(path)} is not a {_WHAT}: {name}: {problem}")
        functions = [(line, function) for line, function in each["functions"]]
        sources[name] = Source(functions, each["lines"], [names[n] for n in each["first"]])
    return Record(found["kernel"], found["version"], sources)


def _problems(source: dict[str, Any], names: int) -> Iterator[str]:
    if len(source["lines"]) != len(source["first"]):
        yield f"{len(source['lines'])} lines, but {len(source['first'])} in first"
    if any(number >= names for number in source["first"]):
        yield f"first has a number above the last of reached_by, {names - 1}"
    if source["functions"] != sorted(source["functions"]):
        yield "functions are not in the order of their lines"


_WHAT = "file of kvmnest coverage"
_LINE = {"type": "integer", "minimum": 1, "maximum": 1 << 20}
_SCHEMA = exactly(
    ["schema", "kernel", "version", "reached_by", "sources"],
    schema={"const": SCHEMA},
    kernel=TEXT,
    version=TEXT,
    reached_by=TEXTS,
    sources=by_name(
        exactly(
            ["functions", "lines", "first"],
            functions={
                "type": "array",
                "items": {
                    "type": "array", "prefixItems": [_LINE, TEXT], "minItems": 2, "maxItems": 2,
                },
            },
            lines={"type": "array", "items": _LINE},
            first={"type": "array", "items": {**COUNT, "minimum": -1}},
        )
    ),
)  # fmt: skip
