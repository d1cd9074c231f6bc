"""The detection table, for people and as a document."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kvmnest.mutants.catalogue import Mutant
from kvmnest.mutants.record import DETECTED, MISSED, SCHEMA, VERDICTS, Score

_LONGEST = 110


def listing(mutants: Sequence[Mutant]) -> list[str]:
    """One line for each mutant: id, title, what it needs."""
    width = max((len(mutant.id) for mutant in mutants), default=0)
    lines = []
    for mutant in mutants:
        notes = [f"{name}={value}" for name, value in mutant.params.items()]
        if mutant.origin.get("cve"):
            notes.append(mutant.origin["cve"])
        if mutant.masked:
            notes.append(f"masked: {mutant.masked}")
        shown = f" ({'; '.join(notes)})" if notes else ""
        lines.append(f"{mutant.id:{width}}  {mutant.title}{shown}")
    return lines


def counts(scores: Mapping[str, Score]) -> dict[str, int]:
    """How many have each verdict."""
    return {
        verdict: sum(score.verdict == verdict for score in scores.values()) for verdict in VERDICTS
    }


def reason(mutant: Mutant, score: Score) -> str:
    """Why a mutant was not detected: what the catalogue knows of it, else what was run."""
    return mutant.missed if score.verdict == MISSED and mutant.missed else score.text


def table(mutants: Sequence[Mutant], scores: Mapping[str, Score], kernel: str) -> list[str]:
    """Lines of the table, the missed ones once more at the end, totals last."""
    width = max((len(mutant.id) for mutant in mutants), default=0)
    lines = []
    for verdict in VERDICTS:
        for mutant in mutants:
            score = scores[mutant.id]
            if score.verdict != verdict:
                continue
            if verdict == DETECTED:
                said = f"{score.case} ({score.outcome}: {score.text})"
            else:
                said = f"{verdict}: {reason(mutant, score)}"
            said = " ".join(said.split())
            shown = said if len(said) <= _LONGEST else f"{said[: _LONGEST - 3]}..."
            lines.append(f"{mutant.id:{width}}  {shown}")
    found = counts(scores)
    total = ", ".join(f"{number} {verdict}" for verdict, number in found.items() if number)
    return [*lines, "", f"{len(mutants)} mutants of {kernel}: {total or 'nothing'}"]


def document(mutants: Sequence[Mutant], scores: Mapping[str, Score], kernel: str) -> dict[str, Any]:
    """The table as a JSON document."""
    return {
        "schema": SCHEMA,
        "kernel": kernel,
        "totals": counts(scores),
        "mutants": [
            {
                "id": mutant.id,
                "title": mutant.title,
                "verdict": scores[mutant.id].verdict,
                "case": scores[mutant.id].case or None,
                "outcome": scores[mutant.id].outcome or None,
                "text": reason(mutant, scores[mutant.id]),
            }
            for mutant in mutants
        ],
    }
