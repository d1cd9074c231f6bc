"""The rules for cases of the suite, and what a case needs before it may run."""

from __future__ import annotations

import enum
import types
from pathlib import Path

import pytest

import kvmnest
from kvmnest.cases.needs import why_skipped
from kvmnest.plugin.asserts import asserts
from kvmnest.plugin.fixtures import offer, open_kvm

SUITE = "kvmnest.suite"
#: The reproducers of ``kvmnest repro``: rules of the suite hold for them too.
REPRODUCERS = "kvmnest.repro.bugs"
SUITE_DIR = str(Path(kvmnest.__file__).parent / "suite")
LAST_PATCH = 24

MARKERS = (
    "sdm(title): section title of the Intel SDM that the case is about",
    "series(n): number, 1 to 24, of the patch of 'Nested VMX, v5' that introduced the behaviour",
    "needs(*flags): capability flags (kvmnest.vmx enums, VMCS fields, kvmnest.kvm.Cap); without"
    " them the case is skipped with the missing bit named",
    "kvm_param(name=value): kvm_intel module parameters that the case needs",
)

ASSERTS = pytest.StashKey[bool]()


def in_suite(item: pytest.Item) -> bool:
    """Whether the item is a case of the suite that ships with kvmnest."""
    module = getattr(item, "module", None)
    return module is not None and module.__name__.startswith(SUITE + ".")


def ships(item: pytest.Item) -> bool:
    """Whether the item is a case of the suite or one of kvmnest's reproducers."""
    module = getattr(item, "module", None)
    return in_suite(item) or (module is not None and module.__name__.startswith(REPRODUCERS + "."))


def case_id(nodeid: str, item: pytest.Item | None = None) -> str:
    """Id of a case: "test_vmxon.py::test_name[param]" if it ships with kvmnest, else pytest's."""
    if item is not None and ships(item):
        # Beside files of the user pytest calls the file of the suite "", which is far from them.
        return f"{item.path.name}::{nodeid.partition('::')[2]}"
    return nodeid


def series(item: pytest.Item) -> int | None:
    """Patch number of a case, if it is marked."""
    mark = item.get_closest_marker("series")
    return mark.args[0] if mark and mark.args else None


def sdm(item: pytest.Item) -> str | None:
    """SDM section title of a case, if it is marked."""
    mark = item.get_closest_marker("sdm")
    return mark.args[0] if mark and mark.args else None


def problems(items: list[pytest.Item]) -> list[str]:
    """Violations of the marking rules among cases that ship with kvmnest, one line each."""
    found: dict[str, None] = {}
    for item in items:
        if not ships(item):
            continue
        name = case_id(item.nodeid, item).partition("[")[0]
        number, title = series(item), sdm(item)
        if number is None:
            if in_suite(item):  # a reproducer names its commit instead
                found[f"{name}: no series(n) marker"] = None
        elif type(number) is not int or not 1 <= number <= LAST_PATCH:
            found[f"{name}: series({number!r}) is not a number from 1 to {LAST_PATCH}"] = None
        if not isinstance(title, str) or not title.strip():
            found[f"{name}: no sdm(title) marker"] = None
    return list(found)


def note_assertions(items: list[pytest.Item]) -> None:
    """Find out which cases that ship with kvmnest contain an assertion."""
    known: dict[object, bool] = {}
    for item in items:
        function = getattr(item, "function", None)
        function = getattr(function, "__func__", function)
        if not ships(item) or not isinstance(function, types.FunctionType):
            continue
        if function not in known:
            known[function] = asserts(function)
        item.stash[ASSERTS] = known[function]


def needed_flags(item: pytest.Item) -> list[enum.Enum]:
    """Capability flags of all ``needs`` markers."""
    return [flag for mark in item.iter_markers("needs") for flag in mark.args]


def needed_params(item: pytest.Item) -> dict[str, object]:
    """Module parameters of all ``kvm_param`` markers."""
    wanted: dict[str, object] = {}
    for mark in item.iter_markers("kvm_param"):
        wanted.update(mark.kwargs)
    return wanted


def needs_vmx(item: pytest.Item) -> bool:
    """Whether it needs VMX: all that ship with kvmnest but those about the parameter nested."""
    return ships(item) and "nested" not in needed_params(item)


def require(item: pytest.Item) -> None:
    """Skip the case with the exact reason if this machine lacks what it needs."""
    flags, params, vmx = needed_flags(item), needed_params(item), needs_vmx(item)
    if not (flags or params or vmx):
        return
    if flags or vmx:
        open_kvm(item.config)
    reason = why_skipped(offer(item.config), flags, params, vmx=vmx)
    if reason:
        pytest.skip(reason)


def uses_kvmnest(item: pytest.Item) -> bool:
    """Whether a test uses one of the plugin's fixtures."""
    names = getattr(item, "fixturenames", ())
    return not {"kvm", "vm", "l1"}.isdisjoint(names)
