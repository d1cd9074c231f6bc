"""The reference target: the cases' process runs on this machine, L1 on a bare emulated CPU."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from kvmnest.known import REFERENCE
from kvmnest.reference.emulator import find
from kvmnest.run.targets import Ended, LocalTarget, OnEvent


class ReferenceTarget(LocalTarget):
    """``bochs`` and ``model``, and what it raises: see ``kvmnest.reference.emulator.find``.

    ``patience`` as for ``LocalTarget``.
    """

    name = REFERENCE

    def __init__(
        self, bochs: str | None = None, model: str | None = None, patience: float = 120.0
    ) -> None:
        super().__init__(patience)
        found = find(bochs, model)
        self.emulator = found.cpu_emulator
        self._arguments = [f"--kvmnest-bochs={found.path}"]
        self._arguments.append(f"--kvmnest-cpu-model={found.model.name}")

    def split(self, jobs: int) -> list[ReferenceTarget]:
        """Deal the cases out to ``jobs`` processes."""
        if jobs == 1:
            return [self]
        parts = [copy.copy(self) for _ in range(jobs)]
        for number, part in enumerate(parts):
            part._arguments = [*self._arguments, f"--kvmnest-part={number}/{jobs}"]
        return parts

    def run(self, arguments: Sequence[str], on_event: OnEvent, first: int = 0) -> Ended:
        """Run ``python -m pytest ARGUMENTS``; see Target."""
        return super().run([*self._arguments, *arguments], on_event, first)
