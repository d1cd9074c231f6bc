"""Controls of a VMCS that are legal, with the bitmaps and masks that they put into use."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from typing import Any

from kvmnest.fuzz.programs.program import PAUSE_PORT, Step
from kvmnest.vmx import Capabilities, EntryCtl, ExitCtl, Field, PinCtl, Proc2Ctl, ProcCtl

_FREE_PROC = (
    *(ProcCtl.INVLPG_EXITING, ProcCtl.MWAIT_EXITING),
    *(ProcCtl.CR3_LOAD_EXITING, ProcCtl.CR3_STORE_EXITING, ProcCtl.CR8_LOAD_EXITING),
    *(ProcCtl.CR8_STORE_EXITING, ProcCtl.MOV_DR_EXITING, ProcCtl.USE_MSR_BITMAPS),
    *(ProcCtl.MONITOR_EXITING, ProcCtl.PAUSE_EXITING, ProcCtl.USE_TSC_OFFSETTING),
)
_RARE_PROC = (
    *(ProcCtl.MONITOR_TRAP_FLAG, ProcCtl.INTERRUPT_WINDOW_EXITING, ProcCtl.NMI_WINDOW_EXITING),
    ProcCtl.USE_TPR_SHADOW,
)
_FREE_PROC2 = (
    *(Proc2Ctl.DESCRIPTOR_TABLE_EXITING, Proc2Ctl.ENABLE_RDTSCP, Proc2Ctl.ENABLE_VPID),
    *(Proc2Ctl.WBINVD_EXITING, Proc2Ctl.ENABLE_INVPCID, Proc2Ctl.UNRESTRICTED_GUEST),
)
_FREE_PIN = (PinCtl.EXTERNAL_INTERRUPT_EXITING, PinCtl.NMI_EXITING, PinCtl.VIRTUAL_NMIS)
_FREE_EXIT = (
    ExitCtl.ACKNOWLEDGE_INTERRUPT_ON_EXIT,
    *(ExitCtl.SAVE_DEBUG_CONTROLS, ExitCtl.SAVE_PAT, ExitCtl.LOAD_PAT, ExitCtl.SAVE_EFER),
    ExitCtl.LOAD_EFER,
)
_FREE_ENTRY = (EntryCtl.LOAD_DEBUG_CONTROLS, EntryCtl.LOAD_PAT)


def fields_step(caps: Capabilities, fields: Mapping[Field, int]) -> Step:
    """The step that writes those of ``fields`` that exist."""
    there = {f: v for f, v in fields.items() if caps.field_exists(f)}
    return {"do": "fields", "fields": {field.name: int(v) for field, v in there.items()}}


def memory_step(place: str, content: bytes, *, offset: int = 0, times: int = 1) -> Step:
    """The step that writes bytes at a label of the payload, again and again."""
    where = {"place": place, "offset": offset}
    return {"do": "memory", **where, "bytes": content.hex(), "times": times}


class Controls:
    """Draws controls of one program, with ``base`` for those that it does not change.

    ``host``: L2 may wait for its host. ``apic``: L1 has interrupts.
    """

    def __init__(
        self,
        chance: random.Random,
        caps: Capabilities,
        base: Mapping[Field, int],
        *,
        host: bool,
        apic: bool,
    ) -> None:
        self._chance, self._caps, self._base = chance, caps, base
        self._host, self._apic = host, apic

    def _flags(self, flags: tuple[Any, ...], likely: float) -> int:
        value = 0
        for flag in flags:
            if self._chance.random() < likely and self._caps.supports(flag):
                value |= flag.value
        return value

    def steps(self) -> Iterator[Step]:
        """Other controls, all legal; bitmaps and masks."""
        chance, base = self._chance, self._base
        fields: dict[Field, int] = {}
        proc = base[Field.CPU_BASED_VM_EXEC_CONTROL] | self._flags(_FREE_PROC, 0.35)
        proc |= self._flags(_RARE_PROC, 0.04)
        if chance.random() < (0.85 if self._host else 0.4):
            proc |= ProcCtl.USE_IO_BITMAPS.value & self._caps.may_be_one(ProcCtl)
            for place in ("io_bitmap_a", "io_bitmap_b"):
                yield memory_step(place, b"\xff", times=4096)
                if chance.random() < 0.1:
                    yield memory_step(place, b"\xfe", offset=chance.randrange(4096))
            if self._host:
                byte = 0xFF ^ 1 << PAUSE_PORT % 8
                yield memory_step("io_bitmap_a", bytes([byte]), offset=PAUSE_PORT // 8)
        if proc & ProcCtl.USE_MSR_BITMAPS:
            yield memory_step("msr_bitmap", bytes([chance.choice((0, 0, 0x55, 0xFF))]), times=4096)
        if Field.SECONDARY_VM_EXEC_CONTROL in base:
            proc |= ProcCtl.ACTIVATE_SECONDARY_CONTROLS.value
            second = base[Field.SECONDARY_VM_EXEC_CONTROL] | self._flags(_FREE_PROC2, 0.3)
            fields[Field.SECONDARY_VM_EXEC_CONTROL] = second
        fields[Field.CPU_BASED_VM_EXEC_CONTROL] = proc
        if self._apic or chance.random() < 0.1:
            pin = base[Field.PIN_BASED_VM_EXEC_CONTROL] | self._flags(_FREE_PIN, 0.6)
            fields[Field.PIN_BASED_VM_EXEC_CONTROL] = pin
            fields[Field.GUEST_RFLAGS] = chance.choice((2, 0x202))
        fields[Field.VM_EXIT_CONTROLS] = base[Field.VM_EXIT_CONTROLS] | self._flags(_FREE_EXIT, 0.3)
        entry = base[Field.VM_ENTRY_CONTROLS] | self._flags(_FREE_ENTRY, 0.3)
        fields[Field.VM_ENTRY_CONTROLS] = entry
        word = chance.getrandbits(32)
        bitmap_value = chance.choice((0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0, word))
        fields[Field.EXCEPTION_BITMAP] = bitmap_value
        if chance.random() < 0.2:
            fields[Field.PAGE_FAULT_ERROR_CODE_MASK] = chance.choice((0, 1, 2, 3, 0xFFFFFFFF))
            fields[Field.PAGE_FAULT_ERROR_CODE_MATCH] = chance.choice((0, 1, 2, 3))
        for register, bits in (("CR0", 32), ("CR4", 23)):
            if chance.random() < 0.5:
                mask = chance.getrandbits(bits) & chance.getrandbits(bits)
                mask = chance.choice((mask, mask, (1 << 64) - 1, 0))
                fields[Field[f"{register}_GUEST_HOST_MASK"]] = mask
                fields[Field[f"{register}_READ_SHADOW"]] = chance.getrandbits(bits)
        if self._caps.misc.cr3_targets and chance.random() < 0.2:
            fields[Field.CR3_TARGET_COUNT] = chance.randint(0, self._caps.misc.cr3_targets)
            fields[Field.CR3_TARGET_VALUE0] = base[Field.GUEST_CR3]
        yield fields_step(self._caps, fields)
