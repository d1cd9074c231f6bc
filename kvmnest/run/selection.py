"""Which cases to run: what the user names, and the arguments of pytest that select them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kvmnest.run import names

# Plugins of pytest that no case uses; each costs time, most of all in the lab.
_UNUSED_PLUGINS = (
    "cacheprovider",
    "debugging",
    "doctest",
    "faulthandler",
    "junitxml",
    "legacypath",
    "logging",
    "nose",
    "pastebin",
    "recwarn",
    "setuponly",
    "setupplan",
    "stepwise",
    "subtests",
    "threadexception",
    "unittest",
    "unraisableexception",
    "warnings",
)

_SUITE = "kvmnest.suite"
_REPRODUCERS = "kvmnest.repro.bugs."
_SUITE_FILE = re.compile(r"(test_\w+)(?:\.py)?((?:::.*)?)", re.DOTALL)


@dataclass(frozen=True)
class Selection:
    """Which cases to run and how.

    ``selected`` holds ids of the suite ("test_vmxon.py", "test_vmxon.py::test_name[param]") and
    paths of further test files; empty means the whole suite. ``only``, if it is not empty, are the
    ids of the cases of the suite to run among those. ``budget`` is in seconds of the target's
    clock.
    """

    selected: Sequence[str] = ()
    keyword: str = ""
    marks: str = ""
    deselected: Sequence[str] = ()
    only: Sequence[str] = ()
    budget: float = 5.0
    nested_roundtrip: bool = False
    shuffle: int | None = None
    kernel_log: str = "warning"


def split_selection(selected: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return (arguments that name modules of kvmnest, paths of other files).

    The modules are those of the suite and, by their dotted names, the reproducers. A case may be
    named by its function alone, if one file only has it. Raises UsageError for what is neither a
    file nor one of them.
    """
    if not selected:
        return [_SUITE], []
    suite_dir = Path(__file__).parent.parent / "suite"
    modules, paths = [], []
    for name in selected:
        if name.startswith(_REPRODUCERS):
            modules.append(name)
            continue
        path = Path(name.partition("::")[0])
        if not path.exists() and not (suite_dir / path.with_suffix(".py").name).is_file():
            name = names.complete(name)
        found = _SUITE_FILE.fullmatch(name)
        if found and (suite_dir / f"{found[1]}.py").is_file() and not path.exists():
            if not names.is_case(found[1], found[2]):
                raise names.unknown(name)
            modules.append(f"{_SUITE}.{found[1]}{found[2]}")
        elif path.exists() and path.resolve().is_relative_to(suite_dir.resolve()):
            inside = path.resolve().relative_to(suite_dir.resolve()).with_suffix("")
            dotted = ".".join((_SUITE, *inside.parts))
            modules.append(dotted + name[len(name.partition("::")[0]) :])
        elif path.exists():
            paths.append(name)
        else:
            raise names.unknown(name)
    return modules, paths


def pytest_arguments(
    selection: Selection, target: str, modules: list[str], paths: list[str]
) -> list[str]:
    """Arguments for ``python -m pytest``, without the event channel and the starting point."""
    arguments = ["-p", "kvmnest.plugin"]
    for name in _UNUSED_PLUGINS:
        arguments += ["-p", f"no:{name}"]
    if not paths:
        # The suite obeys no configuration of the folder that one happens to stand in.
        arguments += ["-c", "/dev/null", "--rootdir", "/"]
    arguments += ["--capture=fd", "--tb=short", "-q", "--color=no", "--require-kvm"]
    arguments += [f"--kvmnest-target={target}", f"--kvmnest-budget={selection.budget:g}"]
    if selection.kernel_log != "warning":
        arguments.append(f"--kernel-log={selection.kernel_log}")
    if selection.nested_roundtrip:
        arguments.append("--nested-roundtrip")
    if selection.shuffle is not None:
        arguments.append(f"--kvmnest-shuffle={selection.shuffle}")
    if selection.keyword:
        arguments += ["-k", selection.keyword]
    if selection.marks:
        arguments += ["-m", selection.marks]
    arguments += [f"--kvmnest-deselect={name}" for name in selection.deselected]
    arguments += [f"--kvmnest-only={name}" for name in selection.only]
    # With --pyargs pytest looks for a module of a path's name, and then leaves the file's
    # assertions as they are.
    return [*arguments, *(["--pyargs"] if modules else []), *modules, *paths]
