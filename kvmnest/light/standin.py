"""A stand-in for pytest, as small as the suite's modules allow.

Importing pytest takes the lab's guest longer than booting Linux. Modules of the suite need it for
decorators, which the host's pytest has read already, and for a few functions. What this module
lacks, a suite module must not use; ``kvmnest.light.plan`` finds out and falls back to pytest.
"""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Callable
from typing import Any, NoReturn, Self

from kvmnest.light import rewrite

#: Attribute of a function: its ``parametrize`` marks as (names, values) pairs.
PARAMETRIZE = "_kvmnest_parametrize"
#: Attribute of a function: it is a fixture of this name and scope.
FIXTURE = "_kvmnest_fixture"


class Skipped(BaseException):
    """Raised by ``pytest.skip``."""


class Failed(AssertionError):
    """Raised by ``pytest.fail`` and by ``pytest.raises`` when nothing was raised.

    ``pytrace`` says whether the traceback tells anything.
    """

    def __init__(self, reason: str, pytrace: bool = True) -> None:
        super().__init__(reason)
        self.pytrace = pytrace


class _Mark:
    """``pytest.mark.NAME``, with or without arguments."""

    def __init__(self, name: str, args: tuple[Any, ...] = (), kwargs: Any = None) -> None:
        self.name, self.args, self.kwargs = name, args, kwargs or {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and isinstance(args[0], types.FunctionType | type):
            return self._decorate(args[0])
        return _Mark(self.name, self.args + args, self.kwargs | kwargs)

    def _decorate(self, function: Any) -> Any:
        if self.name == "parametrize" and not isinstance(function, type):
            names, values = self.args[:2] if len(self.args) > 1 else self._named()
            if isinstance(names, str):
                names = [name.strip() for name in names.split(",") if name.strip()]
            marks = function.__dict__.setdefault(PARAMETRIZE, [])
            marks.append((tuple(names), tuple(values)))
        return function

    def _named(self) -> tuple[Any, Any]:
        names = self.args[0] if self.args else self.kwargs["argnames"]
        return names, self.kwargs["argvalues"]


class _MarkGenerator:
    def __getattr__(self, name: str) -> _Mark:
        return _Mark(name)


mark = _MarkGenerator()


class Config:
    """The options of a run, as the fixture ``pytestconfig`` gives them."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._options = options

    def getoption(self, name: str) -> Any:
        """Value of an option, by its name on the command line."""
        return self._options[name]


class Param:
    """What ``pytest.param`` returns."""

    def __init__(self, values: tuple[Any, ...]) -> None:
        self.values = values


def param(*values: Any, id: str | None = None, marks: Any = ()) -> Param:
    """One set of values of a parametrisation."""
    return Param(values)


def fixture(function: Any = None, *, scope: str = "function", **others: Any) -> Any:
    """Mark a function as a fixture."""
    if others.keys() - {"autouse", "name"}:
        raise TypeError(f"fixture({', '.join(others)}) is not supported here")

    def decorate(function: types.FunctionType) -> types.FunctionType:
        setattr(function, FIXTURE, scope)
        return function

    return decorate if function is None else decorate(function)


def skip(reason: str = "") -> NoReturn:
    """End the case as skipped."""
    raise Skipped(reason)


def fail(reason: str = "", pytrace: bool = True) -> NoReturn:
    """End the case as failed."""
    raise Failed(reason, pytrace)


class raises:
    """``with pytest.raises(Error, match="...") as caught``; ``caught.value`` is the exception."""

    value: BaseException

    def __init__(
        self, expected: type[BaseException] | tuple[type[BaseException], ...], match: str = ""
    ) -> None:
        self._expected, self._match = expected, match

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, value: BaseException | None, trace: Any) -> bool:
        if value is None:
            raise Failed(f"DID NOT RAISE {getattr(self._expected, '__name__', self._expected)}")
        if not isinstance(value, self._expected):
            return False
        if self._match and not re.search(self._match, str(value)):
            raise Failed(f"pattern {self._match!r} not found in {str(value)!r}")
        self.value = value
        return True


def install() -> None:
    """Make ``import pytest`` find this module, and rewritten assert statements what they call."""
    package, assertion = types.ModuleType("_pytest"), types.ModuleType("_pytest.assertion")
    assertion.rewrite = rewrite  # type: ignore[attr-defined]
    package.assertion = assertion  # type: ignore[attr-defined]
    sys.modules |= {
        "pytest": sys.modules[__name__],
        "_pytest": package,
        "_pytest.assertion": assertion,
        "_pytest.assertion.rewrite": rewrite,
    }


def values_of(function: Callable[..., Any], indices: dict[str, int]) -> dict[str, Any]:
    """Arguments of a parametrised function, chosen by index. Raises KeyError, IndexError."""
    found: dict[str, Any] = {}
    for names, values in getattr(function, PARAMETRIZE, ()):
        chosen = values[indices[names[0]]]
        if isinstance(chosen, Param):
            parts = chosen.values
        else:
            parts = (chosen,) if len(names) == 1 else tuple(chosen)
        found.update(zip(names, parts, strict=True))
    return found
