"""Coverage as lines of text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from kvmnest.coverage.record import Record, counts


def percent(part: int, whole: int) -> str:
    """A share as "80.2 %"; it is not rounded up to 100."""
    return f"{int(1000 * part / whole) / 10:.1f} %" if whole else "-"


def summary(record: Record) -> Iterator[str]:
    """The kernel, then a line for each source file."""
    yield f"coverage of {record.kernel} ({record.version})"
    width = max((len(name) for name in record.sources), default=0)
    for name, source in record.sources.items():
        covered, lines = counts(source.by_line())
        ran = sum(map(bool, source.first))
        functions = source.by_function().values()
        entered = sum(any(each.values()) for each in functions)
        yield (
            f"{name:{width}}  lines {percent(covered, lines)} ({covered}/{lines})"
            f"  blocks {percent(ran, len(source.first))} ({ran}/{len(source.first)})"
            f"  functions {entered}/{len(functions)}"
        )


def missing(record: Record) -> Iterator[str]:
    """Functions with lines that did not run, those with most first, and the lines' numbers."""
    for name, source in record.sources.items():
        every = sorted(source.by_line())
        holes = [
            (function, counts(lines), [line for line, first in lines.items() if not first])
            for function, lines in source.by_function().items()
        ]
        for function, (covered, all_lines), wanted in sorted(holes, key=lambda hole: -len(hole[2])):
            if wanted:
                yield f"{name}: {function} {covered}/{all_lines}, not {ranges(every, wanted)}"


def ranges(every: Iterable[int], lines: Iterable[int]) -> str:
    """Numbers of lines as "120-124, 130": no line of another kind that has a block is between.

    ``every`` are the lines with a block, in order.
    """
    wanted = set(lines)
    found: list[list[int]] = []
    joined = False
    for line in every:
        if line not in wanted:
            joined = False
        elif joined:
            found[-1][1:] = [line]
        else:
            found.append([line])
            joined = True
    return ", ".join("-".join(map(str, part)) for part in found)


def news(record: Record, old: Record) -> Iterator[str]:
    """Lines that ``record`` covers and ``old`` does not, by function. Raises UsageError."""
    found = record.new_against(old)
    total = sum(len(lines) for functions in found.values() for lines in functions.values())
    yield f"new: {total} line{'s' * (total != 1)}"
    for name, functions in found.items():
        every = sorted(record.sources[name].by_line())
        for function, lines in functions.items():
            by = dict.fromkeys(lines.values())
            more = f" and {len(by) - 1} more" if len(by) > 1 else ""
            shown = ranges(every, lines)
            yield f"{name}: {function} {shown}, by {next(iter(by))}{more}"
