"""Whose fault a failure is, by the reference target, which runs the same cases without KVM."""

from __future__ import annotations

import enum
import fnmatch
import functools
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvmnest import files, known, reading
from kvmnest.errors import UsageError
from kvmnest.known import REFERENCE, Deviation
from kvmnest.schema import TEXT, TEXTS, by_name

#: What the reference CPU made of the cases of ``known.toml``; ``kvmnest known --record`` writes it.
FILE = Path(__file__).parent.parent / "data" / "reference.json"
_SCHEMA = {
    "type": "object",
    "required": ["emulator", "cpu", "passed", "failed", "skipped"],
    "properties": {
        **{"emulator": TEXT, "cpu": TEXT, "passed": TEXTS, "failed": TEXTS},
        "skipped": by_name(TEXT),
    },
}
_FAILED = ("failed", "error", "known")


class Verdict(enum.Enum):
    """Of a case that fails under KVM."""

    KVM = "passes on the reference CPU: KVM's"
    BOTH = "fails on the reference CPU too: ours or the emulator's"
    NONE = "no verdict"


@dataclass(frozen=True)
class Outcomes:
    """Cases on the reference CPU: those that passed, those that failed, why others were skipped.

    ``emulator`` is name and version of what emulates it.
    """

    emulator: str
    passed: frozenset[str]
    failed: frozenset[str]
    skipped: Mapping[str, str]

    @property
    def cases(self) -> list[str]:
        """Ids of all, sorted."""
        return sorted(self.passed | self.failed | self.skipped.keys())

    def verdict(self, case: str) -> tuple[Verdict, str]:
        """The verdict on a case that fails under KVM, and for NONE why there is none."""
        if case in self.passed:
            return Verdict.KVM, ""
        if case in self.failed:
            return Verdict.BOTH, ""
        return Verdict.NONE, self.skipped.get(case, "has not run there")


def of_results(document: Mapping[str, Any]) -> Outcomes:
    """The outcomes in a results document of the reference target. Raises UsageError for others."""
    if document["target"] != REFERENCE:
        raise UsageError(f"these results are of target {document['target']}, not of {REFERENCE}")
    cases = document["cases"]
    return Outcomes(
        document["emulator"] or "",
        frozenset(case["id"] for case in cases if case["outcome"] == "passed"),
        frozenset(case["id"] for case in cases if case["outcome"] in _FAILED),
        {case["id"]: case["detail"] for case in cases if case["outcome"] == "skipped"},
    )


@functools.cache
def recorded() -> Outcomes:
    """The record. Raises HarnessError if it is damaged."""
    found = reading.document(FILE, "record of the reference target", _SCHEMA)
    passed, failed = frozenset(found["passed"]), frozenset(found["failed"])
    return Outcomes(found["emulator"], passed, failed, found["skipped"])


def record(document: Mapping[str, Any], path: Path = FILE) -> int:
    """Write the record from a results document: the cases of ``known.toml``.

    Returns how many. Raises UsageError if the run is not of the reference target or not whole.
    """
    found = of_results(document)
    if not document["complete"]:
        raise UsageError("these results are not complete")
    patterns = [_pattern(deviation) for deviation in shown_by_a_case()]
    wanted = {case for case in found.cases if any(each.match(case) for each in patterns)}
    files.write_json(
        path,
        {
            "emulator": found.emulator,
            "cpu": document["facts"]["cpu"],
            "passed": sorted(wanted & found.passed),
            "failed": sorted(wanted & found.failed),
            "skipped": {
                case: found.skipped[case] for case in sorted(wanted & found.skipped.keys())
            },
        },
    )
    return len(wanted)


def entries() -> list[Deviation]:
    """The known deviations but those of the reference CPU itself."""
    return [deviation for deviation in known.read() if deviation.target != REFERENCE]


def shown_by_a_case() -> list[Deviation]:
    """Those of them that a case shows by its failure, not by a message of the kernel."""
    return [deviation for deviation in entries() if not deviation.kernel_message]


def _pattern(deviation: Deviation) -> re.Pattern[str]:
    return re.compile(fnmatch.translate(known.literal_brackets(deviation.case)))


@dataclass(frozen=True)
class Failed:
    """A case that fails under KVM (or is a known deviation there), and the verdict on it."""

    id: str
    outcome: str
    verdict: Verdict
    text: str


def of_failures(document: Mapping[str, Any], outcomes: Outcomes) -> list[Failed]:
    """The verdict on each failure in a results document of a KVM; ``text`` is what happened."""
    return [
        Failed(
            case["id"],
            case["outcome"],
            outcomes.verdict(case["id"])[0],
            outcomes.verdict(case["id"])[1] or case.get("summary", ""),
        )
        for case in document["cases"]
        if case["outcome"] in _FAILED
    ]


@dataclass(frozen=True)
class Judged:
    """An entry of the record of known deviations, and how many of its cases got which verdict.

    ``why`` holds the reasons for which cases have none; ``there`` what is known of those that
    fail on the reference CPU too.
    """

    deviation: Deviation
    counts: Mapping[Verdict, int]
    why: tuple[str, ...]
    there: tuple[str, ...]

    @property
    def verdict(self) -> Verdict | None:
        """The one of all its cases that have one; None where they differ."""
        found = [v for v in (Verdict.KVM, Verdict.BOTH) if self.counts.get(v)]
        return None if len(found) > 1 else found[0] if found else Verdict.NONE

    @property
    def contradicted(self) -> bool:
        """Whether the entry is to be looked at again.

        It names KVM and the reference CPU fails too, or it names the emulator and that passes.
        """
        wrong = Verdict.KVM if self.deviation.emulator else Verdict.BOTH
        return bool(self.counts.get(wrong))


def judged(outcomes: Outcomes) -> list[Judged]:
    """Each entry with its verdict."""
    there = known.load(REFERENCE, "none", {}, emulator=outcomes.emulator)
    found = []
    for deviation in entries():
        if beside := _beside_the_point(deviation, outcomes.emulator):
            found.append(Judged(deviation, {Verdict.NONE: 1}, (beside,), ()))
            continue
        counts: Counter[Verdict] = Counter()
        why: dict[str, None] = {}
        reasons: dict[str, None] = {}
        pattern = _pattern(deviation)
        for case in outcomes.cases:
            if pattern.match(case):
                verdict, text = outcomes.verdict(case)
                counts[verdict] += 1
                why |= {text: None} if text else {}
                entry = there.match(case)
                if verdict is Verdict.BOTH and entry is not None and entry != deviation:
                    reasons[entry.reason] = None
        found.append(Judged(deviation, counts, tuple(why), tuple(reasons)))
    return found


def _beside_the_point(deviation: Deviation, emulator: str) -> str:
    """Why the reference CPU can say nothing about an entry; "" if it can."""
    if deviation.kernel_message:
        return "a report of the kernel, which there is none"
    if deviation.emulator and not known.emulator_in_range(emulator, deviation.emulator):
        return f"of {deviation.emulator}; the reference CPU is that of {emulator}"
    if deviation.emulator and deviation.params:
        return "seen with parameters of KVM only"
    return ""
