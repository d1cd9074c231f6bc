"""What may differ between two runs of a program, and why: ``data/program-differences.toml``."""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from kvmnest import reading
from kvmnest.errors import HarnessError
from kvmnest.fuzz.programs.compare import Difference, shown
from kvmnest.known import kernel_in_range

FILE = Path(__file__).parents[2] / "data" / "program-differences.toml"
#: Whose a difference is.
WHOSE = ("KVM", "Bochs", "kvmnest", "SDM")


@dataclass(frozen=True)
class Known:
    """One entry; the file says what each part means."""

    what: str
    whose: str
    reason: str
    after: str = "*"
    behind: str = "*"
    one: str = "*"
    other: str = "*"
    bits: int = 0
    kernels: str = "any"
    against: str = "*"
    follows: str = ""

    def explains(self, difference: Difference, before: Collection[str] = ()) -> bool:
        """Whether it is about this difference, behind known ones of what is in ``before``."""
        return self.concerns(difference, before) and self._only_bits(difference)

    def concerns(self, difference: Difference, before: Collection[str]) -> bool:
        """Whether it is about such a difference, of whatever bits."""
        return (
            fnmatchcase(difference.what, self.what)
            and (not self.follows or self.follows in before)
            and _matches(difference.end, self.after)
            and (self.behind == "*" or any(_matches(e, self.behind) for e in difference.ends))
            and _matches(_text(difference.one), self.one)
            and _matches(_text(difference.other), self.other)
        )

    def _only_bits(self, difference: Difference) -> bool:
        if not self.bits:
            return True
        one, other = difference.one, difference.other
        if not isinstance(one, int) or not isinstance(other, int):
            return False
        return (one ^ other) & ~self.bits == 0


def _text(value: object) -> str:
    return shown(value) if isinstance(value, list) else f"{value:#x}" if _is(value) else str(value)


def _is(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def explained(
    difference: Difference, known: Sequence[Known], before: Collection[str]
) -> Sequence[Known]:
    """The entry that explains a difference, or several that explain some of its bits each."""
    for entry in known:
        if entry.explains(difference, before):
            return (entry,)
    one, other = difference.one, difference.other
    if not isinstance(one, int) or not isinstance(other, int):
        return ()
    some = [e for e in known if e.bits & (one ^ other) and e.concerns(difference, before)]
    bits = functools.reduce(lambda bits, entry: bits | entry.bits, some, 0)
    return () if (one ^ other) & ~bits else some


@functools.cache
def _pattern(text: str) -> re.Pattern[str]:
    return re.compile("|".join(re.escape(one).replace(r"\*", ".*") for one in text.split(" | ")))


def _matches(text: str, pattern: str) -> bool:
    """Whether a text is one of those of a pattern: ``*`` is anything, `` | `` is or."""
    return _pattern(pattern).fullmatch(text) is not None


def load(kernel: str, against: str, path: Path = FILE) -> tuple[Known, ...]:
    """Entries for a kernel, and a second machine. Raises HarnessError for a file that is wrong."""
    try:
        entries = [Known(**entry) for entry in reading.toml(path)["difference"]]
        for entry in entries:
            if entry.whose not in WHOSE:
                raise ValueError(f"whose = {entry.whose!r} is none of {', '.join(WHOSE)}")
        return tuple(
            entry
            for entry in entries
            if kernel_in_range(kernel, entry.kernels) and fnmatchcase(against, entry.against)
        )
    except (ValueError, KeyError, TypeError) as error:
        raise HarnessError(f"{path} is damaged: {error}") from error
