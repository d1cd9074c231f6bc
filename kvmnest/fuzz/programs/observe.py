"""What is seen of a step: outcomes, registers, VMCS and memory, as JSON."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Collection
from typing import Any

from kvmnest.errors import NeedsHost
from kvmnest.fuzz.execute import encode
from kvmnest.kvm import exits
from kvmnest.l1 import L1
from kvmnest.l1.command import GPRS
from kvmnest.l1.cpu import Cpu
from kvmnest.vmx import Capabilities, Field
from kvmnest.vmx.fields import Kind
from kvmnest.vmx.outcome import (
    EntryFailure,
    Exit,
    Fault,
    HostExit,
    Outcome,
    Succeed,
    WrongFlags,
)

Seen = dict[str, Any]
"""What is seen of one instruction: "end", and what else there is to see of such an end."""

#: Parts of an exit, beside its reason; see kvmnest.vmx.outcome.Exit.
PARTS = (
    *("qualification", "length", "intr_info", "intr_error", "idt_info", "idt_error"),
    *("info", "linear", "physical"),
)
#: Pages that L2 or a VM exit may write.
PAGES = {
    **{"l2_code": 2, "l2_data": 1, "l2_stack": 1, "virtual_apic": 1, "apic_access": 1},
    **{"exit_store_msrs": 1, "pml_log": 1, "posted_descriptor": 1},
}
#: Fields that VM exits and entries write beside guest state (SDM, "VM Exits", "VM Entries").
_WRITTEN = (
    *(Field.VM_ENTRY_CONTROLS, Field.VM_ENTRY_INTR_INFO_FIELD, Field.TPR_THRESHOLD),
    *(Field.VM_ENTRY_INSTRUCTION_LEN, Field.VM_ENTRY_EXCEPTION_ERROR_CODE, Field.EPTP_INDEX),
)
#: Guest state that many instructions change.
_OFTEN = frozenset(
    (
        *(Field.GUEST_RIP, Field.GUEST_RFLAGS, Field.GUEST_RSP, Field.GUEST_CR0, Field.GUEST_CR4),
        *(Field.GUEST_CR3, Field.GUEST_INTERRUPTIBILITY_INFO, Field.GUEST_ACTIVITY_STATE),
        *(Field.GUEST_PENDING_DBG_EXCEPTIONS, Field.GUEST_CS_SELECTOR, Field.GUEST_SS_SELECTOR),
        *(Field.GUEST_CS_ACCESS_RIGHTS, Field.GUEST_SS_ACCESS_RIGHTS, Field.GUEST_DR7),
    )
)
#: Counted in time, which is another one on every machine.
_TIMED = (Field.VMX_PREEMPTION_TIMER_VALUE, Field.GUEST_SMBASE)
#: Of interrupts and NMIs that L1 itself took.
_COUNTS = ("CPU_IRQ_COUNT", "CPU_NMI_COUNT")
#: Flags of VMfailInvalid and VMfailValid.
FAILED = 0x41


@functools.cache
def _names(fields: tuple[Field, ...]) -> tuple[str, ...]:
    return tuple(field.name for field in fields)


def some_failed(flags: Collection[int]) -> bool:
    """Whether some of the VMREADs or VMWRITEs with these RFLAGS failed; mostly all are equal."""
    return any(rflags & FAILED for rflags in {*flags})


def watched(caps: Capabilities) -> tuple[Field, ...]:
    """Fields that are read after each VM entry."""
    fields = (*(field for field in Field if field.kind is Kind.GUEST), *_WRITTEN)
    return tuple(f for f in fields if f not in _TIMED and caps.field_exists(f))


def end(outcome: Outcome) -> list[Any]:
    """An outcome's name and numbers: ["Exit", reason], ["VMfailValid", error], ["Succeed"]..."""
    if isinstance(outcome, Fault):
        return ["Fault", int(outcome.vector), int(outcome.error_code)]
    if isinstance(outcome, Succeed):
        return ["Succeed"]
    if isinstance(outcome, WrongFlags):
        return ["WrongFlags", int(outcome.rflags)]
    if isinstance(outcome, HostExit):
        return ["host", _host(outcome.exit)]
    return encode(outcome)


