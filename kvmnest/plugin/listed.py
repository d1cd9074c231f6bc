"""Sends what was collected as events, for ``kvmnest list``."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kvmnest.cases.needs import why_skipped
from kvmnest.errors import HarnessError
from kvmnest.kvm.errors import KvmUnavailable
from kvmnest.plugin import policy
from kvmnest.plugin.fixtures import offer


class Listing:
    """A plugin object that tells of each collected case what it needs, and why it cannot run."""

    def __init__(self, send: Callable[..., None]) -> None:
        self._send = send

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Send an event ``listed`` for each case, in running order."""
        for item in session.items:
            flags, params = policy.needed_flags(item), policy.needed_params(item)
            needs = [f"{type(flag).__name__}.{flag.name}" for flag in flags]
            needs += [f"kvm_intel.{name}={value}" for name, value in params.items()]
            try:
                skip = why_skipped(offer(session.config), flags, params, vmx=policy.needs_vmx(item))
            except (HarnessError, KvmUnavailable) as error:
                skip = str(error)
            self._send(
                "listed",
                id=policy.case_id(item.nodeid, item),
                series=policy.series(item),
                sdm=policy.sdm(item),
                needs=needs,
                skip=skip,
            )
