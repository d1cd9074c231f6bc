"""What the suite holds, without running it: ids, patches, SDM titles, needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvmnest.errors import HarnessError
from kvmnest.run.pytest_errors import last_error, refusal, why_broken
from kvmnest.run.selection import Selection, pytest_arguments, split_selection
from kvmnest.run.targets import LocalTarget


@dataclass(frozen=True)
class Listed:
    """A case: ``needs`` names what it needs, ``skip`` says why it cannot run here, if so."""

    id: str
    series: int | None
    sdm: str | None
    needs: list[str]
    skip: str


def cases(selected: Sequence[str], keyword: str = "") -> list[Listed]:
    """List cases in running order, judged for this machine's /dev/kvm.

    Raises UsageError for a selection that is not there, HarnessError if the suite is broken.
    """
    modules, paths = split_selection(selected)
    if paths:
        raise HarnessError("only cases of the suite can be listed")
    events: list[dict[str, Any]] = []
    arguments = pytest_arguments(Selection(keyword=keyword), "kvm", modules, [])
    ended = LocalTarget().run([*arguments, "--collect-only", "--kvmnest-list"], events.append)
    broken = next((event for event in events if event["e"] == "broken"), None)
    if broken:
        raise HarnessError(f"cannot collect {broken['where']}: {why_broken(broken['detail'])}")
    refused = refusal(ended.output)
    if refused:
        raise refused
    if ended.status not in (0, 5):  # 5: no case was collected
        raise HarnessError(f"cannot collect the suite: {last_error(ended.output)}")
    found = [event for event in events if event["e"] == "listed"]
    return [
        Listed(one["id"], one["series"], one["sdm"], one["needs"], one["skip"]) for one in found
    ]
