"""Try VM entries on this kernel's KVM, one after the other: also run inside the lab's guest.

``python3 -m kvmnest.fuzz.execute CASES EVENTS``: CASES holds one JSON array of cases, EVENTS is
where lines of JSON go: what this machine is, {"start": n} before each case, {"end": n, "outcome":
[...]} after it. {"start": n} is on the disk before the case runs, if EVENTS is a file there. With
an instrumented KVM, {"coverage": {...}} before both tells which blocks ran until then (see
kvmnest.cases.covered), unless EVENTS is a file.
"""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Mapping
from typing import Any

from kvmnest import host
from kvmnest.cases import covered
from kvmnest.errors import HarnessError, KvmnestError
from kvmnest.fuzz.model import REGION, FuzzCase, base_fields, base_memory
from kvmnest.kvm import Kvm, KvmError
from kvmnest.l1 import L1, L2Mode, VmLost
from kvmnest.vmx import Field
from kvmnest.vmx.outcome import (
    EntryFailure,
    Exit,
    Fault,
    HostExit,
    Outcome,
    VMfailInvalid,
    VMfailValid,
)

#: Seconds after which an L2 that does not come back counts as entered and hung.
BUDGET = 1.0
#: Leaves of CPUID that the rules look at.
LEAVES = ((1, 0), (7, 0), (7, 1), (0xA, 0), (0x80000001, 0), (0x80000008, 0))

Seen = list[Any]
"""An outcome as JSON: its name, then its numbers."""


def encode(outcome: Outcome) -> Seen:
    """``["Exit", reason]``, ``["VMfailValid", error]``, ``["EntryFailure", reason, qual]``..."""
    if isinstance(outcome, Exit):
        return ["Exit", int(outcome.reason)]
    if isinstance(outcome, VMfailValid):
        return ["VMfailValid", int(outcome.error)]
    if isinstance(outcome, EntryFailure):
        return ["EntryFailure", int(outcome.reason), int(outcome.qualification)]
    if isinstance(outcome, Fault):
        return ["Fault", int(outcome.vector)]
    if isinstance(outcome, VMfailInvalid):
        return ["VMfailInvalid"]
    return ["HostExit" if isinstance(outcome, HostExit) else "other", repr(outcome)]


class Executor:
    """Enters one VMCS again and again; a new L1 only after one was lost."""

    def __init__(self, kvm: Kvm) -> None:
        self._kvm = kvm
        self._l1: L1 | None = None
        self._launched = False
        self._bases: dict[tuple[L2Mode, bool, bool], dict[Field, int]] = {}
        self._stale: set[Field] = set()

    def run(self, case: FuzzCase) -> Seen:
        """Try one case. Raises KvmError if KVM does not even make a VM."""
        if case.fresh:
            self.close()
        l1 = self._ready()
        memory = {**base_memory(), **case.memory}
        for label, content in memory.items():
            l1.write(l1.sym(label), content)
        try:
            base = self._base(case)
            # What an earlier case left in a field that the base does not set.
            l1.vmcs.update(dict.fromkeys(self._stale - base.keys(), 0))
            l1.vmcs.update(case.fields(base))
            self._stale |= case.changes.keys()
            outcome = l1.vmresume() if self._launched else l1.vmlaunch()
        except VmLost as error:
            self.close()
            return ["lost", error.kind]
        except KvmError as error:
            # KVM_RUN failed: KVM gave the VM up.
            self.close()
            return ["lost", f"KVM_RUN {errno.errorcode.get(error.errno or 0, error.errno)}"]
        except HarnessError as error:
            # A VMWRITE failed or L1 answered nonsense.
            self.close()
            return ["other", str(error)]
        l1.budget.stop()
        if isinstance(outcome, HostExit):
            self.close()
        else:
            self._launched = self._launched or isinstance(outcome, Exit)
            for label in case.memory:
                l1.write(l1.sym(label), bytes(len(case.memory[label])))
        return encode(outcome)

    def _base(self, case: FuzzCase) -> Mapping[Field, int]:
        key = case.mode, case.bare, case.v8086
        if key not in self._bases:
            assert self._l1 is not None
            self._bases[key] = base_fields(
                self._l1.caps, self._l1.payload, case.mode, bare=case.bare, v8086=case.v8086
            )
        return self._bases[key]

    def _ready(self) -> L1:
        if self._l1 is None:
            self._l1 = L1(self._kvm, budget=BUDGET)
            self._l1.launchable(region=REGION)
            self._launched, self._stale = False, set()
        return self._l1

    def facts(self) -> dict[str, Any]:
        """What the rules need to know of this machine, and what it is."""
        l1 = self._ready()
        leaves = []
        for leaf, subleaf in LEAVES:
            leaves.append([leaf, subleaf, *l1.cpuid(leaf, subleaf).value])
        l1.budget.stop()
        return {
            "kernel": host.kernel(),
            "cpu": host.cpu_model(),
            "params": host.kvm_intel_params(),
            "msrs": {str(index): value for index, value in l1.caps.msrs.items()},
            "cpuid": leaves,
        }

    def close(self) -> None:
        """Destroy the VM."""
        if self._l1 is not None:
            self._l1.close()
            self._l1 = None


def main(cases_path: str, events_path: str) -> int:
    """Run all cases of a file; returns an exit code."""
    with open(cases_path, encoding="utf-8") as file:
        numbered = json.load(file)
    descriptor = os.open(events_path, os.O_WRONLY | os.O_APPEND)
    regular = os.path.isfile(events_path)

    blocks = None if regular else covered.opened()

    def say(**event: Any) -> None:
        news = blocks.news() if blocks else {"new": [], "lost": ""}
        if news["new"] or news["lost"]:
            os.write(descriptor, json.dumps({"coverage": news}).encode() + b"\n")
        os.write(descriptor, json.dumps(event).encode() + b"\n")
        if regular and "start" in event:
            os.fsync(descriptor)

    try:
        with Kvm() as kvm:
            executor = Executor(kvm)
            say(facts=executor.facts())
            for number, found in numbered:
                case = FuzzCase.from_json(found)
                say(start=number)
                say(end=number, outcome=executor.run(case))
            executor.close()
    except KvmnestError as error:
        print(f"kvmnest: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2]))
