"""IDT-vectoring information: the event that was on its way to L2's handler at the exit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from kvmnest.l1 import L1, L2Mode, code
from kvmnest.suite.support.apic import Apic, send_in_l2, send_nmi_in_l2
from kvmnest.suite.support.bitmaps import set_msr_bitmap
from kvmnest.suite.support.ept import W, qualification, with_linear_rights
from kvmnest.suite.support.guest import NOT_VALID, Guest, Masked, copied_idt
from kvmnest.vmx import (
    ExitReason,
    Field,
    IntrType,
    Proc2Ctl,
    ProcCtl,
    Vector,
    intr_info,
)
from kvmnest.vmx.outcome import Exit, Fault, Outcome, Succeed

pytestmark = [
    pytest.mark.series(22),
    pytest.mark.sdm("Information for VM Exits That Occur During Event Delivery"),
]

HARDWARE = IntrType.HARDWARE_EXCEPTION
NONCANONICAL = 0x8000000000000000
UNMAPPED = 0x50001000
READ = b"\x8a\x07"  # MOV AL, [RDI]
LOAD_DS = b"\x8e\xd8"  # MOV DS, EAX


@dataclass(frozen=True)
class Event:
    """Something that L2 does at ``at`` and that is delivered through the IDT.

    ``returns``: offset to which the handler would return. ``length``: of software events.
    """

    code: bytes
    vector: int
    type: IntrType = HARDWARE
    error: int | None = None
    at: int = 0
    returns: int = 0
    length: int | None = None
    regs: Callable[[], dict[str, int]] = dict
    flags: int = 0x2

    @property
    def info(self) -> int:
        """The interruption information of this event."""
        return intr_info(self.vector, self.type, self.error is not None)


EVENTS = {
    "INT-n": Event(code.int_n(0x42), 0x42, IntrType.SOFTWARE_INTERRUPT, returns=2, length=2),
    "INT3": Event(code.NOP + code.INT3, 3, IntrType.SOFTWARE_EXCEPTION, at=1, returns=2, length=1),
    "INT1": Event(code.INT1, 1, IntrType.PRIVILEGED_SOFTWARE_EXCEPTION, returns=1, length=1),
    "UD": Event(code.UD2, Vector.UD),
    "DE": Event(b"\xf7\xf1", Vector.DE, regs=lambda: {"rcx": 0, "rdx": 0}),
    "GP": Event(READ, Vector.GP, error=0, regs=lambda: {"rdi": NONCANONICAL}),
    "GP-selector": Event(LOAD_DS, Vector.GP, error=0x1238, regs=lambda: {"rax": 0x1238}),
    "PF": Event(READ, Vector.PF, error=0, regs=lambda: {"rdi": UNMAPPED}),
    "interrupt": Event(code.WRMSR + code.NOP, 0x51, IntrType.EXTERNAL_INTERRUPT, at=2, returns=2,
                       regs=lambda: send_in_l2(0x51), flags=0x202),
    "NMI": Event(code.WRMSR + code.NOP, Vector.NMI, IntrType.NMI, at=2, returns=2,
                 regs=send_nmi_in_l2),
}  # fmt: skip
ALL = pytest.mark.parametrize("name", EVENTS)


def _guest(l1: L1) -> Guest:
    Apic(l1)
    guest = Guest(l1, ProcCtl.USE_MSR_BITMAPS)
    set_msr_bitmap(l1)
    return guest


def _ept_entry(l1: L1, page: int) -> int:
    return l1.sym("ept_pml4_pt") + page // 4096 * 8


def _set_ept(l1: L1, page: int, bits: int) -> None:
    """Map a page of L2 with these permissions and forget the old translation."""
    l1.write_int(_ept_entry(l1, page), page | bits)
    assert l1.invept(2) == Succeed()


def _run(guest: Guest, event: Event, **fields: int) -> Outcome:
    regs = {"cr2": 0x1111, **event.regs()}
    return guest.run(event.code, regs, GUEST_RFLAGS=event.flags, **fields)


def _stack(l1: L1) -> int:
    """A page of its own for L2's stack."""
    return l1.alloc()


def _vectoring(event: Event) -> dict[str, Any]:
    more: dict[str, Any] = {} if event.error is None else {"idt_error": event.error}
    if event.length is not None:
        more["length"] = event.length
    return {"idt_info": event.info, **more}


