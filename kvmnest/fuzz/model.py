"""A VM entry to try: a mode of L2 and the fields and memory that differ from the base VMCS."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from kvmnest.l1.baseline import L2Mode, baseline
from kvmnest.l1.payload import Payload
from kvmnest.vmx import Capabilities, Field, Msr, PinCtl, Rflags
from kvmnest.vmx.capinfo import CpuFeatures

#: Region of the VMCS that is entered.
REGION = "vmcs_a"
#: Entries that each MSR area of the base VMCS holds, all harmless.
AREA_ENTRIES = 4
#: Host state that L1 cannot live without: with some other value it dies at the first VM exit.
VITAL = (
    *(Field.HOST_CR3, Field.HOST_CS_SELECTOR, Field.HOST_SS_SELECTOR, Field.HOST_TR_SELECTOR),
    *(Field.HOST_TR_BASE, Field.HOST_GDTR_BASE, Field.HOST_IDTR_BASE, Field.HOST_RSP),
    *(Field.HOST_RIP, Field.HOST_IA32_EFER, Field.HOST_CR0),
)
_AREAS = ("entry_load_msrs", "exit_store_msrs", "exit_load_msrs")


def capabilities(facts: Mapping[str, Any]) -> Capabilities:
    """Those that an executor's facts state. Raises ValueError if they say that there is no VMX."""
    leaves = {(leaf, sub): tuple(rest) for leaf, sub, *rest in facts["cpuid"]}
    msrs = {int(index): int(value) for index, value in facts["msrs"].items()}
    return Capabilities.from_msrs(msrs, CpuFeatures.from_cpuid(leaves))


@dataclass(frozen=True)
class FuzzCase:
    """``changes`` against ``base_fields`` of ``mode``; ``memory`` maps payload labels to bytes.

    With ``bare`` the VMCS is the plain baseline of the suite instead, for a reproducer; with
    ``fresh`` the case gets a new L1, so that nothing of earlier ones is left. ``v8086``: the base
    is that of virtual-8086 mode (in a mode with 32-bit code).
    """

    mode: L2Mode = L2Mode.LONG
    changes: Mapping[Field, int] = field(default_factory=dict)
    memory: Mapping[str, bytes] = field(default_factory=dict)
    bare: bool = False
    fresh: bool = False
    v8086: bool = False

    def to_json(self) -> dict[str, Any]:
        """Names and numbers only."""
        return {
            "mode": self.mode.name,
            "changes": {field.name: value for field, value in self.changes.items()},
            "memory": {label: content.hex() for label, content in self.memory.items()},
            "bare": self.bare,
            "fresh": self.fresh,
            "v8086": self.v8086,
        }

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> FuzzCase:
        """Undo ``to_json``. Raises KeyError, TypeError or ValueError for anything else."""
        return cls(
            L2Mode[found["mode"]],
            {Field[name]: int(value) for name, value in found["changes"].items()},
            {label: bytes.fromhex(content) for label, content in found["memory"].items()},
            bool(found["bare"]),
            bool(found["fresh"]),
            bool(found["v8086"]),
        )

    def fields(self, base: Mapping[Field, int]) -> dict[Field, int]:
        """The whole VMCS; values are cut to the width of their fields, as VMWRITE does."""
        cut = {field: value & field.width.mask for field, value in self.changes.items()}
        return {**base, **cut}


def base_memory() -> dict[str, bytes]:
    """What the MSR areas hold: IA32_SYSENTER_CS with the value 0, again and again."""
    entry = Msr.SYSENTER_CS.to_bytes(4, "little") + bytes(12)
    return dict.fromkeys(_AREAS, entry * AREA_ENTRIES)


