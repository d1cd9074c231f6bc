"""The record of reproducers that were shown both ways, ``kvmnest/data/repro-shown.json``.

``kvmnest repro verify --record`` writes it: for each id the kernel, the hash of the script (see
``Reproducer.script``), and verdict and evidence on the stock kernel and with the bug put back.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from kvmnest.errors import HarnessError, UsageError
from kvmnest.mutants.record import write_json

RECORD = Path(__file__).parent.parent / "data" / "repro-shown.json"
SCHEMA = 1


@dataclass(frozen=True)
class Seen:
    """What one kernel showed."""

    verdict: str
    evidence: str


@dataclass(frozen=True)
class Shown:
    """A reproducer on a kernel as it is (``stock``) and with its bug put back."""

    kernel: str
    script: str
    stock: Seen
    put_back: Seen

    @property
    def both_ways(self) -> bool:
        """FIXED on the stock kernel, VULNERABLE with the bug."""
        return (self.stock.verdict, self.put_back.verdict) == ("FIXED", "VULNERABLE")


def load(path: Path = RECORD) -> dict[str, Shown]:
    """Read a record: id -> what was shown. Raises HarnessError if it is damaged."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["schema"] != SCHEMA:
            raise ValueError(f"schema {document['schema']}, not {SCHEMA}")
        return {
            name: Shown(
                entry["kernel"],
                entry["script"],
                Seen(**entry["stock"]),
                Seen(**entry["put_back"]),
            )
            for name, entry in document["shown"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise HarnessError(f"{path} is no record of kvmnest repro verify: {error}") from error


def start(path: Path) -> dict[str, Shown]:
    """The record that new entries are added to, {} if there is no file yet.

    Raises UsageError if the file cannot be replaced, HarnessError if it is something else.
    """
    if not path.parent.is_dir():
        raise UsageError(f"cannot write {path}: there is no folder {path.parent}")
    return load(path) if path.exists() else {}


def save(path: Path, shown: Mapping[str, Shown]) -> None:
    """Write a record as a whole. Raises HarnessError if that is impossible."""
    entries = {name: asdict(each) for name, each in sorted(shown.items())}
    write_json(path, {"schema": SCHEMA, "shown": entries})
