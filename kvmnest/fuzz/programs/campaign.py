"""A run: draw programs, run each on several machines, compare, and group what differs."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from kvmnest.fuzz.machines import OnEvent
from kvmnest.fuzz.programs.compare import Difference, differences, shown
from kvmnest.fuzz.programs.known import Known, explained
from kvmnest.fuzz.programs.places import Place, Ran
from kvmnest.fuzz.programs.program import Program
from kvmnest.kernel_reports import reports

AGREE, KNOWN, DISAGREE, CRASHED = "agree", "known", "disagree", "crashed"


@dataclass(frozen=True)
class Verdict:
    """What two runs of a program show: reasons that are known, and the first thing that is not.

    ``against`` names the other machine. What a kernel died of or warned of has none.
    """

    reasons: tuple[str, ...] = ()
    new: Difference | None = None
    crashed: str = ""
    against: str = ""

    @property
    def kind(self) -> str:
        """AGREE, KNOWN, DISAGREE or CRASHED."""
        if self.crashed:
            return CRASHED
        return DISAGREE if self.new else KNOWN if self.reasons else AGREE

    @property
    def signature(self) -> str:
        """Of the first thing that is new."""
        if self.crashed:
            return f"crashed: {self.crashed.partition(':')[2].strip() or self.crashed}"
        return f"{self.against}: {self.new.signature}" if self.new else ""

    def __str__(self) -> str:
        if self.crashed:
            return self.crashed
        return f"against {self.against}: {self.new}" if self.new else "; ".join(self.reasons)


@dataclass(frozen=True)
class Oracle:
    """Another machine, and what may differ there. ``name``: as --against has it."""

    name: str
    place: Place
    known: Sequence[Known]


def judge(one: Ran, other: Ran, known: Sequence[Known], against: str = "") -> Verdict:
    """Compare the runs of a program on KVM and on another machine."""
    if one.crashed or one.warning:
        said = next(iter(reports(one.warning)), "") if one.warning else ""
        if one.crashed or said:
            return Verdict(crashed=one.crashed or said, against=against)
    reasons: dict[str, None] = {}
    before: set[str] = set()
    for difference in differences(one, other):
        entries = explained(difference, known, before)
        if not entries:
            return Verdict(tuple(reasons), difference, against=against)
        reasons |= dict.fromkeys(f"{entry.whose}: {entry.reason}" for entry in entries)
        before.add(difference.what)
    return Verdict(tuple(reasons), against=against)


#: Of several verdicts on a program, which is told.
_ORDER = (CRASHED, DISAGREE, KNOWN, AGREE)


def worst(verdicts: Sequence[Verdict]) -> Verdict:
    """Of the verdicts on one program, the worst; that has the reasons of all."""
    found = min(verdicts, key=lambda verdict: _ORDER.index(verdict.kind))
    reasons = dict.fromkeys(reason for verdict in verdicts for reason in verdict.reasons)
    return replace(found, reasons=tuple(reasons))


@dataclass
class Finding:
    """What is new: the first program that shows it, and how many do."""

    number: int
    program: Program
    verdict: Verdict
    count: int = 1


@dataclass
class Report:
    """Counts, and findings by signature."""

    programs: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    #: By the name of each other machine.
    by: dict[str, Counter[str]] = field(default_factory=dict)
    ends: Counter[str] = field(default_factory=Counter)
    known: Counter[str] = field(default_factory=Counter)
    findings: dict[str, Finding] = field(default_factory=dict)

    def add(self, number: int, program: Program, ran: Ran, verdicts: Sequence[Verdict]) -> None:
        """Count one program, on which each other machine has a verdict."""
        self.programs += 1
        self.kinds[worst(verdicts).kind if verdicts else AGREE] += 1
        for verdict in verdicts:
            self.by.setdefault(verdict.against, Counter())[verdict.kind] += 1
        for step in ran.seen:
            for seen in step:
                if seen.get("end", ["written"])[0] not in ("written", "Succeed"):
                    self.ends[shown(seen["end"])] += 1
        self.known.update({reason for verdict in verdicts for reason in verdict.reasons})
        bad = {v.signature: v for v in verdicts if v.kind in (DISAGREE, CRASHED)}
        for signature, verdict in bad.items():
            found = self.findings.get(signature)
            if found:
                found.count += 1
            else:
                self.findings[signature] = Finding(number, program, verdict)

    def document(self) -> dict[str, Any]:
        """For JSON: schema 1."""
        return {
            "schema": 1,
            "programs": self.programs,
            **{kind: self.kinds[kind] for kind in (AGREE, KNOWN, DISAGREE, CRASHED)},
            "against": {name: dict(kinds) for name, kinds in self.by.items()},
            "ends": dict(self.ends.most_common()),
            "known_reasons": dict(self.known.most_common()),
            "findings": [
                {
                    "number": finding.number,
                    "count": finding.count,
                    "against": finding.verdict.against,
                    "shows": str(finding.verdict.new or finding.verdict.crashed),
                    "signature": signature,
                    "program": finding.program.to_json(),
                }
                for signature, finding in self.findings.items()
            ],
        }


class Campaign:
    """Runs programs on ``kvm`` and on others. ``assumed`` are the facts that all share.

    ``watch`` gets the events of ``kvm``; ``on_program`` each program that was judged.
    """

    #: Programs of one boot.
    batch = 100

    def __init__(
        self,
        kvm: Place,
        oracles: Sequence[Oracle],
        assumed: Mapping[str, Any],
        on_batch: Callable[[Report], None] = lambda report: None,
        on_verdict: Callable[[int, Verdict], None] = lambda number, verdict: None,
        watch: OnEvent = lambda event: None,
        on_program: Callable[[int, Program], None] = lambda number, program: None,
    ) -> None:
        self.kvm, self.oracles, self.assumed = kvm, oracles, assumed
        self._on_batch, self._on_verdict = on_batch, on_verdict
        self._watch, self._on_program = watch, on_program
        #: What ``run`` has found so far, also if it is interrupted.
        self.report = Report()

    def run(self, programs: Iterable[tuple[int, Program]], seconds: float | None = None) -> Report:
        """Run all programs, or as many as ``seconds`` allow."""
        self.report = report = Report()
        started = time.monotonic()
        batch: list[tuple[int, Program]] = []
        for each in programs:
            batch.append(each)
            if len(batch) == self.batch:
                self._run(batch, report)
                batch = []
                if seconds is not None and time.monotonic() - started > seconds:
                    return report
        if batch:
            self._run(batch, report)
        return report

    def _run(self, batch: Sequence[tuple[int, Program]], report: Report) -> None:
        ones, verdicts = self._all(batch)
        for number, program in batch:
            verdict = worst(verdicts[number] or [judge(ones[number], ones[number], ())])
            report.add(number, program, ones[number], verdicts[number])
            self._on_verdict(number, verdict)
            self._on_program(number, program)
        self._on_batch(report)

    def _all(
        self, batch: Sequence[tuple[int, Program]]
    ) -> tuple[dict[int, Ran], dict[int, list[Verdict]]]:
        """What KVM did, and the verdicts by all others."""
        ones = self.kvm.run(batch, self.assumed, self._watch)
        verdicts: dict[int, list[Verdict]] = {number: [] for number, _ in batch}
        for oracle in self.oracles:
            others = oracle.place.run(batch, self.assumed)
            for number, _ in batch:
                verdict = judge(ones[number], others[number], oracle.known, oracle.name)
                verdicts[number].append(verdict)
        return ones, verdicts

    def verdicts(self, programs: Sequence[Program]) -> list[list[Verdict]]:
        """What several programs show, for shrinking: a verdict by each other machine."""
        _, found = self._all(list(enumerate(programs)))
        return [found[number] for number in range(len(programs))]
