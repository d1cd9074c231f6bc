"""Names of cases as people type them: a function alone, or one that is nearly right."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from kvmnest.errors import KvmnestError, UsageError

_SUITE = Path(__file__).parent.parent / "suite"
_FUNCTION = re.compile(r"^def (test_\w+)\(", re.MULTILINE)
_ALONE = re.compile(r"(test_\w+)(\[.*\])?", re.DOTALL)


@cache
def functions() -> dict[str, tuple[str, ...]]:
    """Name of each function of the suite -> the files that have it."""
    found: dict[str, tuple[str, ...]] = {}
    for path in sorted(_SUITE.glob("test_*.py")):
        for name in _FUNCTION.findall(path.read_text(encoding="utf-8")):
            found[name] = (*found.get(name, ()), path.name)
    return found


def complete(name: str) -> str:
    """The id of a case that is named by its function alone; other names as they are.

    Raises UsageError if several files have such a function.
    """
    alone = _ALONE.fullmatch(name)
    files = functions().get(alone[1], ()) if alone else ()
    if len(files) > 1:
        raise UsageError(f"{name} is in several files: {', '.join(files)}")
    return f"{files[0]}::{name}" if files else name


class NothingSelected(KvmnestError):
    """The selection holds no case."""

    exit_code = 4


def nothing(selected: Sequence[str], keyword: str = "", marks: str = "") -> NothingSelected:
    """The error for a selection of existing names that leaves no case."""
    words = [*selected]
    words += [f"{option} {text!r}" for option, text in (("-k", keyword), ("-m", marks)) if text]
    return NothingSelected(
        f"no case matches {' '.join(words) or 'this'}; kvmnest list shows all, and takes -k too"
    )


def is_case(file: str, case: str) -> bool:
    """Whether a file of the suite ("test_vmxon") has a case ("::test_x[y]"; "" is all of it)."""
    parts = case.partition("[")[0].split("::")[1:]  # a class may stand before the function
    return {*parts} <= _defined(file)


@cache
def _defined(file: str) -> frozenset[str]:
    """Names of the functions and classes in a file of the suite."""
    text = (_SUITE / f"{file}.py").read_text(encoding="utf-8")
    return frozenset(re.findall(r"^ *(?:def|class) (\w+)", text, re.MULTILINE))


def unknown(name: str) -> UsageError:
    """The error for a name that is nothing, with what may have been meant."""
    file, _, case = name.partition("::")
    wanted = (case or file).partition("[")[0].removesuffix(".py")
    if case and wanted in functions():
        where = ", ".join(functions()[wanted])
        return UsageError(f"no such case: {name} ({wanted} is in {where})")
    known = {*functions(), *(path.stem for path in _SUITE.glob("test_*.py"))}
    near = difflib.get_close_matches(wanted, known, 2)
    hint = f"did you mean {' or '.join(near)}?" if near else "kvmnest list shows all"
    return UsageError(f"no such case, file or directory: {name} ({hint})")
