"""A run: draw cases, try them, judge them, group what disagrees."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from kvmnest.errors import HarnessError
from kvmnest.fuzz.execute import Seen
from kvmnest.fuzz.generate import Generator
from kvmnest.fuzz.journal import CRASHED, Journal
from kvmnest.fuzz.judge import AGREE, DISAGREE, KNOWN, Judge, Verdict
from kvmnest.fuzz.machines import FuzzMachine, Numbered
from kvmnest.fuzz.model import FuzzCase
from kvmnest.kernel_reports import reports

#: Cases of one boot or process: enough that starting it costs little.
_BATCH = 2000


class _Enough(Exception):
    """Time is up."""


@dataclass
class Finding:
    """One thing that disagrees: the first case that shows it, and how many do.

    ``before`` are the cases that ran before it in the same process; after shrinking, those of
    them without which it does not show.
    """

    number: int
    case: FuzzCase
    seen: Seen
    verdict: Verdict
    count: int = 1
    before: tuple[FuzzCase, ...] = ()


@dataclass
class Report:
    """Counts of what was seen, and the findings by signature."""

    tried: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    known: Counter[str] = field(default_factory=Counter)
    findings: dict[str, Finding] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def document(self) -> dict[str, Any]:
        """For JSON: schema 1."""
        return {
            "schema": 1,
            "tried": self.tried,
            **{kind: self.kinds[kind] for kind in (AGREE, KNOWN, DISAGREE)},
            "outcomes": dict(self.outcomes.most_common()),
            "known_reasons": dict(self.known.most_common()),
            "findings": [
                {
                    "number": finding.number,
                    "count": finding.count,
                    "text": finding.verdict.text,
                    "outcome": finding.seen,
                    "case": finding.case.to_json(),
                    "before": [case.to_json() for case in finding.before],
                }
                for finding in self.findings.values()
            ],
            "kernel_warnings": self.warnings,
        }


def name_of(seen: Seen) -> str:
    """An outcome for counting: without exit reason and qualification."""
    if seen[0] in ("EntryFailure", "VMfailValid"):
        return f"{seen[0]}({seen[1]})"
    return str(seen[0])


class Fuzzer:
    """Tries the cases of a seed. ``on_line`` gets lines about what happens."""

    def __init__(
        self, machine: FuzzMachine, journal: Journal, seed: int, on_line: Callable[[str], None]
    ) -> None:
        self.machine, self.journal, self.seed = machine, journal, seed
        self._on_line = on_line
        self._warnings: dict[int, str] = {}
        #: Numbers of the cases of each process, in order.
        self._streams: list[list[int]] = []
        self._deadline: float | None = None
        if not journal.facts:
            machine.run([], self._take, journal.path)
        try:
            self.judge = Judge(journal.facts, machine.name)
        except ValueError as error:
            raise HarnessError(f"{machine.name}: {error}") from error
        self.generator = Generator(self.judge)

    def _take(self, event: dict[str, Any]) -> None:
        self.journal.add(event, written=self.machine.name == "kvm")
        if self._deadline is not None and time.monotonic() > self._deadline and "end" in event:
            raise _Enough

    def run(self, count: int | None, seconds: float | None, jobs: int = 1) -> Report:
        """Try ``count`` cases, or as many as ``seconds`` allow; those of the journal count too.

        Every case is in the journal before this returns or raises, also at Ctrl-C.
        """
        started = time.monotonic()
        self._deadline = started + seconds if seconds is not None else None
        try:
            with ThreadPoolExecutor(jobs) as pool:
                tasks = [pool.submit(self._worker, index, jobs, count) for index in range(jobs)]
                try:
                    for task in tasks:
                        task.result()
                except BaseException:
                    self._deadline = started
                    raise
        finally:
            self.journal.stop()
        return self.report()

    def _worker(self, index: int, jobs: int, count: int | None) -> None:
        start = index
        while (count is None or start < count) and not self._late():
            end = start + jobs * _BATCH if count is None else min(count, start + jobs * _BATCH)
            numbers = [n for n in range(start, end, jobs) if n not in self.journal.outcomes]
            self._batch([(n, self.generator.numbered(self.seed, n)) for n in numbers])
            start += jobs * _BATCH

    def _late(self) -> bool:
        return self._deadline is not None and time.monotonic() > self._deadline

    def _batch(self, cases: Numbered) -> None:
        left, running = list(cases), -1
        stream: list[int] = []

        def take(event: dict[str, Any]) -> None:
            nonlocal running
            if "start" in event:
                running = event["start"]
                stream.append(running)
            elif "kernel" in event and running >= 0:
                # What no guest may cause.
                for text in reports(event["kernel"])[:1]:
                    self._warnings[running] = text
            self._take(event)

        while left and not self._late():
            running, stream = -1, []
            self._streams.append(stream)
            try:
                why = self.machine.run(left, take, self.journal.path)
            except _Enough:
                return
            if why:
                if running < 0:
                    raise HarnessError(f"no case was tried: {why}")
                self._on_line(f"case {running}: {why}")
                self.journal.add({"end": running, "outcome": [CRASHED, why]})
            left = [(n, case) for n, case in left if n not in self.journal.outcomes]

    def before(self, number: int) -> tuple[FuzzCase, ...]:
        """The cases that ran before this one in the same process, as far as this run knows."""
        for stream in self._streams:
            if number in stream:
                earlier = stream[: stream.index(number)]
                return tuple(self.generator.numbered(self.seed, n) for n in earlier)
        return ()

    def report(self) -> Report:
        """Judge everything that the journal holds."""
        report = Report()
        for number, seen in sorted(self.journal.outcomes.items()):
            case = self.generator.numbered(self.seed, number)
            verdict = self.judge.verdict(case, seen)
            report.tried += 1
            report.kinds[verdict.kind] += 1
            report.outcomes[name_of(seen)] += 1
            if verdict.kind == KNOWN:
                report.known[verdict.text] += 1
            if number in self._warnings and verdict.kind != KNOWN:
                report.warnings.append(f"case {number}: {self._warnings[number]}")
            if verdict.kind == DISAGREE:
                found = report.findings.get(verdict.signature)
                if found:
                    found.count += 1
                else:
                    finding = Finding(number, case, seen, verdict)
                    report.findings[verdict.signature] = finding
        return report
