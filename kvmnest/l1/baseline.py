"""The baseline VMCS: the smallest legal one, computed from the capability MSRs.

A case states only its difference from it. SDM: "VM-Entry Checks and Loading of Guest State",
"Checks on Host Control Registers, MSRs, and SSP" and the neighbouring sections.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from kvmnest.errors import HarnessError
from kvmnest.l1.payload import Payload
from kvmnest.vmx import (
    Capabilities,
    Cr0,
    Cr4,
    Efer,
    EntryCtl,
    ExitCtl,
    Field,
    PinCtl,
    Proc2Ctl,
    ProcCtl,
)
from kvmnest.vmx.registers import PAT_RESET


class L2Mode(enum.Enum):
    """Mode in which L2 starts."""

    LONG = "64-bit"
    PROTECTED = "32-bit, 4 MiB pages"
    PAE = "32-bit, PAE paging"
    UNPAGED = "32-bit, no paging"
    REAL = "real"


#: Access rights of an unusable segment.
UNUSABLE = 0x10000

#: Access rights of CS.
CODE_RIGHTS = {
    L2Mode.LONG: 0xA09B,
    L2Mode.PROTECTED: 0xC09B,
    L2Mode.PAE: 0xC09B,
    L2Mode.UNPAGED: 0xC09B,
    L2Mode.REAL: 0x9B,
}
#: Modes in which PE or PG of CR0 is 0.
_UNRESTRICTED = (L2Mode.REAL, L2Mode.UNPAGED)
#: RSP in real mode, from the base of SS.
_REAL_STACK = 0x1000


_PAGED = Cr0.PE | Cr0.MP | Cr0.ET | Cr0.NE | Cr0.WP | Cr0.PG
_FXSR = Cr4.OSFXSR | Cr4.OSXMMEXCPT


@dataclass(frozen=True, kw_only=True)
class _Start:
    """What differs between the modes; 32-bit unless it says otherwise.

    ``cs``, ``cr3``, ``rip`` and the base of ``idt`` are names of the payload, "" for 0.
    """

    cs: str = "SEL_CODE32"
    cr0: int = _PAGED
    cr3: str = ""
    cr4: int = _FXSR
    efer: int = 0
    idt: tuple[str, int] = ("l2_idt32", 0x7FF)
    rip: str = "l2_vmcall32"


_STARTS = {
    L2Mode.LONG: _Start(
        cs="SEL_CODE64",
        cr0=_PAGED,
        cr3="l2_pml4",
        cr4=_FXSR | Cr4.PAE,
        efer=Efer.LME | Efer.LMA | Efer.NXE,
        idt=("l2_idt", 0xFFF),
        rip="l2_vmcall",
    ),
    L2Mode.PROTECTED: _Start(cr3="l2_pd32", cr4=_FXSR | Cr4.PSE),
    L2Mode.PAE: _Start(cr3="l2_pae_pdpt", cr4=_FXSR | Cr4.PAE),
    L2Mode.UNPAGED: _Start(cr0=_PAGED & ~(Cr0.PG | Cr0.WP)),
    L2Mode.REAL: _Start(
        cs="", cr0=Cr0.ET | Cr0.NE, cr4=0, idt=("l2_ivt", 0x3FF), rip="l2_vmcall16"
    ),
}
#: EPTP bits: write-back tables, page walk of four levels.
EPTP_WB_4_LEVELS = 6 | 3 << 3


def baseline(
    caps: Capabilities,
    payload: Payload,
    *,
    mode: L2Mode = L2Mode.LONG,
    ept: bool | None = None,
    cpu: int = 0,
) -> dict[Field, int]:
    """Return the fields of the smallest legal VMCS.

    L2 starts at ``l2_vmcall`` (or its 32-bit or 16-bit twin). ``ept`` None means: use EPT where
    it is offered. ``cpu`` is the vCPU of L1 whose stack and TSS the host state names.

    Raises:
        HarnessError: the mode needs a control that the capability MSRs do not allow.
    """
    if ept is None:
        ept = caps.supports(Proc2Ctl.ENABLE_EPT)
    unrestricted = mode in _UNRESTRICTED
    if unrestricted and not ept:
        raise HarnessError(f"L2 in {mode.value} mode needs EPT and unrestricted guest")
    fields = _controls(caps, payload, mode, ept, unrestricted)
    fields |= _host(caps, payload, cpu)
    fields |= _guest(caps, payload, mode, ept)
    return {field: int(value) for field, value in fields.items() if caps.field_exists(field)}


_Key = tuple[tuple[tuple[int, int], ...], str, L2Mode, bool | None, int]
_cache: dict[_Key, dict[Field, int]] = {}


def cached_baseline(
    caps: Capabilities, payload: Payload, mode: L2Mode, ept: bool | None, cpu: int
) -> dict[Field, int]:
    """Return ``baseline``, computed once for the same capability MSRs and payload."""
    key = (tuple(caps.msrs.items()), payload.build_id, mode, ept, cpu)
    if key not in _cache:
        _cache[key] = baseline(caps, payload, mode=mode, ept=ept, cpu=cpu)
    return _cache[key]


def _controls(
    caps: Capabilities, payload: Payload, mode: L2Mode, ept: bool, unrestricted: bool
) -> dict[Field, int]:
    proc2 = Proc2Ctl(0)
    if ept:
        proc2 |= Proc2Ctl.ENABLE_EPT
    if unrestricted:
        proc2 |= Proc2Ctl.UNRESTRICTED_GUEST
    proc = ProcCtl.ACTIVATE_SECONDARY_CONTROLS if proc2 else ProcCtl(0)
    missing = caps.missing(*proc, *proc2)
    if missing:
        raise HarnessError("; ".join(missing))
    entry = EntryCtl.IA32E_MODE_GUEST if mode is L2Mode.LONG else EntryCtl(0)
    zero = (
        *(Field.EXCEPTION_BITMAP, Field.PAGE_FAULT_ERROR_CODE_MASK),
        *(Field.PAGE_FAULT_ERROR_CODE_MATCH, Field.CR3_TARGET_COUNT),
        *(Field.VM_EXIT_MSR_STORE_COUNT, Field.VM_EXIT_MSR_LOAD_COUNT),
        *(Field.VM_ENTRY_MSR_LOAD_COUNT, Field.VM_ENTRY_INTR_INFO_FIELD),
        *(Field.VM_ENTRY_EXCEPTION_ERROR_CODE, Field.VM_ENTRY_INSTRUCTION_LEN),
        *(Field.CR0_GUEST_HOST_MASK, Field.CR4_GUEST_HOST_MASK),
        *(Field.CR0_READ_SHADOW, Field.CR4_READ_SHADOW, Field.TSC_OFFSET),
    )
    fields = dict.fromkeys(zero, 0)
    fields |= {
        Field.PIN_BASED_VM_EXEC_CONTROL: caps.clamp(PinCtl(0)),
        Field.CPU_BASED_VM_EXEC_CONTROL: caps.clamp(proc),
        Field.VM_EXIT_CONTROLS: caps.clamp(ExitCtl.HOST_ADDRESS_SPACE_SIZE),
        Field.VM_ENTRY_CONTROLS: caps.clamp(entry),
    }
    if caps.supports(ProcCtl.ACTIVATE_SECONDARY_CONTROLS):
        fields[Field.SECONDARY_VM_EXEC_CONTROL] = caps.clamp(proc2)
    if ept:
        fields[Field.EPT_POINTER] = payload["ept_pml4"] | EPTP_WB_4_LEVELS
    return fields


def _host(caps: Capabilities, payload: Payload, cpu: int) -> dict[Field, int]:
    data, tss = payload["SEL_DATA"], f"tss{cpu}"
    return {
        Field.HOST_CR0: _cr0(caps, Cr0.PE | Cr0.MP | Cr0.ET | Cr0.NE | Cr0.WP | Cr0.PG),
        Field.HOST_CR3: payload["l1_pml4"],
        Field.HOST_CR4: _cr4(caps, Cr4.PAE | Cr4.OSFXSR | Cr4.OSXMMEXCPT),
        Field.HOST_CS_SELECTOR: payload["SEL_CODE64"],
        Field.HOST_SS_SELECTOR: data,
        Field.HOST_DS_SELECTOR: data,
        Field.HOST_ES_SELECTOR: data,
        Field.HOST_FS_SELECTOR: data,
        Field.HOST_GS_SELECTOR: data,
        Field.HOST_TR_SELECTOR: payload[f"SEL_TSS{cpu}"],
        Field.HOST_FS_BASE: 0,
        Field.HOST_GS_BASE: 0,
        Field.HOST_TR_BASE: payload[tss],
        Field.HOST_GDTR_BASE: payload["l1_gdt"],
        Field.HOST_IDTR_BASE: payload["l1_idt"],
        Field.HOST_IA32_SYSENTER_CS: 0,
        Field.HOST_IA32_SYSENTER_ESP: 0,
        Field.HOST_IA32_SYSENTER_EIP: 0,
        Field.HOST_IA32_EFER: Efer.LME | Efer.LMA | Efer.NXE,
        Field.HOST_IA32_PAT: PAT_RESET,
        Field.HOST_RSP: payload[f"cpu{cpu}_block"],
        Field.HOST_RIP: payload["vmexit_entry"],
    }


def _guest(caps: Capabilities, payload: Payload, mode: L2Mode, ept: bool) -> dict[Field, int]:
    start = _STARTS[mode]
    table, table_limit = start.idt
    return {
        Field.GUEST_CR0: _cr0(caps, start.cr0, unrestricted=mode in _UNRESTRICTED),
        Field.GUEST_CR3: payload[start.cr3] if start.cr3 else 0,
        Field.GUEST_CR4: _cr4(caps, start.cr4),
        Field.GUEST_DR7: 0x400,
        Field.GUEST_RFLAGS: 0x2,
        Field.GUEST_RIP: payload[start.rip],
        Field.GUEST_RSP: _REAL_STACK if mode is L2Mode.REAL else payload["l2_stack_top"],
        Field.GUEST_IA32_DEBUGCTL: 0,
        Field.GUEST_SYSENTER_CS: 0,
        Field.GUEST_SYSENTER_ESP: 0,
        Field.GUEST_SYSENTER_EIP: 0,
        Field.GUEST_IA32_PAT: PAT_RESET,
        Field.GUEST_IA32_EFER: start.efer,
        Field.GUEST_INTERRUPTIBILITY_INFO: 0,
        Field.GUEST_ACTIVITY_STATE: 0,
        Field.GUEST_PENDING_DBG_EXCEPTIONS: 0,
        Field.VMCS_LINK_POINTER: 0xFFFFFFFFFFFFFFFF,
        Field.GUEST_GDTR_BASE: payload["l1_gdt"],
        Field.GUEST_GDTR_LIMIT: payload["l1_gdt_end"] - payload["l1_gdt"] - 1,
        Field.GUEST_IDTR_BASE: payload[table],
        Field.GUEST_IDTR_LIMIT: table_limit,
        **_segments(payload, mode),
        **(_pdptes(payload) if mode is L2Mode.PAE and ept else {}),
    }


def _segments(payload: Payload, mode: L2Mode) -> dict[Field, int]:
    start, fields = _STARTS[mode], {}
    # In real mode a base is 16 times the selector, and a limit 64 KiB.
    real = mode is L2Mode.REAL
    limit = 0xFFFF if real else 0xFFFFFFFF
    data = (0 if real else payload["SEL_DATA"], 0, limit, 0x93 if real else 0xC093)
    stack = payload["l2_stack_top"] - _REAL_STACK
    segments = {
        **dict.fromkeys(("ES", "SS", "DS", "FS", "GS"), data),
        "CS": (payload[start.cs] if start.cs else 0, 0, limit, CODE_RIGHTS[mode]),
        "LDTR": (0, 0, 0, UNUSABLE),
        "TR": (payload["SEL_TSS_L2"], payload["l2_tss"], 0x67, 0x8B),
        **({"SS": (stack >> 4, stack, limit, 0x93)} if real else {}),
    }
    for name, values in segments.items():
        for part, value in zip(("SELECTOR", "BASE", "LIMIT", "ACCESS_RIGHTS"), values, strict=True):
            fields[Field[f"GUEST_{name}_{part}"]] = value
    return fields


def _pdptes(payload: Payload) -> dict[Field, int]:
    content = next(
        bytes_[payload["l2_pae_pdpt"] - address :][:32]
        for address, bytes_ in payload.segments
        if address <= payload["l2_pae_pdpt"] < address + len(bytes_)
    )
    return {
        Field[f"GUEST_PDPTR{number}"]: int.from_bytes(
            content[8 * number : 8 * number + 8], "little"
        )
        for number in range(4)
    }


def _cr0(caps: Capabilities, wanted: int, *, unrestricted: bool = False) -> int:
    """CR0 with the fixed bits; PE and PG are not fixed for an unrestricted guest."""
    must = caps.cr0_fixed0 & ~(Cr0.PE | Cr0.PG if unrestricted else 0)
    return (wanted | must) & caps.cr0_fixed1


def _cr4(caps: Capabilities, wanted: int) -> int:
    return (wanted | caps.cr4_fixed0) & caps.cr4_fixed1
