"""Numbers that may be unknown: a member of an enumeration where there is one."""

from __future__ import annotations

import enum
import functools
from collections.abc import Mapping


@functools.cache
def _members(kind: type[enum.IntEnum]) -> Mapping[int, enum.IntEnum]:
    return {int(member): member for member in kind}


def enum_or_int(kind: type[enum.IntEnum], number: int) -> int:
    """Return the member of ``kind`` with this number, or the bare number where it has none."""
    return _members(kind).get(number, number)


def name_of(kind: type[enum.IntEnum], number: int) -> str | None:
    """Return the name of the member of ``kind`` with this number, None where it has none."""
    member = _members(kind).get(number)
    return None if member is None else member.name
