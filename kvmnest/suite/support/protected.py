"""An L1 in protected mode: 32-bit code with PAE paging, whose vCPU Python drives itself.

Its segments, control registers and paging structures are those that the baseline gives to an L2
in PAE mode. Code ends in an OUT; each of the 32 exceptions has a handler that tells its vector.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvmnest.errors import HarnessError
from kvmnest.kvm.exits import IoExit
from kvmnest.l1 import L1, L2Mode, code
from kvmnest.l1.baseline import cached_baseline
from kvmnest.vmx import Cr4, Field, Vector
from kvmnest.vmx.outcome import ANY
from kvmnest.vmx.registers import STATUS_FLAGS

DONE, FAULT, HOST = 0x31, 0x32, 0x33
_ERROR_CODES = (8, 10, 11, 12, 13, 14, 17, 21)
_GATE = 8
_STUB = 8


@dataclass(frozen=True)
class Done:
    """Code that reached its end: its status flags, and all registers."""

    flags: Any = 0
    regs: Any = ANY

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Done) and self.flags == other.flags

    def __hash__(self) -> int:
        return hash(self.flags)


@dataclass(frozen=True)
class Faulted:
    """Code that an exception ended: the vector, and the error code if it has one."""

    vector: int
    error: int | None = None


@dataclass(frozen=True)
class Exited:
    """A VM entry that ended in a VM exit: L1 runs at HOST_RIP."""


class ProtectedL1:
    """Lets the first vCPU of ``l1`` run in protected mode; VMX operation, if any, goes on.

    ``segments`` may change before each ``run``: names of ``struct kvm_segment`` to values.
    """

    def __init__(self, l1: L1) -> None:
        self.l1 = l1
        self.vcpu = l1.vcpu
        self.state = cached_baseline(l1.caps, l1.payload, L2Mode.PAE, None, 0)
        self.page, self.idt, self.stubs = l1.alloc(), l1.alloc(), l1.alloc()
        self.stack = l1.alloc() + 0xF00
        #: Where data of the code may be: a page, above all others.
        self.data = l1.alloc()
        self.host_rip = self.stubs + 0xF00
        self.segments: dict[str, dict[str, int]] = {}
        self._write_handlers()

    def __repr__(self) -> str:
        return f"<ProtectedL1 with code at {self.page:#x}>"

    def _write_handlers(self) -> None:
        l1, selector = self.l1, self.state[Field.GUEST_CS_SELECTOR]
        for vector in range(32):
            stub = self.stubs + vector * _STUB
            l1.write(stub, bytes((0xB0, vector)) + code.out8(FAULT))  # MOV AL, vector
            gate = stub & 0xFFFF | selector << 16 | 0x8E00 << 32 | stub >> 16 << 48
            l1.write_int(self.idt + vector * _GATE, gate)
        l1.write(self.host_rip, code.out8(HOST))

    def enter(self) -> None:
        """Write the registers that make the mode."""
        state, sregs = self.state, self.vcpu.get_sregs()
        for name in ("cs", "ss", "ds", "es", "fs", "gs", "ldt", "tr"):
            _set(getattr(sregs, name), state, {"ldt": "LDTR"}.get(name, name.upper()))
            for part, value in self.segments.get(name, {}).items():
                setattr(getattr(sregs, name), part, value)
        sregs.gdt.base, sregs.gdt.limit = (
            state[Field.GUEST_GDTR_BASE],
            state[Field.GUEST_GDTR_LIMIT],
        )
        sregs.idt.base, sregs.idt.limit = self.idt, 32 * _GATE - 1
        sregs.cr0, sregs.cr3 = state[Field.GUEST_CR0], state[Field.GUEST_CR3]
        sregs.cr4 = state[Field.GUEST_CR4] | Cr4.VMXE
        sregs.efer = 0
        self.vcpu.set_sregs(sregs)

    def run(self, snippet: bytes, **regs: int) -> Done | Faulted | Exited:
        """Run code, all status flags set, with the registers named: what ended it."""
        self.l1.write(self.page, snippet + code.out8(DONE))
        self.enter()
        now = self.vcpu.get_regs()
        for name, value in regs.items():
            setattr(now, name, value)
        now.rip, now.rsp = self.page, self.stack
        now.rflags = 2 | STATUS_FLAGS
        self.vcpu.set_regs(now)
        seen = self.vcpu.run()
        if not isinstance(seen, IoExit):
            raise HarnessError(f"an L1 in protected mode ended with {seen!r}")
        # KVM finishes the OUT at the next KVM_RUN.
        self.vcpu.run(immediate_exit=True)
        after = self.vcpu.get_regs()
        if seen.port == HOST:
            return Exited()
        if seen.port == DONE:
            return Done(after.rflags & STATUS_FLAGS, after)
        vector = seen.data[0]
        error = self.l1.read_int(after.rsp, 4) if vector in _ERROR_CODES else None
        return Faulted(Vector(vector), error)


def _set(segment: Any, state: Mapping[Field, int], name: str) -> None:
    """A segment register as the guest-state area of a VMCS has it."""
    rights = state[Field[f"GUEST_{name}_ACCESS_RIGHTS"]]
    segment.base = state[Field[f"GUEST_{name}_BASE"]]
    segment.limit = state[Field[f"GUEST_{name}_LIMIT"]]
    segment.selector = state[Field[f"GUEST_{name}_SELECTOR"]]
    segment.type, segment.s, segment.dpl = rights & 15, rights >> 4 & 1, rights >> 5 & 3
    segment.present, segment.avl = rights >> 7 & 1, rights >> 12 & 1
    segment.l, segment.db, segment.g = rights >> 13 & 1, rights >> 14 & 1, rights >> 15 & 1
    segment.unusable = rights >> 16 & 1