@ALL
@pytest.mark.needs(Proc2Ctl.ENABLE_EPT)
def test_ept_violation_on_the_stack(l1: L1, name: str) -> None:
    """The push of the frame causes an EPT violation; L1 repairs it, re-injects, and all is well."""
    event, guest = EVENTS[name], _guest(l1)
    stack = _stack(l1)
    _set_ept(l1, stack, 0)
    seen = _run(guest, event, GUEST_RSP=stack + 0x800)
    assert seen == Exit(
        ExitReason.EPT_VIOLATION,
        qualification=with_linear_rights(l1, qualification(W, 0)),
        rip=guest.at(event.at),
        intr_info=NOT_VALID,
        linear=stack + 0x800 - 8,
        physical=stack + 0x800 - 8,
        **_vectoring(event),
    )
    assert guest.vmcs.read(Field.GUEST_RSP) == (stack + 0x800,)
    if event.vector == Vector.PF:
        assert seen.cr2 == UNMAPPED
    _set_ept(l1, stack, 0x37)
    vmcs = guest.vmcs
    vmcs[Field.VM_ENTRY_INTR_INFO_FIELD] = seen.idt_info
    vmcs[Field.VM_ENTRY_EXCEPTION_ERROR_CODE] = event.error or 0
    vmcs[Field.VM_ENTRY_INSTRUCTION_LEN] = event.length or 0
    # The delivery of an NMI had set blocking by NMI, which an injected NMI must not find.
    vmcs[Field.GUEST_INTERRUPTIBILITY_INFO] = 0
    regs = {**guest.loaded, "cr2": seen.cr2}
    seen = guest.go_on(regs)
    assert seen == Fault(event.vector, error_code=event.error or 0, rip=event.returns)
    assert vmcs.read(Field.IDT_VECTORING_INFO_FIELD)[0] >> 31 == 0


@ALL
def test_page_fault_on_the_stack(l1: L1, name: str) -> None:
    """The push faults on L2's own page tables: L1 intercepts #PF and is told what was delivered."""
    event, guest = EVENTS[name], _guest(l1)
    if event.vector == Vector.PF:
        # A page fault on the delivery of a page fault is a double fault.
        seen = _run(guest, event, GUEST_RSP=UNMAPPED, EXCEPTION_BITMAP=1 << Vector.DF)
        assert seen == Exit(
            ExitReason.EXCEPTION_NMI,
            qualification=0,
            intr_info=intr_info(Vector.DF, HARDWARE, True),
            intr_error=0,
            idt_info=NOT_VALID,
        )
        return
    seen = _run(guest, event, GUEST_RSP=UNMAPPED, EXCEPTION_BITMAP=1 << Vector.PF)
    assert seen == Exit(
        ExitReason.EXCEPTION_NMI,
        qualification=UNMAPPED - 8,
        rip=guest.at(event.at),
        intr_info=intr_info(Vector.PF, HARDWARE, True),
        intr_error=2,
        **_vectoring(event),
    )
    assert seen.cr2 == 0x1111


@pytest.mark.needs(Proc2Ctl.ENABLE_EPT)
@pytest.mark.parametrize("name", ["INT-n", "UD", "GP-selector"])
def test_ept_violation_on_the_idt(l1: L1, name: str) -> None:
    """The read of the gate causes an EPT violation."""
    event, guest = EVENTS[name], _guest(l1)
    idt = copied_idt(l1)
    _set_ept(l1, idt, 0)
    seen = _run(guest, event, GUEST_IDTR_BASE=idt)
    assert (seen.reason, seen.rip) == (ExitReason.EPT_VIOLATION, guest.at(event.at))
    # A read where nothing is allowed, linear address valid, final access.
    assert seen.qualification == with_linear_rights(l1, Masked(0x181, 0x18F))
    assert (seen.linear & ~7, seen.physical & ~7) == ((idt + 16 * event.vector),) * 2
    assert (seen.idt_info, seen.intr_info >> 31) == (event.info, 0)
    _set_ept(l1, idt, 0x37)
    # RIP is the instruction's own: L2 may simply repeat it.
    assert guest.go_on() == Fault(event.vector, error_code=event.error or 0, rip=event.returns)


