"""The same bugs asked of several kernels, and what the record of that says about a kernel.

``kvmnest/data/repro-ladder.json`` is that record for kernels of Debian's archive, written by
``kvmnest repro all unfixed --kernels ... --record``: for each bug and release the verdict.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kvmnest import reading
from kvmnest.files import write_json
from kvmnest.known import kernel_version
from kvmnest.repro.check import FIXED, NO_VERDICT, NOT_APPLICABLE, VULNERABLE, Verdict
from kvmnest.schema import TEXT, by_name, exactly

RECORD = Path(__file__).parent.parent / "data" / "repro-ladder.json"
SCHEMA = 1
_SCHEMA = exactly(("schema", "verdicts"), schema={"const": SCHEMA}, verdicts=by_name(by_name(TEXT)))


@dataclass
class Ladder:
    """Verdicts of bugs (by id) on kernels (by release), and the evidence where there is one."""

    verdicts: dict[str, dict[str, str]] = field(default_factory=dict)
    evidence: dict[tuple[str, str], str] = field(default_factory=dict)

    def add(self, verdicts: Iterable[Verdict], release: str) -> None:
        """Take over what one kernel showed."""
        for each in verdicts:
            self.verdicts.setdefault(each.reproducer.id, {})[release] = each.verdict
            self.evidence[each.reproducer.id, release] = each.evidence

    @property
    def kernels(self) -> list[str]:
        """The releases, oldest first."""
        return sorted(
            {release for row in self.verdicts.values() for release in row}, key=kernel_version
        )

    def _answers(self, bug_id: str) -> list[tuple[str, str]]:
        """(release, verdict) where a bug is there or not, oldest kernel first."""
        row = self.verdicts.get(bug_id, {})
        releases = sorted(row, key=kernel_version)
        return [(each, row[each]) for each in releases if row[each] in (FIXED, VULNERABLE)]

    def seen(self, bug_id: str) -> tuple[list[str], list[str]]:
        """The kernels on which a bug was seen to be there, and to be gone, oldest first."""
        answers = self._answers(bug_id)
        bad, good = (
            [short(release) for release, verdict in answers if verdict == wanted]
            for wanted in (VULNERABLE, FIXED)
        )
        return bad, good

    def first_fixed(self, bug_id: str, release: str) -> str:
        """Since which kernel of the release's series a bug is gone, as far as it was asked.

        "" if no kernel of that series has been without it; "before R" if R is the oldest asked.
        """
        series = kernel_version(release)[:2]
        answers = [each for each in self._answers(bug_id) if kernel_version(each[0])[:2] == series]
        bad = [number for number, (_, verdict) in enumerate(answers) if verdict == VULNERABLE]
        good = answers[bad[-1] + 1 if bad else 0 :]
        if not good:
            return ""
        return f"before {short(good[0][0])}" if not bad else short(good[0][0])

    def since(self, bug_id: str) -> str:
        """The oldest kernel that has a bug; "before R" if that is the oldest asked, "" for none."""
        for number, (release, verdict) in enumerate(self._answers(bug_id)):
            if verdict == VULNERABLE:
                return short(release) if number else f"before {short(release)}"
        return ""


def short(release: str) -> str:
    """A release without its flavour: "7.3.4" for "7.3.4+deb13-cloud-amd64"."""
    found = re.match(r"\d+(?:[.-]\d+)*", release)
    return found[0] if found else release


def load(path: Path = RECORD) -> Ladder:
    """Read a record. Raises HarnessError if it is damaged."""
    document = reading.document(path, "record of kvmnest repro --kernels", _SCHEMA)
    return Ladder(document["verdicts"])


def save(path: Path, ladder: Ladder) -> None:
    """Write a record as a whole. Raises HarnessError if that is impossible."""
    rows = {
        bug: {release: row[release] for release in sorted(row, key=kernel_version)}
        for bug, row in sorted(ladder.verdicts.items())
    }
    write_json(path, {"schema": SCHEMA, "verdicts": rows})


def merge(old: Ladder, new: Ladder) -> Ladder:
    """A record with newer verdicts in place of older ones of the same bug and kernel."""
    rows = {bug: dict(row) for bug, row in old.verdicts.items()}
    for bug, row in new.verdicts.items():
        rows.setdefault(bug, {}).update(row)
    return Ladder(rows)


def worst_first(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """VULNERABLE, then what has no verdict, what does not apply, FIXED; each by id."""
    ranks = (VULNERABLE, NO_VERDICT, NOT_APPLICABLE, FIXED)
    return sorted(verdicts, key=lambda each: (ranks.index(each.verdict), each.reproducer.id))
