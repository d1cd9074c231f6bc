"""Run programs on this kernel's KVM or on the reference CPU: also inside the lab's guest.

``python3 -m kvmnest.fuzz.programs.execute WORK EVENTS``: WORK holds a JSON object:

* "programs": pairs of a number and a program;
* "msrs" and "cpuid": the capabilities that the programs assume;
* "steps": whether to tell each step; "moved": whether to move the VM before each step; "quiet":
  whether the host does nothing that L1 may not see;
* "bochs" and "model": which CPU; absent, it is KVM's.

EVENTS is where lines of JSON go: what this machine is, {"start": n} before each program, {"step":
i} before each step, {"end": n, "seen": [...]} after the program. If EVENTS is a file on a machine
that a step can crash, steps are always told, and are on the disk before they run.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from typing import Any

from kvmnest import host
from kvmnest.cases import covered
from kvmnest.errors import KvmnestError
from kvmnest.fuzz.execute import LEAVES
from kvmnest.fuzz.model import capabilities
from kvmnest.fuzz.programs.program import Program
from kvmnest.fuzz.programs.steps import Doer, run
from kvmnest.kvm import Kvm
from kvmnest.kvm.cpuid import leaf
from kvmnest.l1.pool import L1Pool
from kvmnest.vmx import Capabilities

#: Seconds after which a step that does not come back counts as hung.
BUDGET = 1.0


class Executor:
    """Runs programs, each on an L1 as it is after creation."""

    def __init__(self, kvm: Kvm, work: dict[str, Any]) -> None:
        self._kvm, self._work = kvm, work
        self._pool = L1Pool(kvm, budget=BUDGET)
        self._caps: Capabilities | None = None

    def facts(self) -> dict[str, Any]:
        """What this machine is and has."""
        l1 = self._pool.take()
        msrs = {str(index): value for index, value in l1.caps.msrs.items()}
        self._pool.give_back(l1)
        table = self._kvm.supported_cpuid()
        leaves = []
        for number, sub in LEAVES:
            with contextlib.suppress(KeyError):  # a leaf that this CPU does not have
                entry = leaf(table, number, sub)
                leaves.append([number, sub, entry.eax, entry.ebx, entry.ecx, entry.edx])
        bare = "bochs" in self._work
        return {
            "kernel": "none" if bare else host.kernel(),
            "cpu": "" if bare else host.cpu_model(),
            "params": {} if bare else host.kvm_intel_params(),
            "msrs": msrs,
            "cpuid": leaves,
        }

    def run(self, program: Program, say: Any, steps: bool) -> list[list[dict[str, Any]]]:
        """What is seen of each step; ``steps``: say where it is."""
        if self._caps is None:
            self._caps = capabilities(self._work)
        l1 = self._pool.take()
        bare = "bochs" in self._work
        how = {name: bool(self._work.get(name)) for name in ("quiet", "moved")}
        doer = Doer(l1, self._caps, bare=bare, **how)
        seen = list(run(program, doer, lambda number: say(step=number) if steps else None))
        last = seen[-1][-1].get("end", [""]) if seen and seen[-1] else [""]
        lost = last[0] in ("lost", "host", "other")
        doer.host.finish(lost=lost)
        self._pool.give_back(l1, reuse=not lost)
        return seen

    def close(self) -> None:
        """Destroy the VM."""
        self._pool.close()


def main(work_path: str, events_path: str) -> int:
    """Run all programs of a file; returns an exit code."""
    with open(work_path, encoding="utf-8") as file:
        work = json.load(file)
    descriptor = os.open(events_path, os.O_WRONLY | os.O_APPEND)
    bare = "bochs" in work
    regular = os.path.isfile(events_path) and not bare
    blocks = None if os.path.isfile(events_path) else covered.opened()

    def say(**event: Any) -> None:
        news = blocks.news() if blocks and "step" not in event else None
        if news and (news["new"] or news["lost"]):
            os.write(descriptor, json.dumps({"coverage": news}).encode() + b"\n")
        os.write(descriptor, json.dumps(event, separators=(",", ":")).encode() + b"\n")
        if regular and ("start" in event or "step" in event):
            os.fsync(descriptor)

    try:
        with _kvm(work) as kvm:
            executor = Executor(kvm, work)
            say(facts=executor.facts())
            for number, found in work["programs"]:
                say(start=number)
                say(
                    end=number,
                    seen=executor.run(Program.from_json(found), say, regular or work["steps"]),
                )
            executor.close()
    except KvmnestError as error:
        print(f"kvmnest: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _kvm(work: dict[str, Any]) -> Kvm:
    if "bochs" not in work:
        return Kvm()
    from kvmnest.reference.kvm import ReferenceKvm

    return ReferenceKvm(work["bochs"], work["model"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2]))
