"""Checks on guest non-register state and on the PDPTEs."""

from __future__ import annotations

from collections.abc import Iterator

from kvmnest.vmx.controls import EntryCtl, PinCtl, Proc2Ctl
from kvmnest.vmx.fields import Field as F
from kvmnest.vmx.registers import (
    INTR_INFO_VALID,
    AccessRights,
    ActivityState,
    Cr0,
    Cr4,
    DebugCtl,
    Interruptibility,
    IntrType,
    PendingDebug,
    Rflags,
    Vector,
)
from kvmnest.vmx.rules.model import Entry, Rule, Section, Stage, Violation

_S = Section(Stage.GUEST, "Checks on Guest Non-Register State")
_PDPTE = Section(Stage.GUEST, "Checks on Guest Page-Directory-Pointer-Table Entries")

_STATE, _BLOCK = F.GUEST_ACTIVITY_STATE, F.GUEST_INTERRUPTIBILITY_INFO
_EVENT, _PENDING = F.VM_ENTRY_INTR_INFO_FIELD, F.GUEST_PENDING_DBG_EXCEPTIONS

_STI, _MOV_SS = Interruptibility.STI.value, Interruptibility.MOV_SS.value

QUALIFICATION_PDPTE = 2
QUALIFICATION_NMI = 3
QUALIFICATION_LINK_POINTER = 4

NO_LINK = 0xFFFF_FFFF_FFFF_FFFF
"""The VMCS link pointer that points nowhere."""


def _event(e: Entry) -> tuple[int, int] | None:
    """(type, vector) of the event to inject, None without one."""
    info = e[_EVENT]
    return (info >> 8 & 7, info & 0xFF) if info & INTR_INFO_VALID else None


def activity_state(e: Entry) -> Iterator[Violation]:
    """The activity state is supported and fits SS, the blocking bits and the event."""
    state, blocking = e[_STATE], e[_BLOCK]
    names = {s.value for s in e.caps.misc.activity_states}
    if state not in names:
        yield _S.broken(f"activity state {state} is not supported", _STATE)
    if state == ActivityState.HLT and AccessRights.decode(e[F.GUEST_SS_ACCESS_RIGHTS]).dpl:
        yield _S.broken("the HLT state needs DPL 0 in SS", _STATE, F.GUEST_SS_ACCESS_RIGHTS)
    if state != ActivityState.ACTIVE and blocking & (_STI | _MOV_SS):
        yield _S.broken("blocking by STI or MOV SS needs the active state", _STATE, _BLOCK)
    if state == ActivityState.WAIT_FOR_SIPI and e.has(EntryCtl.ENTRY_TO_SMM):
        yield _S.broken("no entry to SMM in the wait-for-SIPI state", _STATE)
    event = _event(e)
    if event is not None and not _event_allowed(state, *event):
        yield _S.broken("the event cannot be injected in this activity state", _STATE, _EVENT)


def _event_allowed(state: int, kind: int, vector: int) -> bool:
    if state == ActivityState.HLT:
        return (
            kind in (IntrType.EXTERNAL_INTERRUPT, IntrType.NMI)
            or (kind == IntrType.HARDWARE_EXCEPTION and vector in (Vector.DB, Vector.MC))
            or (kind == IntrType.OTHER_EVENT and vector == 0)
        )
    if state == ActivityState.SHUTDOWN:
        return kind == IntrType.NMI or (kind == IntrType.HARDWARE_EXCEPTION and vector == Vector.MC)
    return state != ActivityState.WAIT_FOR_SIPI


def interruptibility(e: Entry) -> Iterator[Violation]:
    """The interruptibility state by itself."""
    blocking = e[_BLOCK]
    if blocking >> 5:
        yield _S.broken("bits 31:5 of the interruptibility state must be 0", _BLOCK)
    if blocking & _STI and blocking & _MOV_SS:
        yield _S.broken("blocking by STI and by MOV SS exclude each other", _BLOCK)
    if blocking & _STI and not e[F.GUEST_RFLAGS] & Rflags.IF.value:
        yield _S.broken("blocking by STI needs RFLAGS.IF", _BLOCK, F.GUEST_RFLAGS)
    smi = bool(blocking & Interruptibility.SMI.value)
    if smi and not e.has(EntryCtl.ENTRY_TO_SMM):
        yield _S.broken("blocking by SMI must be 0 outside SMM", _BLOCK)
    if blocking & Interruptibility.ENCLAVE.value:
        if blocking & _MOV_SS:
            yield _S.broken(
                "enclave interruption and blocking by MOV SS exclude each other", _BLOCK
            )
        if not e.caps.cpu.sgx:
            yield _S.broken("enclave interruption needs SGX", _BLOCK)


def interruptibility_and_event(e: Entry) -> Iterator[Violation]:
    """An injected interrupt or NMI must not be blocked."""
    event = _event(e)
    if event is None:
        return
    blocking, kind = e[_BLOCK], event[0]
    if kind == IntrType.EXTERNAL_INTERRUPT and blocking & (_STI | _MOV_SS):
        yield _S.broken(
            "an external interrupt cannot be injected under blocking by STI or MOV SS",
            _BLOCK,
            _EVENT,
        )
    if kind != IntrType.NMI:
        return
    if blocking & _MOV_SS:
        yield _S.broken("an NMI cannot be injected under blocking by MOV SS", _BLOCK, _EVENT)
    if blocking & _STI:
        # Processors differ: the SDM lets an NMI be injected under blocking by STI or not.
        yield _S.broken(
            "an NMI may be refused under blocking by STI",
            _BLOCK,
            _EVENT,
            qualification=QUALIFICATION_NMI,
            optional=True,
        )
    if blocking & Interruptibility.NMI.value and e.has(PinCtl.VIRTUAL_NMIS):
        yield _S.broken(
            "an NMI cannot be injected under blocking by NMI with virtual NMIs", _BLOCK, _EVENT
        )


