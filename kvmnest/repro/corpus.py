"""The corpus of reproducers, and a user's own: read from their scripts.

``kvmnest.repro.bugs`` has the bugs that were fixed upstream, its part ``unfixed`` those that
are not: the defects of ``kvmnest found``.

A reproducer is a Python file with a docstring whose first line is the title, one ``BUG = Bug(...)``
and one pytest function. The file's name gives the id: ``vmx_cpl.py`` is vmx-cpl.
"""

from __future__ import annotations

import ast
import difflib
import functools
import hashlib
import json
import pkgutil
import re
import sys
import traceback
import types
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path

from kvmnest import reading
from kvmnest.errors import HarnessError, UsageError
from kvmnest.kernel.edits import Edit, Newer, newer_texts, series_of, text_for
from kvmnest.repro.bug import SINCE_BY, Bug

PACKAGE = "kvmnest.repro.bugs"
UNFIXED = f"{PACKAGE}.unfixed"
_EDIT = ("file", "function", "expression", "replacement")


@dataclass(frozen=True)
class Reproducer:
    """A script and what it says.

    ``case`` is what ``split_selection`` takes: the module of a script that ships with kvmnest,
    else the path. ``needs`` names the capabilities without which it is skipped. ``does`` is what
    it does: all but the docstring and what ``BUG`` says for people.
    """

    id: str
    title: str
    path: Path
    case: str
    bug: Bug
    needs: tuple[str, ...]
    does: str

    @property
    def shipped(self) -> bool:
        """Whether it belongs to kvmnest, not to the user."""
        return self.case.startswith(f"{PACKAGE}.")

    @property
    def params(self) -> dict[str, str]:
        """Module parameters that the bug needs."""
        return dict(self.bug.params)

    @property
    def edit(self) -> Edit | None:
        """The edit that brings the bug back, None if the script has none."""
        return Edit(**self.bug.edit) if self.bug.edit else None

    @property
    def fix(self) -> tuple[Edit, ...]:
        """Edits that mend the newest source; none for a bug that was fixed upstream."""
        return tuple(Edit(**each) for each in self.bug.fix)

    @property
    def newer(self) -> tuple[Newer, ...]:
        """Its texts for later sources."""
        return newer_texts(self.edit, self.bug.newer) if self.edit else ()

    def edit_for(self, release: str) -> Edit | None:
        """The edit for a kernel's source, None if there is none for it."""
        if self.edit is None or series_of(release) < series_of(self.bug.edit_since):
            return None
        return text_for(self.edit, self.newer, release)

    def script(self, release: str) -> str:
        """Hash of what it does, and of its edit for a kernel's source."""
        edit = self.edit_for(release)
        words = sorted(vars(edit).items()) if edit else []
        does = [sorted(self.params.items()), words, self.bug.death]
        if self.fix:
            does.append([sorted(vars(each).items()) for each in self.fix])
        text = json.dumps([self.does.splitlines(), does])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@functools.cache
def load(package: str = PACKAGE) -> tuple[Reproducer, ...]:
    """The reproducers of a package, by id. Raises HarnessError if one is not as it should be."""
    found = []
    for info in pkgutil.iter_modules(import_module(package).__path__):
        if info.ispkg:
            continue
        name = f"{package}.{info.name}"
        try:
            module = import_module(name)
            path = Path(str(module.__file__))
            found.append(_reproducer(module, path, path.read_text(encoding="utf-8"), name))
        except (UsageError, SyntaxError, ImportError) as error:
            raise HarnessError(f"reproducer {name}: {error}") from error
    return tuple(sorted(found, key=lambda each: each.id))


def select(names: Sequence[str]) -> list[Reproducer]:
    """Reproducers by id, CVE number or file.

    "all" means all bugs that were fixed upstream, "unfixed" all that were not.

    Raises UsageError for an unknown name and for a file that is not a reproducer.
    """
    found: dict[str, Reproducer] = {}
    for name in names:
        for reproducer in _named(name):
            found.setdefault(reproducer.case, reproducer)
    return list(found.values())


