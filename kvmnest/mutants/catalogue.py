"""The catalogue of broken KVMs, ``kvmnest/data/mutants.toml``: a list of tables::

[[mutant]]
bug = "vmx-cpl"       # a reproducer of kvmnest, which has id, title, edit, origin and parameters
cases = ["test_vmcs_pointers.py::test_at_cpl_3"]          # run first; fnmatch patterns

[[mutant]]
id = "vpid-zero"
title = "VPID 0 is accepted"                 # the bug, in a few words
file = "arch/x86/kvm/vmx/nested.c"
function = "nested_check_vm_execution_controls"
expression = "CC(a && b)"                    # must occur once in the function
replacement = "0"
origin = { subject = "...", hash = "...", cve = "...", fixed = "v4.18" }   # of the real bug
newer = [{ since = "7.2", function = "f2" }] # its texts for later sources: what differs
since = "7.2"                                # older kernels do not have what it breaks
params = { ept = "0" }                       # module parameters that the bug needs
cases = ["test_entry_controls.py::test_vpid_zero"]
masked = "why no case can notice it on any machine"       # then it is not scored
missed = "why it is not noticed"                          # if a miss is what one expects
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvmnest import reading
from kvmnest.errors import HarnessError, UsageError
from kvmnest.kernel.edits import Edit, Newer, newer_texts, series_of, text_for
from kvmnest.repro import corpus

MUTANTS_FILE = Path(__file__).parent.parent / "data" / "mutants.toml"

_TEXTS = ("id", "title", "file", "function", "expression", "replacement")
_KEYS = {*_TEXTS, "since", "newer", "origin", "params", "cases", "masked", "missed"}
_OF_A_BUG = {"bug", "cases", "masked", "missed"}
_ORIGIN = {"subject", "hash", "cve", "fixed"}


@dataclass(frozen=True)
class Mutant:
    """One broken KVM; see the module's text for the fields."""

    id: str
    title: str
    edit: Edit
    newer: tuple[Newer, ...] = ()
    origin: dict[str, str] = field(default_factory=dict)
    params: dict[str, str] = field(default_factory=dict)
    cases: tuple[str, ...] = ()
    masked: str = ""
    missed: str = ""
    since: str = ""

    def exists_on(self, release: str) -> bool:
        """Whether a kernel has what this mutant breaks."""
        return series_of(release) >= series_of(self.since)

    def edit_for(self, release: str) -> Edit:
        """The edit for a kernel's source."""
        return text_for(self.edit, self.newer, release)

    def first_cases(self, ids: Iterable[str]) -> list[str]:
        """The cases among ``ids`` that ``cases`` names, in the order of the patterns."""
        every = list(ids)
        found: dict[str, None] = {}
        for pattern in self.cases:
            found.update((name, None) for name in every if matches(name, pattern))
        return list(found)


def matches(case_id: str, pattern: str) -> bool:
    """Whether a case is meant by a pattern.

    The pattern is compared with the id, with the id without its parameters, and with the file's
    name, which may lack ".py": "test_vmxon*" is all of a file.
    """
    plain = case_id.partition("[")[0]
    names = (case_id, plain, plain.partition("::")[0])
    return any(name == pattern or fnmatch.fnmatchcase(name, pattern) for name in names)


def load(path: Path = MUTANTS_FILE) -> list[Mutant]:
    """Read a catalogue. Raises HarnessError with one line if an entry is not as it should be."""
    tables = reading.toml(path).get("mutant", [])
    mutants = [_mutant(table, number, path) for number, table in enumerate(tables, 1)]
    seen: set[str] = set()
    for mutant in mutants:
        if mutant.id in seen:
            raise HarnessError(f"{path}: mutant {mutant.id} is there twice")
        seen.add(mutant.id)
    return mutants


def select(mutants: Sequence[Mutant], only: str) -> list[Mutant]:
    """Those whose id matches one of the comma-separated patterns; all if there is none.

    Raises UsageError for a pattern that matches none.
    """
    patterns = [word.strip() for word in only.split(",") if word.strip()]
    if not patterns:
        return list(mutants)
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(mutant.id, pattern) for mutant in mutants):
            raise UsageError(f"no mutant {pattern} (--list shows them)")
    return [m for m in mutants if any(fnmatch.fnmatchcase(m.id, p) for p in patterns)]


def _mutant(table: dict[str, Any], number: int, path: Path) -> Mutant:
    if "bug" in table:
        return _of_a_bug(table, path)
    name = table.get("id", f"number {number}")
    unknown = sorted(set(table) - _KEYS) + sorted(set(table.get("origin", {})) - _ORIGIN)
    missing = [key for key in _TEXTS if not isinstance(table.get(key), str)]
    if unknown or missing:
        what = f"unknown key {unknown[0]}" if unknown else f"no text {missing[0]}"
        raise HarnessError(f"{path}: mutant {name}: {what}")
    since = table.get("since", "")
    if since and series_of(str(since)) == (0, 0):
        raise HarnessError(f'{path}: mutant {name}: since needs "MAJOR.MINOR"')
    edit = Edit(*(table[key] for key in ("file", "function", "expression", "replacement")))
    try:
        newer = newer_texts(edit, table.get("newer", ()))
    except ValueError as error:
        raise HarnessError(f"{path}: mutant {name}: {error}") from error
    return Mutant(
        id=table["id"],
        title=table["title"],
        edit=edit,
        newer=newer,
        origin=table.get("origin", {}),
        params={key: str(value) for key, value in table.get("params", {}).items()},
        cases=tuple(table.get("cases", ())),
        masked=table.get("masked", ""),
        missed=table.get("missed", ""),
        since=since,
    )


def _of_a_bug(table: dict[str, Any], path: Path) -> Mutant:
    name = table["bug"]
    unknown = sorted(set(table) - _OF_A_BUG)
    if unknown:
        raise HarnessError(f"{path}: bug {name}: unknown key {unknown[0]}")
    found = [each for each in corpus.load() if each.id == name and each.edit]
    if not found:
        raise HarnessError(f"{path}: there is no reproducer {name} with an edit")
    (each,) = found
    assert each.edit is not None
    origin = {key: getattr(each.bug, key) for key in _ORIGIN}
    return Mutant(
        id=each.id,
        title=each.title,
        edit=each.edit,
        newer=each.newer,
        origin={key: value for key, value in origin.items() if value},
        params=each.params,
        cases=tuple(table.get("cases", ())),
        masked=table.get("masked", ""),
        missed=table.get("missed", ""),
        since=each.bug.edit_since,
    )
