"""What kernels showed of the defects: ``kvmnest/data/found-shown.json``.

``kvmnest found --verify --record`` writes it: for each id and kernel what the reproducer said on
the kernel as it is, and where the fixes fit the source, with all of them and with its own alone.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from kvmnest import reading
from kvmnest.files import write_json
from kvmnest.repro.corpus import Reproducer
from kvmnest.repro.evidence import Seen
from kvmnest.schema import TEXT, by_name, exactly

RECORD = Path(__file__).parent.parent / "data" / "found-shown.json"
SCHEMA = 1
NEEDED = "VULNERABLE", "FIXED", "FIXED"


@dataclass(frozen=True)
class Shown:
    """What one kernel showed of a defect.

    ``script`` and ``edits`` are hashes of what the reproducer does and of its fix; ``line`` is
    where the fault is in this kernel's source, "" if that was not looked up. ``together`` is what
    it said with all fixes built in, ``alone`` with its own only; None if that was not tried.
    """

    script: str
    stock: Seen
    edits: str = ""
    line: str = ""
    together: Seen | None = None
    alone: Seen | None = None

    @property
    def verdicts(self) -> tuple[str, str, str]:
        """On the stock kernel, with all fixes, with its own fix; "" for what was not tried."""
        return (
            self.stock.verdict,
            self.together.verdict if self.together else "",
            self.alone.verdict if self.alone else "",
        )


#: Id -> kernel's release -> what it showed, oldest kernel first.
Record = dict[str, dict[str, Shown]]


def script_hash(reproducer: Reproducer) -> str:
    """Hash of what a reproducer does, whatever its fix is."""
    return replace(reproducer, bug=replace(reproducer.bug, fix=())).script("")


def edits_hash(reproducer: Reproducer) -> str:
    """Hash of its fix."""
    words = [sorted(vars(each).items()) for each in reproducer.fix]
    return hashlib.sha256(json.dumps(words).encode()).hexdigest()[:16]


def load(path: Path = RECORD) -> Record:
    """Read a record. Raises HarnessError if it is damaged."""
    document = reading.document(path, "record of kvmnest found --verify", _SCHEMA)
    return {
        name: {release: _shown(entry) for release, entry in kernels.items()}
        for name, kernels in document["shown"].items()
    }


_SEEN = exactly(("verdict", "evidence"), verdict=TEXT, evidence=TEXT)
_SHOWN = exactly(
    ("script", "stock"),
    **dict.fromkeys(("script", "edits", "line"), TEXT),
    **dict.fromkeys(("stock", "together", "alone"), _SEEN),
)
_SCHEMA = exactly(("schema", "shown"), schema={"const": SCHEMA}, shown=by_name(by_name(_SHOWN)))


def _shown(entry: Mapping[str, Any]) -> Shown:
    seen = {name: Seen(**entry[name]) for name in ("stock", "together", "alone") if entry.get(name)}
    return Shown(**{**entry, **seen})


def add(record: Record, name: str, release: str, shown: Shown) -> None:
    """Add what a kernel showed, or put it in place of what it showed before."""
    kernels = {**record.get(name, {}), release: shown}
    record[name] = {each: kernels[each] for each in sorted(kernels, key=age)}


def save(path: Path, record: Record) -> None:
    """Write a record as a whole. Raises HarnessError if that is impossible."""
    entries = {
        name: {
            release: {key: value for key, value in asdict(shown).items() if value}
            for release, shown in kernels.items()
        }
        for name, kernels in sorted(record.items())
    }
    write_json(path, {"schema": SCHEMA, "shown": entries})


def age(release: str) -> tuple[int, ...]:
    """Numbers of a release, by which kernels are sorted: 6.1.0-56 is older than 6.12.118."""
    return tuple(int(number) for number in re.findall(r"\d+", short(release)))


def short(release: str) -> str:
    """A release without what is the same in all: "7.3.4+deb13-cloud-amd64" is 7.3.4."""
    return release.partition("+")[0].removesuffix("-cloud-amd64").removesuffix("-amd64")