def _named(name: str) -> list[Reproducer]:
    if is_file(name):
        return [read(Path(name))]
    packages = {"all": PACKAGE, "unfixed": UNFIXED}
    if name in packages:
        return list(load(packages[name]))
    known = (*load(), *load(UNFIXED))
    hits = [each for each in known if name in (each.id, each.bug.cve)]
    if not hits:
        own = Path(f"{name.replace('-', '_')}.py")
        near = difflib.get_close_matches(name, [each.id for each in load()], 1)
        hint = "kvmnest repro list shows them; a file of yours ends in .py"
        if own.is_file():
            hint = f"for the file of yours: kvmnest repro ./{own}"
        elif near:
            hint = f"did you mean {near[0]}? kvmnest repro list shows all"
        raise UsageError(f"no reproducer {name} ({hint})")
    return hits


def is_file(name: str) -> bool:
    """Whether a name on the command line means a file."""
    return name.endswith(".py") or "/" in name


def read(path: Path) -> Reproducer:
    """Read a user's reproducer, which executes its module.

    Raises UsageError if it cannot be read, does not run, or is not a reproducer.
    """
    try:
        source = reading.text(path)
    except HarnessError as error:
        raise UsageError(str(error)) from error
    own = path.resolve()
    for each in (*load(), *load(UNFIXED)):
        if own == each.path:
            return each
    module = types.ModuleType(own.stem)
    module.__file__ = str(own)
    # As pytest does: a script may import its neighbours.
    sys.path.insert(0, str(own.parent))
    try:
        exec(compile(source, str(path), "exec"), module.__dict__)
    except KeyboardInterrupt:
        raise
    except SyntaxError as error:
        raise UsageError(f"{path}:{error.lineno}: {error.msg}") from error
    except BaseException as error:
        frames = traceback.extract_tb(error.__traceback__)
        line = next((f.lineno for f in reversed(frames) if f.filename == str(path)), 1)
        raise UsageError(f"{path}:{line}: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(str(own.parent))
    return replace(_reproducer(module, path, source, str(path)), path=own)


def _reproducer(module: types.ModuleType, path: Path, source: str, case: str) -> Reproducer:
    bug = getattr(module, "BUG", None)
    if not isinstance(bug, Bug):
        raise UsageError(f"{path} is not a reproducer: it has no BUG = Bug(...)")
    title = (module.__doc__ or "").strip().partition("\n")[0].rstrip(".")
    if not title:
        raise UsageError(f"{path} has no docstring, whose first line is the bug's title")
    tests = [
        value
        for name, value in vars(module).items()
        if name.startswith("test_") and isinstance(value, types.FunctionType)
    ]
    if len(tests) != 1:
        count = "no" if not tests else len(tests)
        raise UsageError(f"{path} has {count} functions named test_...: a reproducer has one")
    for edit in (bug.edit, *bug.fix):
        if edit and (set(edit) != set(_EDIT) or not all(map(_is_text, edit.values()))):
            raise UsageError(f"{path}: edit needs the texts {', '.join(_EDIT)}, and nothing else")
    try:
        newer_texts(Edit(**(bug.edit or dict.fromkeys(_EDIT, ""))), bug.newer)
    except ValueError as error:
        raise UsageError(f"{path}: edit: {error}") from error
    if bug.edit_since and not re.fullmatch(r"\d+\.\d+", bug.edit_since):
        raise UsageError(f'{path}: edit_since is a version, as "6.15", not {bug.edit_since!r}')
    if bool(bug.since) != bool(bug.since_by) or bug.since_by not in ("", *SINCE_BY):
        raise UsageError(f"{path}: since needs since_by, one of {', '.join(SINCE_BY)}")
    if not all(map(_is_text, [*bug.params, *bug.params.values()])):
        raise UsageError(f'{path}: params are texts, as {{"ept": "0"}}')
    return Reproducer(
        id=path.stem.replace("_", "-"),
        title=title,
        path=path,
        case=case,
        bug=bug,
        needs=tuple(
            f"{type(flag).__name__}.{flag.name}"
            for mark in getattr(tests[0], "pytestmark", ())
            if mark.name == "needs"
            for flag in mark.args
        ),
        does=_does(source),
    )


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _does(source: str) -> str:
    """A script without its docstring, its ``BUG`` and empty lines."""
    lines = source.splitlines()
    for number, node in enumerate(ast.parse(source).body):
        docstring = number == 0 and isinstance(node, ast.Expr)
        named = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "BUG"
        if (docstring or named) and node.end_lineno:
            lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
    return "\n".join(line for line in lines if line)
