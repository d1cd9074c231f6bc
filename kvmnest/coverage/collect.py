"""Take the blocks that ran from the events of the lab, and note what reached each first."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from kvmnest.cases.events import parse
from kvmnest.coverage.build import Built
from kvmnest.coverage.record import Record, Source
from kvmnest.errors import HarnessError
from kvmnest.fuzz.machines import LabMachine, Numbered, OnEvent
from kvmnest.lab.guest import EVENTS_PATH
from kvmnest.lab.machine import Lab
from kvmnest.lab.session import Sink
from kvmnest.run.lab_target import LabTarget
from kvmnest.run.targets import Ended
from kvmnest.run.targets import OnEvent as OnCaseEvent

#: What reached a block when the modules were loaded, or before the first case began.
BEFORE = "(before the first case)"


class Collector:
    """The record of what ran on instrumented modules, filled by any number of labs at once."""

    def __init__(self, built: Built) -> None:
        self._built = built
        self._lock = threading.Lock()
        #: Whether any lab told of a block.
        self.told = False
        self.record = Record(
            built.release,
            built.version,
            {
                name: Source(each.functions, each.lines, [""] * len(each.lines))
                for name, each in built.sources.items()
            },
        )

    def boot(self) -> Boot:
        """What takes the events of one boot."""
        return Boot(self)

    def take(self, blocks: Sequence[tuple[str, int]], by: str) -> int:
        """Note blocks, (file, number), that ``by`` reached, unless something did before.

        Returns how many nothing had reached before.
        """
        new = 0
        with self._lock:
            self.told = True
            for name, number in blocks:
                first = self.record.sources[name].first
                new += not first[number]
                first[number] = first[number] or by
        return new

    def numbered(self, sections: dict[str, dict[str, int]]) -> dict[int, tuple[str, int]]:
        """Address -> (file, number) of each block, where the modules are at ``sections``."""
        return {
            sections[module][section] + offset: (name, number)
            for name, source in self._built.sources.items()
            for number, (module, section, offset) in enumerate(source.places)
            if section in sections.get(module, ())
        }


class Boot:
    """Turns the addresses that one boot of the lab tells into blocks."""

    def __init__(self, collector: Collector) -> None:
        self._collector = collector
        self._blocks: dict[int, tuple[str, int]] = {}

    def take(self, told: dict[str, Any], by: str) -> int:
        """Take the content of an event ``coverage``; how many of its blocks are new.

        Raises HarnessError if blocks were lost.
        """
        if told["lost"]:
            raise HarnessError(
                f"the module kvmnest-coverage does not tell all blocks: {told['lost']}"
            )
        if told["sections"]:
            self._blocks = self._collector.numbered(told["sections"])
        # Others belong to headers, and to lines that the compiler made up.
        reached = [self._blocks[a] for a in told["new"] if a in self._blocks]
        return self._collector.take(reached, by)


class CoveredTarget(LabTarget):
    """The lab with instrumented modules: each boot of it, also in parallel, fills ``collector``."""

    def __init__(self, collector: Collector, **arguments: Any) -> None:
        self._collector = collector
        super().__init__(**arguments)

    def run(self, arguments: Sequence[str], on_event: OnCaseEvent, first: int = 0) -> Ended:
        """Boot and run; see LabTarget."""
        boot, by = self._collector.boot(), BEFORE

        def take(event: dict[str, Any]) -> None:
            nonlocal by
            if event["e"] == "coverage":
                boot.take(event, by)
                return
            if event["e"] == "start":
                by = event["id"]
            on_event(event)

        return super().run(arguments, take, first)


class CoveredMachine(LabMachine):
    """The lab as the fuzzer uses it, with instrumented modules."""

    def __init__(self, collector: Collector, seed: int, **arguments: Any) -> None:
        self._collector = collector
        self._seed = seed
        super().__init__(**arguments)

    def run(self, cases: Numbered, on_event: OnEvent, journal: Any) -> str:
        """Try cases; see LabMachine."""
        boot, by = self._collector.boot(), BEFORE

        def take(event: dict[str, Any]) -> None:
            nonlocal by
            if "coverage" in event:
                boot.take(event["coverage"], by)
                return
            if "start" in event:
                by = f"fuzz --seed {self._seed}, case {event['start']}"
            on_event(event)

        return super().run(cases, take, journal)


def run_command(
    collector: Collector, lab: Lab, command: Sequence[str], on_error: Sink, limit: float | None
) -> int:
    """Run a command in the lab; its exit status, negative if a signal killed it.

    What it reached is told at its end. Raises what Lab.run does.
    """
    boot, by = collector.boot(), " ".join(command)
    by = by if len(by) <= 80 else f"{by[:77]}..."

    def take(line: bytes) -> None:
        event = parse(line) if line.startswith(b'{"e":"coverage"') else {}
        if event:
            boot.take(event, by)

    wrapped = ["python3", "-m", "kvmnest.cases.covered_command", EVENTS_PATH, *command]
    return lab.run(wrapped, on_event=take, on_error=on_error, limit=limit)
