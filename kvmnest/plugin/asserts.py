"""Does a case assert anything? Answered from its compiled code, without running it."""

from __future__ import annotations

import dis
import functools
import types

_HELPER_PREFIXES = ("check_", "expect_", "assert_")
# pytest's rewritten assert statements look these names up; pytest.raises and pytest.fail assert
# by calling.
_MARKS = frozenset({"@pytest_ar", "AssertionError", "raises", "fail"})


def asserts(function: types.FunctionType) -> bool:
    """Whether ``function``, or a helper that it names, contains an assertion.

    Helpers are functions of the same top-level package whose name starts with ``check_``,
    ``expect_`` or ``assert_``, looked up in the function's globals and in modules there; they are
    followed in turn.
    """
    return _asserts(function, set())


def _asserts(function: types.FunctionType, seen: set[types.CodeType]) -> bool:
    code = function.__code__
    if code in seen:
        return False
    seen.add(code)
    names: set[str] = set()
    for part in _codes(code):
        names.update(part.co_names)
        if not _MARKS.isdisjoint(part.co_names) or _plain_assert(part):
            return True
    package = function.__module__.partition(".")[0]
    for helper in _helpers(function, names):
        if helper.__module__.partition(".")[0] == package and _asserts(helper, seen):
            return True
    return False


def _codes(code: types.CodeType) -> list[types.CodeType]:
    found = [code]
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            found += _codes(const)
    return found


@functools.cache
def _plain_assert(code: types.CodeType) -> bool:
    # An assert statement in a module that pytest does not rewrite. Python 3.14 loads
    # AssertionError with a general instruction, earlier ones with one of its own.
    return any(
        instruction.opname == "LOAD_ASSERTION_ERROR" or instruction.argval is AssertionError
        for instruction in dis.get_instructions(code)
    )


def _helpers(function: types.FunctionType, names: set[str]) -> list[types.FunctionType]:
    wanted = [name for name in names if name.startswith(_HELPER_PREFIXES)]
    if not wanted:
        return []
    scopes = [function.__globals__]
    for name in names:
        value = function.__globals__.get(name)
        if isinstance(value, types.ModuleType):
            scopes.append(vars(value))
    for cell in function.__closure__ or ():
        content = cell.cell_contents
        if isinstance(content, types.FunctionType):
            scopes.append({content.__name__: content})
    found = (scope.get(name) for scope in scopes for name in wanted)
    return [value for value in found if isinstance(value, types.FunctionType)]
