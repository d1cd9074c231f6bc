"""Defects of KVM that kvmnest shows on kernels of today: ``kvmnest/data/found.toml``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from kvmnest import known, reading
from kvmnest.errors import HarnessError

FILE = Path(__file__).parent / "data" / "found.toml"


@dataclass(frozen=True)
class Defect:
    """A defect: what L1 or L2 sees and what the SDM says (``sdm`` is a section title).

    ``function`` is at fault in the newest source, ``loss`` is what it costs a user, ``fix`` what
    would mend it, ``cases`` are those of ``known.toml`` that show it.
    """

    id: str
    title: str
    sdm: str
    seen: str
    right: str
    function: str
    loss: str
    fix: str
    cases: tuple[str, ...]

    @property
    def kernels(self) -> str:
        """Kernels that have it, as the record says for its cases: "all tried", ">=6.15"."""
        ranges = dict.fromkeys(each.kernels for each in self.deviations())
        return ", ".join("all tried" if each == "any" else each for each in ranges)

    def deviations(self) -> Sequence[known.Deviation]:
        """The entries of ``known.toml`` for its cases that a fix upstream has not ended.

        Raises HarnessError if a case has none.
        """
        found: list[known.Deviation] = []
        for case in self.cases:
            of_case = [d for d in known.read() if d.case == case and not d.upstream]
            if not of_case:
                raise HarnessError(f"{FILE}: {self.id}: {case} is not in known.toml")
            found += of_case
        return found


@cache
def load() -> tuple[Defect, ...]:
    """All defects, in the order of the file. Raises HarnessError if it is damaged."""
    try:
        entries = reading.toml(FILE)["defect"]
        return tuple(Defect(**{**entry, "cases": tuple(entry["cases"])}) for entry in entries)
    except (ValueError, KeyError, TypeError) as error:
        raise HarnessError(f"{FILE} cannot be used: {error}") from error
