"""A machine that programs run on, without a kernel."""

import json
from pathlib import Path
from typing import Any

from kvmnest.vmx import ExitReason

# A processor as the lab's: KVM's VMX MSRs of an L1 on Linux 6.1, and the CPUID leaves.
FACTS: dict[str, Any] = json.loads((Path(__file__).parent / "facts.json").read_text())
#: Steps: one that is the same on all machines, one that is not.
NOTHING = {"do": "alone", "name": "vmxoff"}
STEP = {"do": "l1", "code": "90", "regs": {"rax": 1, "rbx": 2}}


class Machine:
    """VMXON succeeds; a step "l1" is another outcome here than elsewhere, or kills it."""

    def __init__(self, name: str, outcome: str, deadly: int = -1) -> None:
        self.name, self.outcome, self.deadly = name, outcome, deadly

    def do(self, task: Any, on_event: Any, journal: Path | None = None) -> str:
        on_event({"facts": FACTS})
        for number, program in json.loads(task.work)["programs"]:
            on_event({"start": number})
            if number == self.deadly:
                return "kernel panic"
            ends = [self.outcome if s["do"] == "l1" else "Succeed" for s in program["steps"]]
            on_event({"end": number, "seen": [[{"end": [end]}] for end in ends]})
        return ""


def exit_seen(reason: ExitReason, guest: dict[str, int], **parts: int) -> dict[str, Any]:
    """What is seen of a VM exit with these guest-state fields and parts."""
    seen: dict[str, Any] = {"end": ["Exit", int(reason)], "parts": parts, "regs": {}, "cr2": 0}
    return {**seen, "host": [], "guest": guest, "memory": {"l2_data": 1}}
