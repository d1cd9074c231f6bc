"""Which cases failed the last time they ran: what ``kvmnest run --lf`` runs again."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from pathlib import Path

from kvmnest import reading
from kvmnest.errors import KvmnestError
from kvmnest.files import write_json
from kvmnest.lab import cache
from kvmnest.reports.model import FAILED, Run
from kvmnest.run import listing, names
from kvmnest.run.under_settings import case_of
from kvmnest.schema import TEXTS

_SUITE = Path(__file__).parent.parent / "suite"


def among(selected: Sequence[str]) -> list[str]:
    """The ids of ``selected`` that failed last; empty: of the suite and of files below this folder.

    A case that is no longer in its file is forgotten.
    """
    failed = [name for name in _load() if _exists(name)]
    if selected:
        wanted = tuple(_whole(name) for name in selected)
        failed = [name for name in failed if name.startswith(wanted)]
    else:
        failed = [name for name in failed if not name.startswith("/") or _is_below_here(name)]
    if any("[" in name and not name.startswith("/") for name in failed):
        # The parameters of a case may have become others since.
        ids = {case.id for case in listing.cases([])}
        failed = [name for name in failed if name.startswith("/") or name in ids]
    return failed


def remember(run: Run) -> None:
    """Note the failures of a run; those of cases that it did not run stay noted.

    A cache that cannot be written forgets: that must not fail a run.
    """
    ran = {_whole(case_of(case.id)) for case in run.cases}
    failed = [name for name in _load() if name not in ran and _exists(name)]
    bad = (case_of(case.id) for case in run.cases if case.outcome in FAILED)
    failed += dict.fromkeys(_whole(case) for case in bad)
    with contextlib.suppress(KvmnestError):
        write_json(_path(), failed)


def _whole(name: str) -> str:
    """A case of the suite by its id, one of another file by that file's absolute path.

    The memory is one for all folders, and a relative name means another file in each.
    """
    name = names.complete(name)
    file, sep, case = name.partition("::")
    path = Path(file).name if _of_suite(file) else Path(file).absolute()
    return f"{path}{sep}{case}"


def _of_suite(file: str) -> bool:
    path = Path(file)
    if path.exists():
        return path.resolve().parent == _SUITE.resolve()
    return (_SUITE / path.name).is_file()


def _exists(name: str) -> bool:
    """Is there such a function in such a file?"""
    file, _, case = name.partition("::")
    path = _SUITE / Path(file).name if _of_suite(file) else Path(file)
    function = case.partition("[")[0].rpartition("::")[2]
    try:
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
    except (OSError, ValueError):
        return False
    return re.search(rf"\bdef {re.escape(function)}\(", text) is not None


def _is_below_here(name: str) -> bool:
    return Path(name.partition("::")[0]).is_relative_to(Path.cwd())


def _path() -> Path:
    return cache.root() / "last-failed.json"


def _load() -> list[str]:
    try:
        where = _path()
        return list(reading.value(reading.data(where), "list of cases", TEXTS, str(where)))
    except KvmnestError:
        return []  # a note that cannot be read is none
