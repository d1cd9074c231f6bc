"""Public bugs and the cases that catch them: ``kvmnest/data/public-bugs.toml``, a list of tables::

[[bug]]
number = 21                      # of the list that the bugs were collected in
id = "msr-filter-lists"
title = "KVM: nVMX: Honor ..."   # subject of the commit that fixes it, or a name
cve = "CVE-2026-0001"
cases = ["test_msr_filter.py"]   # files of the suite, or cases without their parameters
repro = "msr-filter-lists"       # its reproducer, which an edit shows both ways
mutants = ["pdptr-save"]         # beside it: broken KVMs that the cases notice
predicted = "fails on 6.1"       # what was expected of a kernel of today before anything ran
happened = "so it is"            # and what was seen
left = "no case moves a thread"  # what is not covered
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvmnest import reading
from kvmnest.errors import HarnessError
from kvmnest.repro import evidence, ladder

FILE = Path(__file__).parent.parent / "data" / "public-bugs.toml"
_TEXTS = ("title", "cve", "repro", "predicted", "happened", "left")


@dataclass(frozen=True)
class PublicBug:
    """One entry; see the module's text for the fields. "" and () are what it does not say."""

    number: int
    id: str
    title: str
    cve: str = ""
    cases: tuple[str, ...] = ()
    repro: str = ""
    mutants: tuple[str, ...] = ()
    predicted: str = ""
    happened: str = ""
    left: str = ""


def load(path: Path = FILE) -> list[PublicBug]:
    """Read the list. Raises HarnessError with one line if an entry is not as it should be."""
    found = []
    for table in reading.toml(path).get("bug", []):
        name = table.get("id", "without an id")
        unknown = sorted(set(table) - {"number", "id", "cases", "mutants", *_TEXTS})
        if unknown or not isinstance(table.get("number"), int) or not table.get("title"):
            what = f"unknown key {unknown[0]}" if unknown else "needs number, id and title"
            raise HarnessError(f"{path}: bug {name}: {what}")
        texts = {key: str(table.get(key, "")) for key in _TEXTS}
        found.append(
            PublicBug(
                number=table["number"],
                id=name,
                cases=tuple(table.get("cases", ())),
                mutants=tuple(table.get("mutants", ())),
                **texts,
            )
        )
    return found


def seen(
    bug: PublicBug, kernels: ladder.Ladder, edits: Mapping[str, Sequence[evidence.Shown]]
) -> tuple[str, str]:
    """Where the bug was seen, and where it was seen to be gone: kernels, or a KVM with an edit.

    ``kernels`` and ``edits`` are the records of both.
    """
    fails, passes = kernels.seen(bug.repro)
    for shown in edits.get(bug.repro, ()):
        if shown.both_ways:
            fails.append(f"{ladder.short(shown.kernel)} with the bug put back")
            passes.append(ladder.short(shown.kernel))
    fails += [f"mutant {name}" for name in bug.mutants]
    return ", ".join(dict.fromkeys(fails)), ", ".join(dict.fromkeys(passes))


def rows() -> Iterator[tuple[str, ...]]:
    """The list as a table: number, bug, cases, where it fails, where it passes, what is left."""
    kernels, edits = ladder.load(), evidence.load()
    for bug in load():
        fails, passes = seen(bug, kernels, edits)
        title = f"{bug.id}{f' ({bug.cve})' if bug.cve else ''}: {bug.title}"
        cases = ", ".join(f"`{case}`" for case in bug.cases)
        said = f"Predicted: {bug.predicted}. " if bug.predicted else ""
        said += f"Seen: {bug.happened}. " if bug.happened else ""
        said += f"Left: {bug.left}." if bug.left else ""
        yield str(bug.number), title, cases, fails, passes, said.strip()
