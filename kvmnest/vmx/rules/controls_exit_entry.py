"""Checks on the VM-exit and VM-entry control fields."""

from __future__ import annotations

from collections.abc import Iterator

from kvmnest.vmx.controls import EntryCtl, Exit2Ctl, ExitCtl, PinCtl, ProcCtl
from kvmnest.vmx.fields import Field as F
from kvmnest.vmx.registers import ERROR_CODE_VECTORS, IntrType, Vector
from kvmnest.vmx.rules.model import Entry, Rule, Section, Stage, Violation, reserved_controls

_EXIT = Section(Stage.CONTROL, "VM-Exit Control Fields")
_ENTRY = Section(Stage.CONTROL, "VM-Entry Control Fields")

_INFO = F.VM_ENTRY_INTR_INFO_FIELD
_INFO_RESERVED = 0x7FFFF000
"""Bits 30:12 of the VM-entry interruption information."""

_SOFTWARE = (
    IntrType.SOFTWARE_INTERRUPT,
    IntrType.PRIVILEGED_SOFTWARE_EXCEPTION,
    IntrType.SOFTWARE_EXCEPTION,
)


def exit_control_words(e: Entry) -> Iterator[Violation]:
    """The VM-exit controls against their capability MSRs."""
    yield from reserved_controls(e, _EXIT, F.VM_EXIT_CONTROLS, ExitCtl)
    if e.has(ExitCtl.ACTIVATE_SECONDARY_CONTROLS):
        yield from reserved_controls(e, _EXIT, F.SECONDARY_VM_EXIT_CONTROLS, Exit2Ctl)


def preemption_timer(e: Entry) -> Iterator[Violation]:
    """Saving the preemption timer needs the timer."""
    if e.has(ExitCtl.SAVE_PREEMPTION_TIMER) and not e.has(PinCtl.ACTIVATE_PREEMPTION_TIMER):
        yield _EXIT.broken(
            "SAVE_PREEMPTION_TIMER needs ACTIVATE_PREEMPTION_TIMER",
            F.VM_EXIT_CONTROLS,
            F.PIN_BASED_VM_EXEC_CONTROL,
        )


def _msr_area(e: Entry, section: Section, count: F, start: F, name: str) -> Iterator[Violation]:
    """An MSR area with entries: 16-byte aligned, wholly inside the physical-address width."""
    entries, first = e[count], e[start]
    if not entries:
        return
    if first & 0xF:
        yield section.broken(f"the {name} area must be aligned to 16 bytes", start)
    if e.beyond_width(first):
        yield section.broken(f"the {name} area must not exceed the physical-address width", start)
    elif e.beyond_width(first + 16 * entries - 1):
        yield section.broken(
            f"the last byte of the {name} area must not exceed the physical-address width",
            start,
            count,
        )


def exit_msr_areas(e: Entry) -> Iterator[Violation]:
    """VM-exit MSR-store and MSR-load areas."""
    yield from _msr_area(
        e, _EXIT, F.VM_EXIT_MSR_STORE_COUNT, F.VM_EXIT_MSR_STORE_ADDR, "VM-exit MSR-store"
    )
    yield from _msr_area(
        e, _EXIT, F.VM_EXIT_MSR_LOAD_COUNT, F.VM_EXIT_MSR_LOAD_ADDR, "VM-exit MSR-load"
    )


def entry_control_words(e: Entry) -> Iterator[Violation]:
    """The VM-entry controls against their capability MSR."""
    yield from reserved_controls(e, _ENTRY, F.VM_ENTRY_CONTROLS, EntryCtl)


def _event_type_and_vector(e: Entry, kind: int, vector: int) -> Iterator[Violation]:
    if kind == 1:
        yield _ENTRY.broken("interruption type 1 is reserved", _INFO)
    elif kind == IntrType.NMI and vector != Vector.NMI:
        yield _ENTRY.broken("an NMI must have vector 2", _INFO)
    elif kind == IntrType.HARDWARE_EXCEPTION and vector > 31:
        yield _ENTRY.broken("a hardware exception must have a vector of at most 31", _INFO)
    elif kind == IntrType.OTHER_EVENT:
        if not e.caps.supports(ProcCtl.MONITOR_TRAP_FLAG):
            yield _ENTRY.broken("interruption type 7 needs the monitor trap flag", _INFO)
        # With FRED, vectors 1 and 2 of this type stand for SYSCALL and SYSENTER.
        if vector > (2 if e.caps.supports(EntryCtl.LOAD_FRED) else 0):
            yield _ENTRY.broken("type 7 (other event) needs vector 0 (pending MTF)", _INFO)


def _event_error_code(e: Entry, kind: int, vector: int, delivered: bool) -> Iterator[Violation]:
    exception = kind == IntrType.HARDWARE_EXCEPTION
    optional = e.caps.basic.error_code_optional
    if delivered:
        if not exception:
            yield _ENTRY.broken("only a hardware exception delivers an error code", _INFO)
        elif not e.protected:
            yield _ENTRY.broken("no error code is delivered with CR0.PE 0", _INFO, F.GUEST_CR0)
        elif not optional and vector not in ERROR_CODE_VECTORS:
            yield _ENTRY.broken(f"vector {vector} has no error code", _INFO)
        if e[F.VM_ENTRY_EXCEPTION_ERROR_CODE] >> 16:
            yield _ENTRY.broken(
                "bits 31:16 of the error code must be 0", F.VM_ENTRY_EXCEPTION_ERROR_CODE
            )
    elif exception and e.protected and not optional and vector in ERROR_CODE_VECTORS:
        yield _ENTRY.broken(f"vector {vector} needs the deliver-error-code bit", _INFO)


def event_injection(e: Entry) -> Iterator[Violation]:
    """The VM-entry interruption information, error code and instruction length."""
    info = e[_INFO]
    if not info >> 31 & 1:
        return
    vector, kind, delivered = info & 0xFF, info >> 8 & 7, bool(info >> 11 & 1)
    yield from _event_type_and_vector(e, kind, vector)
    yield from _event_error_code(e, kind, vector, delivered)
    if info & _INFO_RESERVED:
        yield _ENTRY.broken("bits 30:12 of the interruption information must be 0", _INFO)
    if kind in _SOFTWARE:
        length = e[F.VM_ENTRY_INSTRUCTION_LEN]
        lowest = 0 if e.caps.misc.zero_length_injection else 1
        if not lowest <= length <= 15:
            yield _ENTRY.broken(
                f"the instruction length of a software event must be {lowest} to 15",
                F.VM_ENTRY_INSTRUCTION_LEN,
                _INFO,
            )


def entry_msr_area(e: Entry) -> Iterator[Violation]:
    """VM-entry MSR-load area."""
    yield from _msr_area(
        e, _ENTRY, F.VM_ENTRY_MSR_LOAD_COUNT, F.VM_ENTRY_MSR_LOAD_ADDR, "VM-entry MSR-load"
    )


def smm(e: Entry) -> Iterator[Violation]:
    """Outside SMM neither return to SMM nor deactivation of dual-monitor treatment."""
    for flag in (EntryCtl.ENTRY_TO_SMM, EntryCtl.DEACTIVATE_DUAL_MONITOR):
        if e.has(flag):
            yield _ENTRY.broken(f"{flag.name} is for VM entries inside SMM", F.VM_ENTRY_CONTROLS)


RULES: tuple[Rule, ...] = (
    exit_control_words,
    preemption_timer,
    exit_msr_areas,
    entry_control_words,
    event_injection,
    entry_msr_area,
    smm,
)
