"""Collects the suite on this machine for a lab that would take long to do it itself."""

from __future__ import annotations

import contextlib
import marshal
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kvmnest import scratch
from kvmnest.errors import HarnessError
from kvmnest.lab import cache
from kvmnest.light.plan import options as plan_options
from kvmnest.light.plan import why_not
from kvmnest.run.names import nothing
from kvmnest.run.pytest_errors import refusal, why_broken
from kvmnest.run.targets import Ended, LocalTarget

_USAGE, _NOTHING = 4, 5  # of pytest.ExitCode


@dataclass(frozen=True)
class Collected:
    """What pytest collected.

    ``plan`` is for the light runner, empty if it cannot run these cases; ``unsupported`` then
    says why. ``tail`` ends the names of the modules that this pytest compiled. ``events`` and
    ``ended`` tell of a collection that failed.
    """

    plan: bytes
    unsupported: str
    tail: str
    count: int
    events: list[dict[str, Any]]
    ended: Ended

    @property
    def broken(self) -> bool:
        """Whether a file cannot be collected, or pytest broke down: no fault of the arguments."""
        files = any(event["e"] == "broken" for event in self.events)
        return files or self.ended.status not in (0, _USAGE, _NOTHING)

    def modules(self) -> set[str]:
        """Names of the modules that hold the cases of the plan."""
        return {case["module"] for case in marshal.loads(self.plan)["cases"]}

    def require_cases(self, selected: Sequence[str], keyword: str = "", marks: str = "") -> None:
        """See that there is something to run.

        Raises UsageError for an expression or a name that is wrong, NothingSelected, or
        HarnessError if the suite is broken.
        """
        broken = next((event for event in self.events if event["e"] == "broken"), None)
        if broken:
            raise HarnessError(f"cannot collect {broken['where']}: {why_broken(broken['detail'])}")
        if self.count:
            return
        raise refusal(self.ended.output) or nothing(selected, keyword, marks)

    def split(self, parts: int) -> list[Collected]:
        """Deal the cases out to as many plans; just this one if the light runner cannot run it."""
        if not self.plan or parts < 2:
            return [self]
        content = marshal.loads(self.plan)
        dealt = [content["cases"][part::parts] for part in range(parts)]
        return [
            replace(self, plan=marshal.dumps({**content, "cases": cases}), count=len(cases))
            for cases in dealt
            if cases
        ]


def collect(arguments: Sequence[str]) -> Collected:
    """Collect with the arguments of a run.

    pytest keeps modules with rewritten assert statements in the cache, where ``compiled.rewritten``
    finds them. Raises LabSetupError if the cache cannot be used.
    """
    with Collecting(arguments) as collecting:
        return collecting.result()


class Collecting:
    """``collect`` in a process that works while something else is done.

    A context manager: what was not waited for is ended.
    """

    def __init__(self, arguments: Sequence[str]) -> None:
        """Start it. Raises LabSetupError if the cache cannot be used."""
        self._arguments = arguments
        self._compiled = cache.root() / "pycache"
        self._undo = contextlib.ExitStack()
        self._found: Collected | None = None
        self._start()

    def __enter__(self) -> Collecting:
        """Return self."""
        return self

    def __exit__(self, *_: object) -> None:
        """End it."""
        self._undo.close()

    def result(self) -> Collected:
        """Wait for it."""
        if self._found is None:
            self._found = self._whole()
        return self._found

    def _whole(self) -> Collected:
        found = self._finish()
        if found.broken and self._compiled.exists():
            # Python does not look whether what it once compiled is whole.
            cache.drop(self._compiled)
            self._start()
            found = self._finish()
            if not found.broken:
                cache.tell(f"{self._compiled} is damaged or old, and made again")
        return found

    def _start(self) -> None:
        self._events: list[dict[str, Any]] = []
        environment = {"PYTHONPYCACHEPREFIX": str(self._compiled), "PYTHONDONTWRITEBYTECODE": ""}
        self._plan = Path(self._undo.enter_context(scratch.folder())) / "plan"
        arguments = [*self._arguments, "--collect-only", *plan_options(self._plan)]
        self._process = LocalTarget(environment=environment).start(arguments, self._events.append)
        self._undo.callback(self._process.stop)

    def _finish(self) -> Collected:
        ended = self._process.finish()
        plan = self._plan.read_bytes() if self._plan.is_file() else b""
        if not plan:
            return Collected(b"", "", "", 0, self._events, ended)
        content = marshal.loads(plan)
        unsupported = content["unsupported"] or why_not(str(self._plan))
        count = next((event["count"] for event in self._events if event["e"] == "collected"), 0)
        return Collected(
            b"" if unsupported else plan,
            unsupported,
            content["pyc_tail"],
            count,
            self._events,
            ended,
        )