@pytest.mark.needs(Proc2Ctl.ENABLE_EPT)
@pytest.mark.parametrize(
    ("vector", "kind", "error", "length"),
    [
        pytest.param(0x30, IntrType.EXTERNAL_INTERRUPT, None, 0, id="interrupt"),
        pytest.param(Vector.NMI, IntrType.NMI, None, 0, id="NMI"),
        pytest.param(Vector.SS, HARDWARE, 0x1234, 0, id="exception"),
        pytest.param(0x80, IntrType.SOFTWARE_INTERRUPT, None, 5, id="INT-n"),
        pytest.param(Vector.OF, IntrType.SOFTWARE_EXCEPTION, None, 3, id="INTO"),
    ],
)
def test_injected_event_in_flight(
    l1: L1, vector: int, kind: IntrType, error: int | None, length: int
) -> None:
    """An exit in the delivery of an injected event reports that event as it was injected."""
    guest = _guest(l1)
    stack = _stack(l1)
    _set_ept(l1, stack, 0)
    info = intr_info(vector, kind, error is not None)
    seen = guest.run(
        code.NOP * 8,
        GUEST_RSP=stack + 0x100,
        GUEST_RFLAGS=0x202,
        VM_ENTRY_INTR_INFO_FIELD=info,
        VM_ENTRY_EXCEPTION_ERROR_CODE=error or 0,
        VM_ENTRY_INSTRUCTION_LEN=length,
    )
    expected = Exit(
        ExitReason.EPT_VIOLATION,
        qualification=with_linear_rights(l1, qualification(W, 0)),
        rip=guest.at(),
        intr_info=NOT_VALID,
        idt_info=info,
        linear=stack + 0x100 - 8,
        physical=stack + 0x100 - 8,
    )
    assert seen == expected
    if error is not None:
        assert seen.idt_error == error
    if length:
        assert seen.length == length
    assert guest.vmcs.read(Field.VM_ENTRY_INTR_INFO_FIELD)[0] >> 31 == 0
    _set_ept(l1, stack, 0x37)
    guest.vmcs[Field.VM_ENTRY_INTR_INFO_FIELD] = seen.idt_info
    guest.vmcs[Field.GUEST_INTERRUPTIBILITY_INFO] = 0
    assert guest.go_on() == Fault(vector, error_code=error or 0, rip=length)


def _broken_idt(l1: L1, *vectors: int) -> int:
    """An IDT in which these gates are not present."""
    return copied_idt(l1, dict.fromkeys(vectors, 0x0E))


@pytest.mark.sdm("Interrupt 8—Double Fault Exception (#DF)")
@pytest.mark.parametrize("bitmap", [0, 1 << Vector.DF], ids=["L2-handles", "L1-intercepts"])
def test_double_fault_conditions(l1: L1, bitmap: int) -> None:
    """Benign first: the second is delivered. Contributory twice, or behind #PF: #DF."""
    guest = _guest(l1)
    for name, second in (
        ("UD", Vector.NP), ("INT-n", Vector.NP), ("INT3", Vector.NP), ("NMI", Vector.NP),
        ("interrupt", Vector.NP), ("DE", Vector.DF), ("GP", Vector.DF),
        ("GP-selector", Vector.DF), ("PF", Vector.DF),
    ):  # fmt: skip
        event = EVENTS[name]
        idt = _broken_idt(l1, event.vector)
        seen = _run(guest, event, GUEST_IDTR_BASE=idt, EXCEPTION_BITMAP=bitmap)
        if second == Vector.NP:
            software = event.length is not None
            error = event.vector << 3 | 2 | (0 if software else 1)
            assert seen == Fault(Vector.NP, error_code=error, rip=event.at), name
        elif bitmap:
            assert seen == Exit(
                ExitReason.EXCEPTION_NMI,
                qualification=0,
                intr_info=intr_info(Vector.DF, HARDWARE, True),
                intr_error=0,
                idt_info=NOT_VALID,
            ), name
        else:
            assert (seen.vector, seen.error_code) == (Vector.DF, 0), name
        if name == "interrupt":
            assert l1.wrmsr(0x80B, 0) == Succeed()


@pytest.mark.sdm("Interrupt 8—Double Fault Exception (#DF)")
def test_double_fault_by_an_injected_event(l1: L1) -> None:
    """An injected exception counts as the first of a double fault, an interrupt is benign."""
    guest = _guest(l1)
    for vector, kind, error, second in (
        (Vector.GP, HARDWARE, True, Vector.DF),
        (Vector.PF, HARDWARE, True, Vector.DF),
        (Vector.DE, HARDWARE, False, Vector.DF),
        (Vector.UD, HARDWARE, False, Vector.NP),
        (Vector.NMI, IntrType.NMI, False, Vector.NP),
        (0x30, IntrType.EXTERNAL_INTERRUPT, False, Vector.NP),
    ):
        info = intr_info(vector, kind, error)
        idt = _broken_idt(l1, vector)
        seen = guest.run(
            code.NOP,
            GUEST_RFLAGS=0x202,
            GUEST_IDTR_BASE=idt,
            VM_ENTRY_INTR_INFO_FIELD=info,
            VM_ENTRY_EXCEPTION_ERROR_CODE=0,
        )
        assert isinstance(seen, Fault), vector
        code_of_np = vector << 3 | 2 | 1
        assert (seen.vector, seen.error_code) == (
            second,
            0 if second == Vector.DF else code_of_np,
        ), vector


