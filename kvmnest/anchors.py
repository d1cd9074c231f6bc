"""What other suites assert of nested VMX, and which cases of this one do so.

The record is ``kvmnest/data/anchors.toml``, a list of tables::

    [[row]]
    suite = "kvm-unit-tests"
    test = "vmx_eoi_virt_test"            # as that suite names it
    cases = ["test_virtual_interrupts.py::*"]   # fnmatch patterns on FILE::FUNCTION
    missing = "what a case would have to assert"   # left out where the cases assert all
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kvmnest import reading
from kvmnest.errors import HarnessError, UsageError

FILE = Path(__file__).parent / "data" / "anchors.toml"


@dataclass(frozen=True)
class Row:
    """One test of another suite."""

    suite: str
    test: str
    cases: Sequence[str] = field(default=())
    missing: str = ""

    @property
    def state(self) -> str:
        """ "full", "partly" or "no": how much of it the cases assert."""
        if not self.missing:
            return "full"
        return "partly" if self.cases else "no"


@functools.cache
def rows() -> tuple[Row, ...]:
    """The whole record. Raises HarnessError if it is damaged."""
    try:
        return tuple(Row(**entry) for entry in reading.toml(FILE)["row"])
    except (KeyError, TypeError) as error:
        raise HarnessError(f"{FILE} is not a record of other suites: {error}") from error


def suites() -> list[str]:
    """Names of the suites."""
    return list(dict.fromkeys(row.suite for row in rows()))


def of(suite: str) -> list[Row]:
    """The rows of a suite. Raises UsageError for a name that is none."""
    found = [row for row in rows() if row.suite == suite]
    if not found:
        raise UsageError(f"nothing is recorded against {suite} ({', '.join(suites())})")
    return found


def lines(suite: str) -> Iterator[str]:
    """The rows for a terminal: what is missing first, and the counts last."""
    found = of(suite)
    for state in ("no", "partly", "full"):
        for row in found:
            if row.state == state:
                yield f"{state:7} {row.test}"
                yield from (f"            {case}" for case in row.cases)
                if row.missing:
                    yield f"        missing: {row.missing}"
    counts = [f"{sum(row.state == s for row in found)} {s}" for s in ("full", "partly", "no")]
    yield f"{suite}: {len(found)} tests: {', '.join(counts)}"
