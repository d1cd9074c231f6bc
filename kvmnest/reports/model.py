"""What a run found, as values. The JSON document (schema 1) is these dataclasses written out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from kvmnest.cases.verdict import FAILED as FAILED
from kvmnest.errors import first_line

SCHEMA = 1

#: How a process that runs cases, or its kernel, ends when it does not get to its end.
Loss = Literal["crash", "hang"]

#: Outcomes of a case, in the order in which tables show them.
OUTCOMES = ("passed", "failed", "skipped", "known", "error")

#: What each patch of "Nested VMX, v5" brought, in a few words.
PATCHES = {
    1: "nested module parameter",
    2: "CPUID and feature control",
    3: "VMXON and VMXOFF",
    4: "CR4.VMXE and the fixed-bit MSRs",
    5: "the VMCS region",
    6: "VMX capability MSRs",
    7: "guest pointers to VMX regions",
    8: "many VMCSs",
    9: "VMCLEAR",
    10: "VMPTRLD",
    11: "VMPTRST",
    12: "VMCS fields",
    13: "VMREAD and VMWRITE",
    14: "merging the two VMCSs",
    15: "registers across an entry",
    16: "VMLAUNCH and VMRESUME",
    17: "VMX instructions in L2",
    18: "VM exits to L1",
    19: "who gets the exit",
    20: "interrupts",
    21: "exceptions",
    22: "IDT-vectoring information",
    23: "CR0.TS and #NM",
    24: "nested state and the rest",
}


def patch_title(patch: int | None) -> str:
    """A patch by number and what it brought; "other" for none of the series."""
    return f"{patch} {PATCHES[patch]}" if patch in PATCHES else "other"


@dataclass
class Case:
    """One case that ended.

    ``outcome`` is one of OUTCOMES; ``seconds`` is host time; ``summary`` one line and ``detail``
    the whole text of a failure, the reason of a skip or of a known deviation; ``kernel_log``
    holds warnings of the kernel that came while it ran, where they can be seen (lab).
    """

    id: str
    series: int | None
    sdm: str | None
    outcome: str
    seconds: float
    detail: str = ""
    summary: str = ""
    rerun: str = ""
    kernel_log: str = ""

    @property
    def headline(self) -> str:
        """What happened, in one line; "" for a case that passed without a word."""
        return headline(self.summary, self.detail)


@dataclass
class Run:
    """A run so far.

    Attributes:
        target: "kvm", "lab" or "qemu".
        emulator: name and version of what emulates the CPU ("bochs 3.0"), "" for a real one.
        facts: kernel, cpu, kvm_params, versions as the machine under test reported them.
        options: what the run was asked for, for people and for ``rerun``.
        cases: cases that ended, in that order.
        running: id of the case that runs now.
        planned: ids of all cases, in running order.
        no_longer: (id, reason) of listed deviations that passed.
        problems: lines about what went wrong outside of cases.
        lost: of cases in which the process or the kernel was lost, how: "crash" or "hang".
        interrupted: ids of cases that ended the session of pytest they ran in.
        stopped: why the run was to stop before its last case, "" if it was not.
        complete: every planned case ended.
        seconds: host time from the first collected case to now, boots included.
    """

    target: str
    emulator: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    started: str = ""
    finished: str | None = None
    cases: list[Case] = field(default_factory=list)
    running: str | None = None
    planned: list[str] = field(default_factory=list)
    no_longer: list[tuple[str, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    lost: dict[str, Loss] = field(default_factory=dict)
    interrupted: list[str] = field(default_factory=list)
    stopped: str = ""
    complete: bool = False
    seconds: float = 0.0

    @property
    def kernel(self) -> str:
        """Release of the kernel under test, "" before it reported."""
        return str(self.facts.get("kernel", ""))

    def summary(self) -> dict[str, int]:
        """Count the cases by outcome."""
        return count(self.cases)

    def cases_by_patch(self) -> dict[int | None, list[Case]]:
        """The cases of each patch; patches in order, None (unmarked) last."""
        table: dict[int | None, list[Case]] = {}
        for case in sorted(self.cases, key=lambda c: (c.series is None, c.series or 0)):
            table.setdefault(case.series, []).append(case)
        return table

    def by_patch(self) -> dict[int | None, dict[str, int]]:
        """Count by patch, then outcome; patches in order, None (unmarked) last."""
        return {patch: count(cases) for patch, cases in self.cases_by_patch().items()}

    def not_run(self) -> list[str]:
        """Ids of planned cases without a result."""
        done = {case.id for case in self.cases}
        return [name for name in self.planned if name not in done]


def headline(summary: str, detail: str) -> str:
    """What a case says in one line, from its ``summary`` and ``detail``."""
    return summary or first_line(detail.strip())


def count(cases: Iterable[Case]) -> dict[str, int]:
    """How many cases have each outcome."""
    counts = dict.fromkeys(OUTCOMES, 0)
    for case in cases:
        counts[case.outcome] += 1
    return counts
