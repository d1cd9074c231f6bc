"""A run: draw programs, run each on two machines, compare, and group what differs."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvmnest.fuzz.programs.compare import Difference, differences, shown
from kvmnest.fuzz.programs.known import Known
from kvmnest.fuzz.programs.places import Place, Ran
from kvmnest.fuzz.programs.program import Program
from kvmnest.kernel_reports import reports

AGREE, KNOWN, DISAGREE, CRASHED = "agree", "known", "disagree", "crashed"


@dataclass(frozen=True)
class Verdict:
    """What two runs of a program show: reasons that are known, and the first thing that is not."""

    reasons: tuple[str, ...] = ()
    new: Difference | None = None
    crashed: str = ""

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
        return self.new.signature if self.new else ""


def judge(one: Ran, other: Ran, known: Sequence[Known]) -> Verdict:
    """Compare the runs of a program on KVM and on another machine."""
    if one.crashed or one.warning:
        said = next(iter(reports(one.warning)), "") if one.warning else ""
        if one.crashed or said:
            return Verdict(crashed=one.crashed or said)
    reasons: dict[str, None] = {}
    before: set[str] = set()
    for difference in differences(one, other):
        entry = next((each for each in known if each.explains(difference, before)), None)
        if entry is None:
            return Verdict(tuple(reasons), difference)
        reasons[f"{entry.whose}: {entry.reason}"] = None
        before.add(difference.what)
    return Verdict(tuple(reasons))


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
    ends: Counter[str] = field(default_factory=Counter)
    known: Counter[str] = field(default_factory=Counter)
    findings: dict[str, Finding] = field(default_factory=dict)

    def add(self, number: int, program: Program, ran: Ran, verdict: Verdict) -> None:
        """Count one program."""
        self.programs += 1
        self.kinds[verdict.kind] += 1
        for step in ran.seen:
            for seen in step:
                if seen.get("end", ["written"])[0] not in ("written", "Succeed"):
                    self.ends[shown(seen["end"])] += 1
        self.known.update(verdict.reasons)
        if verdict.kind in (DISAGREE, CRASHED):
            found = self.findings.get(verdict.signature)
            if found:
                found.count += 1
            else:
                self.findings[verdict.signature] = Finding(number, program, verdict)

    def document(self) -> dict[str, Any]:
        """For JSON: schema 1."""
        return {
            "schema": 1,
            "programs": self.programs,
            **{kind: self.kinds[kind] for kind in (AGREE, KNOWN, DISAGREE, CRASHED)},
            "ends": dict(self.ends.most_common()),
            "known_reasons": dict(self.known.most_common()),
            "findings": [
                {
                    "number": finding.number,
                    "count": finding.count,
                    "shows": str(finding.verdict.new or finding.verdict.crashed),
                    "signature": signature,
                    "program": finding.program.to_json(),
                }
                for signature, finding in self.findings.items()
            ],
        }


class Campaign:
    """Runs programs on ``kvm`` and on ``other``. ``assumed`` are the facts that both share."""

    #: Programs of one boot.
    batch = 100

    def __init__(
        self,
        kvm: Place,
        other: Place,
        assumed: Mapping[str, Any],
        known: Sequence[Known],
        on_batch: Callable[[Report], None] = lambda report: None,
        on_verdict: Callable[[int, Verdict], None] = lambda number, verdict: None,
    ) -> None:
        self.kvm, self.other, self.assumed, self.known = kvm, other, assumed, known
        self._on_batch, self._on_verdict = on_batch, on_verdict

    def run(self, programs: Iterable[tuple[int, Program]], seconds: float | None = None) -> Report:
        """Run all programs, or as many as ``seconds`` allow."""
        report, started = Report(), time.monotonic()
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

    def _run(self, batch: list[tuple[int, Program]], report: Report) -> None:
        ones = self.kvm.run(batch, self.assumed)
        others = self.other.run(batch, self.assumed)
        for number, program in batch:
            verdict = judge(ones[number], others[number], self.known)
            report.add(number, program, ones[number], verdict)
            self._on_verdict(number, verdict)
        self._on_batch(report)

    def verdicts(self, programs: Sequence[Program]) -> list[Verdict]:
        """What several programs show, for shrinking."""
        batch = list(enumerate(programs))
        ones, others = self.kvm.run(batch, self.assumed), self.other.run(batch, self.assumed)
        return [judge(ones[number], others[number], self.known) for number, _ in batch]