def base_fields(
    caps: Capabilities,
    payload: Payload,
    mode: L2Mode,
    *,
    bare: bool = False,
    v8086: bool = False,
) -> dict[Field, int]:
    """The VMCS before changes: legal, and L2 cannot do anything in it.

    The VMX-preemption timer with value 0 ends L2 before its first instruction (SDM,
    "VMX-Preemption Timer"), every exception exits, and each address that a control could put
    into use points at a page of its own. ``bare``: the suite's baseline. ``v8086``: L2 is in
    virtual-8086 mode.
    """
    fields = baseline(caps, payload, mode=mode)
    if v8086:
        fields |= _v8086()
    if bare:
        return fields
    more = {
        Field.EXCEPTION_BITMAP: 0xFFFFFFFF,
        Field.IO_BITMAP_A: payload["io_bitmap_a"],
        Field.IO_BITMAP_B: payload["io_bitmap_b"],
        Field.MSR_BITMAP: payload["msr_bitmap"],
        Field.VM_ENTRY_MSR_LOAD_ADDR: payload["entry_load_msrs"],
        Field.VM_EXIT_MSR_STORE_ADDR: payload["exit_store_msrs"],
        Field.VM_EXIT_MSR_LOAD_ADDR: payload["exit_load_msrs"],
        Field.VIRTUAL_APIC_PAGE_ADDR: payload["virtual_apic"],
        Field.TPR_THRESHOLD: 0,
        Field.APIC_ACCESS_ADDR: payload["apic_access"],
        Field.VIRTUAL_PROCESSOR_ID: 1,
        Field.VMREAD_BITMAP: payload["vmread_bitmap"],
        Field.VMWRITE_BITMAP: payload["vmwrite_bitmap"],
        Field.PML_ADDRESS: payload["pml_log"],
        Field.GUEST_PML_INDEX: 511,
        Field.EPTP_LIST_ADDRESS: payload["eptp_list"],
        Field.VM_FUNCTION_CONTROL: 0,
        Field.TSC_MULTIPLIER: 1 << 48,
        Field.POSTED_INTR_DESC_ADDR: payload["posted_descriptor"],
        Field.VM_ENTRY_INSTRUCTION_LEN: 1,
    }
    if caps.supports(PinCtl.ACTIVATE_PREEMPTION_TIMER):
        pin = fields[Field.PIN_BASED_VM_EXEC_CONTROL]
        more[Field.PIN_BASED_VM_EXEC_CONTROL] = pin | PinCtl.ACTIVATE_PREEMPTION_TIMER
        more[Field.VMX_PREEMPTION_TIMER_VALUE] = 0
    fields |= {field: int(value) for field, value in more.items() if caps.field_exists(field)}
    return fields


def _v8086() -> dict[Field, int]:
    """The guest state of virtual-8086 mode (SDM, "Checks on Guest Segment Registers")."""
    fields = {Field.GUEST_RFLAGS: int(Rflags.VM | Rflags.RESERVED1)}
    for name in ("ES", "CS", "SS", "DS", "FS", "GS"):
        selector = 0x2000 if name != "SS" else 0x3000
        fields[Field[f"GUEST_{name}_SELECTOR"]] = selector
        fields[Field[f"GUEST_{name}_BASE"]] = selector << 4
        fields[Field[f"GUEST_{name}_LIMIT"]] = 0xFFFF
        fields[Field[f"GUEST_{name}_ACCESS_RIGHTS"]] = 0xF3
    return fields


class StaticMemory:
    """L1's memory as the rules read it: the payload, the base areas and a case's own bytes."""

    def __init__(self, payload: Payload, revision: int, memory: Mapping[str, bytes]) -> None:
        self._size = payload["RAM_SIZE"]
        parts = {payload[label]: content for label, content in base_memory().items()}
        parts[payload[REGION]] = revision.to_bytes(4, "little")
        parts |= {payload[label]: content for label, content in memory.items()}
        self._parts = [*payload.segments, *parts.items()]

    def __call__(self, address: int, length: int) -> bytes | None:
        """Bytes at a guest-physical address, None where there is no memory."""
        if address + length > self._size:
            return None
        found = bytearray(length)
        for start, content in self._parts:
            low, high = max(start, address), min(start + len(content), address + length)
            if low < high:
                found[low - address : high - address] = content[low - start : high - start]
        return bytes(found)


def modes(caps: Capabilities, payload: Payload) -> Iterator[L2Mode]:
    """The modes that these capabilities allow."""
    from kvmnest.errors import HarnessError

    for mode in L2Mode:
        try:
            baseline(caps, payload, mode=mode)
        except HarnessError:
            continue
        yield mode
