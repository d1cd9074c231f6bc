"""What the suite holds, without running it: ids, patches, SDM titles, needs."""

from __future__ import annotations

import importlib
import marshal
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvmnest.cases.machine import Machine
from kvmnest.cases.needs import why_skipped
from kvmnest.errors import HarnessError
from kvmnest.results.runner import Plan, pytest_arguments, split_selection
from kvmnest.results.targets import LocalTarget


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
    with tempfile.NamedTemporaryFile(prefix="kvmnest-plan-") as file:
        arguments = pytest_arguments(Plan(keyword=keyword), "kvm", modules, [])
        ended = LocalTarget().run(
            [*arguments, "--collect-only", f"--kvmnest-plan={file.name}"], events.append
        )
        plan = file.read()
    broken = next((event for event in events if event["e"] == "broken"), None)
    if broken or not plan:
        where = broken["where"] if broken else ended.output.strip()[-200:]
        raise HarnessError(f"cannot collect the suite: {where}")
    machine = Machine()
    try:
        return [_listed(machine, entry) for entry in marshal.loads(plan)["cases"]]
    finally:
        machine.close()


def _listed(machine: Machine, entry: dict[str, Any]) -> Listed:
    flags = [
        getattr(importlib.import_module(module), kind)(value)
        for module, kind, value in entry["needs"]
    ]
    needs = [f"{type(flag).__name__}.{flag.name}" for flag in flags]
    needs += [f"kvm_intel.{name}={value}" for name, value in entry["params"].items()]
    try:
        skip = why_skipped(machine, flags, entry["params"], vmx=entry["vmx"])
    except HarnessError as error:
        skip = str(error)
    return Listed(entry["id"], entry["series"], entry["sdm"], needs, skip)
