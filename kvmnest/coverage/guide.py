"""Which programs of ``kvmnest fuzz programs`` reach something new?"""

from __future__ import annotations

from typing import Any

from kvmnest.coverage.collect import BEFORE, Collector
from kvmnest.coverage.record import counts


class Guide:
    """Notes which programs reach blocks that none before them reached in this run."""

    def __init__(self, collector: Collector, seed: int) -> None:
        self._collector, self._seed = collector, seed
        self._boot = collector.boot()
        self._running = -1
        #: Blocks that each program reached first.
        self.new: dict[int, int] = {}

    def take(self, event: dict[str, Any]) -> None:
        """Take an event of the executor. Raises HarnessError if blocks were lost."""
        if "start" in event:
            self._running = event["start"]
        if "coverage" in event:
            by = f"fuzz programs --seed {self._seed}, program {self._running}"
            by = by if self._running >= 0 else BEFORE
            new = self._boot.take(event["coverage"], by)
            if new and self._running >= 0:
                self.new[self._running] = self.new.get(self._running, 0) + new

    def told(self) -> str:
        """Lines reached of each source, in words."""
        if not self._collector.told:
            return ""
        said = []
        for name, source in self._collector.record.sources.items():
            reached, every = counts(source.by_line())
            said.append(f"{name.rpartition('/')[2]} {reached} of {every} lines")
        return ", ".join(said)