@pytest.mark.sdm("Other Causes of VM Exits")
def test_triple_fault(l1: L1) -> None:
    """A fault on the delivery of #DF exits as triple fault, with no event in flight."""
    guest = _guest(l1)
    idt = _broken_idt(l1, Vector.GP, Vector.DF)
    expected = Exit(
        ExitReason.TRIPLE_FAULT, qualification=0, intr_info=NOT_VALID, idt_info=NOT_VALID
    )
    for bitmap in (0, 1 << Vector.GP):
        seen = _run(guest, EVENTS["GP"], GUEST_IDTR_BASE=idt, EXCEPTION_BITMAP=bitmap)
        if bitmap:
            assert seen == guest.exception(Vector.GP, 0)
        else:
            assert seen == expected
    # The same for an injected one.
    seen = guest.run(
        code.NOP,
        EXCEPTION_BITMAP=0,
        VM_ENTRY_INTR_INFO_FIELD=intr_info(Vector.DF, HARDWARE, True),
        VM_ENTRY_EXCEPTION_ERROR_CODE=0,
    )
    assert seen == expected
    guest.vmcs[Field.GUEST_IDTR_BASE] = l1.sym("l2_idt")
    assert guest.run(code.NOP) == Succeed()


def test_intercepted_fault_in_delivery(l1: L1) -> None:
    """#NP at a gate that is not present exits with the event whose gate it was."""
    guest = _guest(l1)
    for name in ("INT-n", "UD", "NMI", "INT3"):
        event = EVENTS[name]
        idt = _broken_idt(l1, event.vector)
        seen = _run(guest, event, GUEST_IDTR_BASE=idt, EXCEPTION_BITMAP=1 << Vector.NP)
        external = 0 if event.length is not None else 1
        assert seen == Exit(
            ExitReason.EXCEPTION_NMI,
            qualification=0,
            rip=guest.at(event.at),
            intr_info=intr_info(Vector.NP, HARDWARE, True),
            intr_error=event.vector << 3 | 2 | external,
            **_vectoring(event),
        ), name


@pytest.mark.sdm("Task Switches")
@pytest.mark.parametrize("name", ["INT-n", "INT3", "UD", "DE"])
def test_task_gate(l1: L1, name: str) -> None:
    """A task gate in the IDT exits with reason 9, source 3, and the event in flight."""
    event = EVENTS[name]
    guest = Guest(l1, mode=L2Mode.PROTECTED)
    idt = l1.alloc()
    l1.write(idt, l1.read(l1.sym("l2_idt32"), 2048))
    selector = l1.sym("SEL_TSS0")
    # A 32-bit TSS that is available, in a copy of the descriptor table.
    table = l1.alloc()
    base = guest.vmcs[Field.GUEST_GDTR_BASE]
    l1.write(table, l1.read(base, guest.vmcs[Field.GUEST_GDTR_LIMIT] + 1))
    l1.write_int(table + selector + 5, 0x89, 1)
    l1.write_int(idt + 8 * event.vector, 0x0000850000000000 | selector << 16)
    seen = _run(guest, event, GUEST_IDTR_BASE=idt, GUEST_GDTR_BASE=table)
    assert seen == Exit(
        ExitReason.TASK_SWITCH,
        qualification=selector | 3 << 30,
        rip=guest.at(event.at),
        intr_info=NOT_VALID,
        **_vectoring(event),
    )


def test_no_event_in_flight(l1: L1) -> None:
    """Exits of L2's handlers and exits by the event itself have no IDT-vectoring information."""
    guest = _guest(l1)
    for name, event in EVENTS.items():
        seen = _run(guest, event)
        assert seen == Fault(event.vector, error_code=event.error or 0, rip=event.returns), name
        assert guest.vmcs.read(Field.IDT_VECTORING_INFO_FIELD)[0] >> 31 == 0, name
        if name == "interrupt":
            assert l1.wrmsr(0x80B, 0) == Succeed()


@pytest.mark.sdm("VM-Entry Controls for Event Injection")
@pytest.mark.parametrize("name", ["INT-n", "INT3", "UD", "GP-selector", "interrupt", "NMI"])
def test_entry_fields_are_left_alone(l1: L1, name: str) -> None:
    """An exit in an event's delivery does not touch the fields for the event to inject."""
    event, guest = EVENTS[name], _guest(l1)
    fields = {Field.VM_ENTRY_EXCEPTION_ERROR_CODE: 0x1234, Field.VM_ENTRY_INSTRUCTION_LEN: 15}
    guest.vmcs.update(fields)
    seen = _run(guest, event, GUEST_RSP=UNMAPPED, EXCEPTION_BITMAP=1 << Vector.PF)
    assert seen == Exit(ExitReason.EXCEPTION_NMI, idt_info=event.info)
    assert dict(zip(fields, guest.vmcs.read(*fields), strict=True)) == fields
