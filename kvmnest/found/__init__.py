"""Defects of KVM that kvmnest shows on kernels of today: ``kvmnest/data/found.toml``.

Each has a reproducer in ``kvmnest.repro.bugs.unfixed`` of the same id, which also holds the edits
that mend KVM. ``record`` is what kernels showed, ``verify`` has them show it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from kvmnest import known, reading
from kvmnest.errors import HarnessError
from kvmnest.kernel.edits import Edit
from kvmnest.repro import corpus

FILE = Path(__file__).parent.parent / "data" / "found.toml"


@dataclass(frozen=True)
class Defect:
    """A defect: what L1 or L2 sees and what the SDM says (title and section: the reproducer's).

    ``line`` of ``function`` in ``file`` of the newest source is at fault, ``loss`` is what it
    costs a user, ``fix`` what would mend it, ``limits`` what the tried fix leaves out, ``witness``
    how a fault of the emulated CPU is ruled out, ``cases`` are those of ``known.toml`` that show
    it.
    """

    id: str
    seen: str
    right: str
    file: str
    function: str
    line: str
    loss: str
    fix: str
    witness: str
    cases: tuple[str, ...]
    limits: str = ""

    @property
    def reproducer(self) -> corpus.Reproducer:
        """Its script. Raises HarnessError if there is none."""
        scripts = [each for each in corpus.load(corpus.UNFIXED) if each.id == self.id]
        if not scripts:
            raise HarnessError(f"{FILE}: {self.id} has no reproducer in {corpus.UNFIXED}")
        return scripts[0]

    @property
    def fault(self) -> Edit:
        """Where the fault is, as an edit that changes nothing."""
        return Edit(self.file, self.function, self.line, self.line)

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
