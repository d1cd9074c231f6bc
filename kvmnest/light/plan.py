"""Writes what pytest collected as a plan for ``kvmnest.light.runner``.

As a plugin it is loaded by ``-p kvmnest.light.plan --kvmnest-plan FILE`` only.
"""

from __future__ import annotations

import marshal
import subprocess
import sys
import types
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from _pytest.assertion.rewrite import PYC_TAIL

from kvmnest.plugin import policy

_PLUGIN_FIXTURES = "kvmnest.plugin.fixtures"
#: Options that cases and fixtures ask ``pytestconfig`` for.
_OPTIONS = (
    *("--kvmnest-trace", "--kvmnest-budget", "--kvmnest-target"),
    *("--nested-roundtrip", "--fresh-vm", "--kernel-log"),
)
_UNSUPPORTED_MARKS = ("skip", "skipif", "xfail", "usefixtures", "filterwarnings")


class Unsupported(Exception):
    """The light runner cannot run a case; the text says why."""


def options(path: Path | str) -> list[str]:
    """Options with which pytest writes the plan to ``path``."""
    return ["-p", "kvmnest.light.plan", f"--kvmnest-plan={path}"]


def why_not(path: str) -> str:
    """Why the light runner cannot run a plan, "" if it can."""
    done = subprocess.run(
        [sys.executable, "-m", "kvmnest.light.runner", path, "check", "0"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    lines = done.stderr.strip().splitlines()
    return "" if done.returncode == 0 else lines[-1] if lines else f"status {done.returncode}"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option."""
    group = parser.getgroup("kvmnest", "nested VMX under KVM")
    group.addoption("--kvmnest-plan", metavar="FILE", help="write what was collected to FILE")


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """Register what writes the plan."""
    path = config.getoption("--kvmnest-plan")
    if path:
        config.pluginmanager.register(PlanWriter(config, path), "kvmnest-plan")


class PlanWriter:
    """A plugin object that writes the plan to ``path`` when collection is over.

    The plan is a marshalled dict: ``cases`` in running order, ``options``, pytest's version, how
    the names of its compiled modules end, and
    ``unsupported``, "" if the light runner can run every case.
    """

    def __init__(self, config: pytest.Config, path: str) -> None:
        self._config, self._path = config, path

    @pytest.hookimpl(tryfirst=True)
    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Keep the values of generators, which pytest itself uses up."""
        for mark in metafunc.definition.iter_markers("parametrize"):
            if len(mark.args) > 1 and isinstance(mark.args[1], Iterator):
                args = (mark.args[0], list(mark.args[1]), *mark.args[2:])
                object.__setattr__(mark, "args", args)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Write the plan."""
        cases, unsupported = [], ""
        try:
            cases = [_entry(item) for item in session.items]
        except Unsupported as error:
            unsupported = str(error)
        plan = {
            "cases": cases,
            "unsupported": unsupported,
            "pytest": pytest.__version__,
            "pyc_tail": PYC_TAIL,
            "options": {name: self._config.getoption(name) for name in _OPTIONS},
        }
        with open(self._path, "wb") as file:
            marshal.dump(plan, file)


def _entry(item: pytest.Item) -> dict[str, Any]:
    name = policy.case_id(item.nodeid, item)
    if not (policy.ships(item) and isinstance(item, pytest.Function)):
        raise Unsupported(f"{name} is not a function of kvmnest")
    function = getattr(item.function, "__func__", item.function)
    if not isinstance(function, types.FunctionType):
        raise Unsupported(f"{name} is not a plain function")
    if hasattr(item.module, "pytest_generate_tests"):
        raise Unsupported(f"{name}: its module has pytest_generate_tests")
    for mark in item.iter_markers():
        if mark.name in _UNSUPPORTED_MARKS:
            raise Unsupported(f"{name} has the mark {mark.name}")
    return {
        "id": name,
        "series": policy.series(item),
        "sdm": policy.sdm(item),
        "module": item.module.__name__,
        "class": item.cls.__qualname__ if item.cls else "",
        "function": item.originalname,
        "indices": _indices(name, item),
        "fixtures": _fixtures(name, item),
        "needs": [
            (type(flag).__module__, type(flag).__qualname__, flag.value)
            for flag in policy.needed_flags(item)
        ],
        "params": policy.needed_params(item),
        "vmx": policy.needs_vmx(item),
        "asserts": item.stash.get(policy.ASSERTS, True),
    }


def _indices(name: str, item: pytest.Function) -> dict[str, int]:
    marks = list(item.iter_markers("parametrize"))
    own = [m for m in getattr(item.function, "pytestmark", []) if m.name == "parametrize"]
    if len(marks) != len(own) or any(mark.kwargs.get("indirect") for mark in marks):
        raise Unsupported(f"{name} is parametrised from its module or indirectly")
    found: dict[str, int] = {}
    left = set(item.callspec.params) if hasattr(item, "callspec") else set()
    for mark in marks:
        names, values = _parametrize(*mark.args, **mark.kwargs)
        left -= set(names)
        wanted = [item.callspec.params[argument] for argument in names]
        for index, value in enumerate(values):
            if all(a is b for a, b in zip(_parts(value, names), wanted, strict=True)):
                found[names[0]] = index
                break
        else:
            raise Unsupported(f"{name} is parametrised with values that cannot be found again")
    if left:
        raise Unsupported(f"{name} uses a fixture with parameters: {', '.join(sorted(left))}")
    return found


def _parametrize(
    argnames: str | Sequence[str], argvalues: Iterable[Any], **others: Any
) -> tuple[list[str], list[Any]]:
    if isinstance(argnames, str):
        argnames = [name.strip() for name in argnames.split(",") if name.strip()]
    return list(argnames), list(argvalues)


def _parts(value: Any, names: list[str]) -> tuple[Any, ...]:
    if hasattr(value, "marks") and hasattr(value, "values"):  # pytest.param(...)
        return tuple(value.values)
    return (value,) if len(names) == 1 else tuple(value)


def _fixtures(name: str, item: pytest.Function) -> list[tuple[str, str]]:
    """What the case itself asks for: (fixture, its module or "" for the plugin's own)."""
    params = item.callspec.params if hasattr(item, "callspec") else {}
    wanted = [n for n in item._fixtureinfo.initialnames if n not in params]
    return [(fixture, _home(name, item, fixture)) for fixture in wanted]


def _home(name: str, item: pytest.Function, fixture: str) -> str:
    definitions = item._fixtureinfo.name2fixturedefs.get(fixture, ())
    module = definitions[-1].func.__module__ if definitions else ""
    if module == _PLUGIN_FIXTURES or fixture == "pytestconfig":
        return ""
    if not module.startswith(policy.SUITE + "."):
        raise Unsupported(f"{name} uses the fixture {fixture}")
    definition = definitions[-1]
    if definition.params or definition.scope not in ("function", "module", "session"):
        raise Unsupported(f"{name} uses the fixture {fixture} with parameters or another scope")
    for other in definition.argnames:
        _home(name, item, other)
    return module
