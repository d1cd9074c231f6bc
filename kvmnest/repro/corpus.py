"""The corpus: bugs of the catalogue of mutants that real kernels had, and their reproducers.

A bug is described once, in ``kvmnest/data/mutants.toml``: the commit that fixed it, and the edit
that brings it back. Its reproducer is the case of the suite that was seen to fail with that edit
and to pass without; ``kvmnest/data/mutants-detected.json`` (written by ``kvmnest mutants --json``)
is the record of that.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from kvmnest.errors import HarnessError, UsageError
from kvmnest.mutants import catalogue
from kvmnest.mutants.record import DETECTED

RECORD = Path(__file__).parent.parent / "data" / "mutants-detected.json"


@dataclass(frozen=True)
class Bug:
    """A bug that kernels had.

    ``subject``, ``hash`` and ``fixed`` name the upstream commit and the first version with it;
    ``case`` is the reproducer, ``vulnerable`` what it showed on a kernel with the bug; ``params``
    are the parameters of kvm_intel (or kvm.NAME) that the bug needs.
    """

    id: str
    title: str
    subject: str
    hash: str
    cve: str
    fixed: str
    case: str
    vulnerable: str
    params: dict[str, str]


@dataclass(frozen=True)
class Corpus:
    """All bugs with a reproducer; ``kernel`` is the one on which they were shown both ways."""

    kernel: str
    bugs: tuple[Bug, ...]

    def select(self, names: list[str]) -> list[Bug]:
        """Bugs by id or by CVE number; "all" for all. Raises UsageError for an unknown name."""
        if names == ["all"]:
            return list(self.bugs)
        found = []
        for name in names:
            hits = [bug for bug in self.bugs if name in (bug.id, bug.cve)]
            if not hits:
                raise UsageError(f"no reproducer {name} (kvmnest repro list shows them)")
            found += [bug for bug in hits if bug not in found]
        return found


def load(record: Path = RECORD) -> Corpus:
    """Read the corpus. Raises HarnessError with one line if its files are damaged."""
    try:
        document = json.loads(record.read_text(encoding="utf-8"))
        scores = {entry["id"]: entry for entry in document["mutants"]}
        kernel = document["kernel"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise HarnessError(f"{record} is no detection table: {error}") from error
    bugs = []
    for mutant in catalogue.load():
        score = scores.get(mutant.id)
        if mutant.origin.get("subject") and score and score["verdict"] == DETECTED:
            bugs.append(
                Bug(
                    id=mutant.id,
                    title=mutant.title,
                    subject=mutant.origin["subject"],
                    hash=mutant.origin.get("hash", ""),
                    cve=mutant.origin.get("cve", ""),
                    fixed=mutant.origin.get("fixed", ""),
                    case=score["case"],
                    vulnerable=score["text"],
                    params=mutant.params,
                )
            )
    return Corpus(kernel, tuple(bugs))
