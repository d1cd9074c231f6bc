"""The end of a VM that no case asked for: hang, triple fault, internal error."""

from __future__ import annotations

from kvmnest.errors import KvmnestError


class VmLost(KvmnestError):
    """L1 cannot go on.

    Attributes:
        kind: "hang", "triple fault", "internal error", "failed entry" or "unexpected exit".
        detail: what KVM_RUN reported.
        command: the command that was running, or "" before the first.
        registers: the vCPU's registers at that moment (of L2, if L2 was running).
    """

    def __init__(self, kind: str, detail: str, command: str, registers: dict[str, int]) -> None:
        self.kind, self.detail = kind, detail
        self.command, self.registers = command, registers
        shown = " ".join(f"{name}={value:#x}" for name, value in registers.items())
        where = f" in {command}" if command else ""
        super().__init__(f"{kind}{where}: {detail}; {shown}")