def _host(seen: exits.Exit) -> str:
    if isinstance(seen, exits.IoExit):
        return "I/O"
    if isinstance(seen, exits.MmioExit):
        return "memory that is not there"
    return type(seen).__name__


def needs_host(error: NeedsHost) -> list[Any]:
    """The end of an instruction for which the reference CPU would need a host."""
    for name, what in (("KVM_EXIT_IO", "I/O"), ("KVM_EXIT_MMIO", "memory that is not there")):
        if error.what.startswith(name):
            return ["host", what]
    return ["host", error.what]


def registers(outcome: Any) -> dict[str, int]:
    """General registers that are not 0, but RSP, which L1's stack takes after a VM exit."""
    regs = outcome.regs
    return {name: regs[name] for name in GPRS if regs.get(name) and name != "rsp"}


class Watcher:
    """Sees what has changed in one L1 since it looked last."""

    def __init__(self, l1: L1, fields: tuple[Field, ...]) -> None:
        self._l1, self._fields = l1, fields
        self._often = tuple(field for field in fields if field in _OFTEN)
        self._guest: dict[str, int] = {}
        self._memory: dict[str, bytes] = {}
        at = [(label, l1.payload[label], pages) for label, pages in PAGES.items()]
        self._pages = [(label, start, start + 4096 * pages) for label, start, pages in at]

    def entry(self, outcome: Outcome, cpu: Cpu, *, every: bool = True) -> Seen:
        """See a VM entry that came to an end, with ``every`` field or those that change often."""
        seen: Seen = {"end": end(outcome)}
        if isinstance(outcome, Exit):
            parts = ((name, getattr(outcome, name)) for name in PARTS)
            seen["parts"] = {name: int(value) for name, value in parts if value}
        if isinstance(outcome, Exit | EntryFailure):
            loads = cpu.host_loads()
            seen |= {"regs": registers(outcome)}
            seen |= {"host": [getattr(loads, name) for name in loads.__slots__]}
        if isinstance(outcome, Exit):
            seen["cr2"] = int(outcome.cr2)
        if not isinstance(outcome, HostExit):
            seen |= {"guest": self._changed_fields(self._fields if every else self._often, cpu)}
            seen |= {"memory": self._changed_memory()}
            taken = [self._l1.read_int(cpu.block + self._l1.sym(name)) for name in _COUNTS]
            if any(taken):
                seen["taken"] = taken
        return seen

    def add_fields(self, seen: Seen, cpu: Cpu) -> None:
        """See every field of the current VMCS, beside those that ``seen`` has already."""
        rest = self._changed_fields(self._fields, cpu)
        if rest is not None and seen.get("guest") is not None:
            seen["guest"] = {**seen["guest"], **rest}

    def _changed_fields(self, fields: tuple[Field, ...], cpu: Cpu) -> dict[str, int] | None:
        """Fields of the current VMCS with another value; None if VMREAD fails."""
        results = cpu.submit([cpu.vmread_command(fields)])
        if not isinstance(results, list):
            return None
        if results[0].status != self._l1.payload["STATUS_LIST_DONE"]:
            return None
        values, flags = cpu.list_values(len(fields)), cpu.list_flags(len(fields))
        if some_failed(flags):
            values = tuple(-1 if f & FAILED else v for v, f in zip(values, flags, strict=True))
        # Sets of pairs are compared without a step of Python for each field.
        found = dict(zip(_names(fields), values, strict=True))
        changed = dict(found.items() - self._guest.items())
        self._guest.update(changed)
        return changed

    def _changed_memory(self) -> dict[str, int]:
        changed = {}
        view, memory = self._l1.memory.map, self._memory
        for label, start, stop in self._pages:
            # To compare bytes is cheaper than a digest of them.
            content = view[start:stop]
            if memory.get(label) != content:
                memory[label] = content
                changed[label] = zlib.crc32(content)
        return changed