def pending_debug(e: Entry) -> Iterator[Violation]:
    """Pending debug exceptions: reserved bits, single step, RTM."""
    pending = e[_PENDING]
    known = sum(flag.value for flag in PendingDebug)
    if not e.caps.cpu.bus_lock_trap:
        known &= ~PendingDebug.BLD.value
    if pending & ~known:
        yield _S.broken("reserved bits of pending debug exceptions must be 0", _PENDING)
    single = bool(pending & PendingDebug.BS.value)
    if e[_BLOCK] & (_STI | _MOV_SS) or e[_STATE] == ActivityState.HLT:
        step = bool(e[F.GUEST_RFLAGS] & Rflags.TF.value) and not (
            e[F.GUEST_IA32_DEBUGCTL] & DebugCtl.BTF.value
        )
        if step != single:
            yield _S.broken(
                f"BS of pending debug exceptions must be {int(step)}"
                " (RFLAGS.TF with IA32_DEBUGCTL.BTF 0)",
                _PENDING,
                F.GUEST_RFLAGS,
                F.GUEST_IA32_DEBUGCTL,
            )
    if pending & PendingDebug.RTM.value:
        yield from _pending_rtm(e, pending)


def _pending_rtm(e: Entry, pending: int) -> Iterator[Violation]:
    if pending & ~(PendingDebug.RTM.value | PendingDebug.ENABLED_BREAKPOINT.value):
        yield _S.broken("RTM of pending debug exceptions excludes all bits but bit 12", _PENDING)
    if not pending & PendingDebug.ENABLED_BREAKPOINT.value:
        yield _S.broken("RTM of pending debug exceptions needs bit 12", _PENDING)
    if not e.caps.cpu.rtm:
        yield _S.broken("RTM of pending debug exceptions needs a processor with RTM", _PENDING)
    if e[_BLOCK] & _MOV_SS:
        yield _S.broken("RTM of pending debug exceptions excludes blocking by MOV SS", _PENDING)


def link_pointer(e: Entry) -> Iterator[Violation]:
    """The VMCS link pointer is all ones or leads to a (shadow) VMCS."""
    pointer = e[F.VMCS_LINK_POINTER]
    if pointer == NO_LINK:
        return
    shadow = e.has(Proc2Ctl.VMCS_SHADOWING)

    def broken(text: str, *more: F) -> Violation:
        return _S.broken(text, F.VMCS_LINK_POINTER, *more, qualification=QUALIFICATION_LINK_POINTER)

    if pointer & 0xFFF:
        yield broken("the VMCS link pointer must be aligned to 4096 bytes")
    if e.beyond_width(pointer):
        yield broken("the VMCS link pointer must not exceed the physical-address width")
    if pointer == e.context.current_vmcs:
        yield broken("the VMCS link pointer must not be the current VMCS")
    if e.memory is None or pointer & 0xFFF or e.beyond_width(pointer):
        return
    # Memory that does not exist reads as all ones, like the processor's access to it.
    word = int.from_bytes(e.memory(pointer, 4) or b"\xff\xff\xff\xff", "little")
    if word & 0x7FFFFFFF != e.caps.basic.revision_id:
        yield broken("the VMCS link pointer must lead to the VMCS revision identifier")
    if bool(word >> 31) != shadow:
        yield broken(
            f"the VMCS link pointer must lead to {'a shadow' if shadow else 'an ordinary'} VMCS",
            F.SECONDARY_VM_EXEC_CONTROL,
        )


def pdptes(e: Entry) -> Iterator[Violation]:
    """With PAE paging the four PDPTEs have no reserved bits set."""
    if e.ia32e or not e[F.GUEST_CR0] & Cr0.PG.value or not e[F.GUEST_CR4] & Cr4.PAE.value:
        return
    reserved = 0x1E6 | ~((1 << e.caps.cpu.physical_bits) - 1)
    fields = (F.GUEST_PDPTR0, F.GUEST_PDPTR1, F.GUEST_PDPTR2, F.GUEST_PDPTR3)
    if e.has(Proc2Ctl.ENABLE_EPT):
        values = [e[field] for field in fields]
    else:
        # Without EPT the table that CR3 points to is read (32-byte aligned, below 4 GiB).
        table = e.memory(e[F.GUEST_CR3] & 0xFFFFFFE0, 32) if e.memory else None
        if table is None or not e.context.pae_reload:
            return
        values = [int.from_bytes(table[i : i + 8], "little") for i in range(0, 32, 8)]
        fields = (F.GUEST_CR3,) * 4
    for number, (value, field) in enumerate(zip(values, fields, strict=True)):
        if value & 1 and value & reserved:
            yield _PDPTE.broken(
                f"PDPTE {number} must not set reserved bits",
                field,
                qualification=QUALIFICATION_PDPTE,
            )


RULES: tuple[Rule, ...] = (
    activity_state,
    interruptibility,
    interruptibility_and_event,
    pending_debug,
    link_pointer,
    pdptes,
)
