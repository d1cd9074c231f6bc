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
MINOR = "minor"


@dataclass(frozen=True)
class Defect:
    """A defect: what L1 or L2 sees and what the SDM says (title and section: the reproducer's).

    ``line`` of ``function`` in ``file`` of the newest source is at fault, ``loss`` is what it
    costs a user, ``fix`` what would mend it, ``limits`` what the tried fix leaves out, ``witness``
    how a fault of the emulated CPU is ruled out, ``cases`` are those of ``known.toml`` that show
    it. ``reach`` says how a guest gets there if that takes something unusual, ``public`` what
    reports, threads and comments of the source say about it. ``weight`` is MINOR for one by which
    no software that keeps to the SDM is known to lose. ``cpu_model`` is the one of Bochs that shows
    it, if the lab's usual one has not what it takes.
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
    reach: str = ""
    public: str = ""
    weight: str = ""
    cpu_model: str = ""

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
    """All defects, in the order of the file: the worst first. Raises HarnessError if damaged."""
    try:
        entries = reading.toml(FILE)["defect"]
        defects = tuple(Defect(**{**entry, "cases": tuple(entry["cases"])}) for entry in entries)
    except (ValueError, KeyError, TypeError) as error:
        raise HarnessError(f"{FILE} cannot be used: {error}") from error
    wrong = [each.id for each in defects if each.weight not in ("", MINOR)]
    if wrong:
        raise HarnessError(f"{FILE} cannot be used: {wrong[0]}: weight is {MINOR} or left out")
    return defects
