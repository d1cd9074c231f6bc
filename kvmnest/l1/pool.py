"""An L1 for each case: the one before, reset, where that is possible, else a new one."""

from __future__ import annotations

from collections.abc import Callable

from kvmnest.kvm import Kvm
from kvmnest.l1.l1 import L1


class L1Pool:
    """Keeps one L1 between cases; measured in ``kvmnest bench``, a reset is the cheaper way."""

    def __init__(
        self,
        kvm: Kvm,
        *,
        budget: float = 5.0,
        nested_roundtrip: bool = False,
        make: Callable[..., L1] = L1,
    ) -> None:
        self._kvm = kvm
        self._make = make
        self._budget = budget
        self._roundtrip = nested_roundtrip
        self._spare: L1 | None = None

    def take(self) -> L1:
        """Return an L1 as it is after creation."""
        spare, self._spare = self._spare, None
        if spare is not None:
            return spare
        l1 = self._make(self._kvm, budget=self._budget, nested_roundtrip=self._roundtrip)
        if not self._roundtrip:
            l1.keep_state()
        return l1

    def give_back(self, l1: L1, *, reuse: bool = True) -> None:
        """Take an L1 back after a case; with ``reuse`` False it is closed."""
        if reuse and l1.resettable:
            try:
                l1.reset()
            except Exception:
                l1.close()
                raise
            self._spare = l1
        else:
            l1.close()

    def close(self) -> None:
        """Close the L1 that is kept."""
        if self._spare is not None:
            self._spare.close()
            self._spare = None
