"""The record of reproducers that were shown both ways, ``kvmnest/data/repro-shown.json``.

``kvmnest repro verify --record`` writes it: for each id and kernel the hash of the script (see
``Reproducer.script``), and verdict and evidence on the stock kernel and with the bug put back.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from kvmnest import reading
from kvmnest.errors import UsageError
from kvmnest.files import write_json
from kvmnest.schema import TEXT, by_name, exactly

RECORD = Path(__file__).parent.parent / "data" / "repro-shown.json"
SCHEMA = 2


@dataclass(frozen=True)
class Seen:
    """What one kernel showed."""

    verdict: str
    evidence: str


@dataclass(frozen=True)
class Shown:
    """A reproducer on a kernel as it is (``stock``) and with its bug put back.

    ``mended``: it is a bug that nobody has fixed, and ``put_back`` the kernel with the script's
    fix. Such a one is not recorded here.
    """

    kernel: str
    script: str
    stock: Seen
    put_back: Seen
    mended: bool = False

    @property
    def both_ways(self) -> bool:
        """VULNERABLE with the bug, FIXED without."""
        with_bug, without = self.put_back, self.stock
        if self.mended:
            with_bug, without = without, with_bug
        return (without.verdict, with_bug.verdict) == ("FIXED", "VULNERABLE")


#: Id -> what each kernel showed, oldest series first.
Record = Mapping[str, Sequence[Shown]]


def load(path: Path = RECORD) -> dict[str, list[Shown]]:
    """Read a record. Raises HarnessError if it is damaged."""
    document = reading.document(path, "record of kvmnest repro verify", _SCHEMA)
    return {
        name: [
            Shown(kernel, entry["script"], Seen(**entry["stock"]), Seen(**entry["put_back"]))
            for kernel, entry in kernels.items()
        ]
        for name, kernels in document["shown"].items()
    }


_SEEN = exactly(("verdict", "evidence"), verdict=TEXT, evidence=TEXT)
_SHOWN = exactly(("script", "stock", "put_back"), script=TEXT, stock=_SEEN, put_back=_SEEN)
_SCHEMA = exactly(("schema", "shown"), schema={"const": SCHEMA}, shown=by_name(by_name(_SHOWN)))


def start(path: Path) -> dict[str, list[Shown]]:
    """The record that new entries are added to, {} if there is no file yet.

    Raises UsageError if the file cannot be replaced, HarnessError if it is something else.
    """
    if not path.parent.is_dir():
        raise UsageError(f"cannot write {path}: there is no folder {path.parent}")
    return load(path) if path.exists() else {}


def add(record: dict[str, list[Shown]], name: str, shown: Shown) -> None:
    """Add what a kernel showed, in place of what an earlier one of its series did."""
    series = _series(shown.kernel)
    others = [each for each in record.get(name, ()) if _series(each.kernel) != series]
    record[name] = sorted([*others, shown], key=lambda each: _series(each.kernel))


def save(path: Path, record: Record) -> None:
    """Write a record as a whole. Raises HarnessError if that is impossible."""
    entries: dict[str, dict[str, object]] = {}
    for name, every in sorted(record.items()):
        entries[name] = {
            each.kernel: {
                "script": each.script,
                "stock": asdict(each.stock),
                "put_back": asdict(each.put_back),
            }
            for each in every
        }
    write_json(path, {"schema": SCHEMA, "shown": entries})


def _series(kernel: str) -> tuple[int, ...]:
    """Major and minor version of a release."""
    return tuple(int(number) for number in re.findall(r"\d+", kernel)[:2])
