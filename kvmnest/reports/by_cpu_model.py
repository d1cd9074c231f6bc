"""What the suite gave on each CPU model of Bochs: ``kvmnest/data/by-cpu-model.json``.

``kvmnest lab emulators --record`` writes it from results of ``kvmnest run`` or ``kvmnest matrix``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from kvmnest import files, reading
from kvmnest.errors import UsageError
from kvmnest.lab import cpu_models
from kvmnest.reports import jsonfile
from kvmnest.reports.model import OUTCOMES
from kvmnest.schema import COUNT, TEXT, by_name, exactly, problem

FILE = Path(__file__).parent.parent / "data" / "by-cpu-model.json"
_ROW = exactly(
    ("kernel", "emulator", "date", "counts"),
    **{"kernel": TEXT, "emulator": TEXT, "date": TEXT, "counts": by_name(COUNT)},
)


@dataclass(frozen=True)
class Row:
    """A run of the suite on one model: kernel release, emulator, date, cases by outcome."""

    kernel: str
    emulator: str
    date: str
    counts: Mapping[str, int]


def recorded(path: Path = FILE) -> dict[str, Row]:
    """Model -> its row, oldest model first. Raises HarnessError if the record is damaged."""
    found = reading.document(path, "record of the CPU models", by_name(_ROW))
    return {name: Row(**found[name]) for name in cpu_models.names() if name in found}


def record(paths: Sequence[Path], path: Path = FILE) -> dict[str, Row]:
    """Take these results into the record, which keeps the rows of other models.

    Files of the same model are parts of one run. Returns the new rows. Raises UsageError for
    results that are not complete, or not of one CPU model of Bochs, or do not go together.
    """
    new: dict[str, Row] = {}
    seen: dict[str, set[str]] = {}
    for file in paths:
        for name, document in _documents(file):
            row = _row(document)
            cases = {case["id"] for case in document["cases"]}
            wrong = ""
            if not document["complete"]:
                wrong = "not complete"
            elif name in new:
                before = new[name]
                if (before.kernel, before.emulator) != (row.kernel, row.emulator):
                    wrong = f"of another kernel or emulator than other results of {name}"
                elif cases & seen[name]:
                    wrong = f"of cases that other results of {name} have, too"
                counts = Counter(before.counts) + Counter(row.counts)
                row = replace(row, counts=dict(counts))
            if wrong:
                raise UsageError(f"{reading.shown(file)}: these results are {wrong}")
            new[name] = row
            seen.setdefault(name, set()).update(cases)
    kept = recorded(path) if path.exists() else {}
    rows = {**kept, **new}
    files.write_json(path, {n: asdict(rows[n]) for n in cpu_models.names() if n in rows})
    return new


def lines(rows: Mapping[str, Row]) -> list[str]:
    """A table, a row for each model; the runs that differ in kernel or emulator are marked."""
    if not rows:
        return ["no CPU model has a record"]
    common = Counter((row.kernel, row.emulator) for row in rows.values()).most_common(1)[0][0]
    table = [f"{common[0]}, {common[1]}"]
    table.append(f"{'CPU model':28}" + "".join(f"{outcome:>9}" for outcome in OUTCOMES))
    for name, row in rows.items():
        counts = "".join(f"{row.counts.get(outcome, 0):9}" for outcome in OUTCOMES)
        other = (row.kernel, row.emulator) != common
        table.append(f"{name:28}{counts}" + (f"  {row.kernel}, {row.emulator}" if other else ""))
    return table


def _documents(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The results documents in a file, of ``kvmnest run`` or ``kvmnest matrix``, by model."""
    whole = reading.document(file, jsonfile.WHAT, {"type": "object"})
    columns = whole.get("columns")
    if not isinstance(columns, dict):
        columns = {"": whole}
    for words, document in columns.items():
        if wrong := problem(document, jsonfile.schema()):
            raise reading.Damaged(f"{reading.shown(file)} is not a {jsonfile.WHAT}: {wrong}")
        words = words or str(document["options"].get("cpu_model", ""))
        names = [word for word in words.split() if word in cpu_models.names()]
        if len(names) != 1:
            raise UsageError(f"{reading.shown(file)}: these results are of no --cpu-model")
        yield names[0], document


def _row(document: Mapping[str, Any]) -> Row:
    counts = Counter(case["outcome"] for case in document["cases"])
    date = (document["finished"] or document["started"])[:10]
    return Row(document["kernel"], document["emulator"] or "", date, dict(counts))
