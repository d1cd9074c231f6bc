"""Exceptions of L2: the exception bitmap decides between L1 and L2's own handler."""

from dataclasses import dataclass, field

import pytest

from kvmnest.l1 import L1, L2Mode, code
from kvmnest.suite.support.guest import NOT_VALID, Guest
from kvmnest.vmx import (
    Cr0,
    ExitReason,
    Field,
    IntrType,
    Rflags,
    Vector,
    intr_info,
)
from kvmnest.vmx.outcome import Exit, Fault, Outcome, Succeed

pytestmark = [pytest.mark.series(19), pytest.mark.sdm("Exception Bitmap")]

NONCANONICAL = 0x8000000000000000
UNMAPPED = 0x50001000
NOT_PRESENT = 0x80  # selector of a descriptor that the cases add
#: FNINIT; FLDCW [RDI] with the zero-divide exception unmasked; FLD1; FLDZ; FDIVP; FWAIT
X87_ERROR = b"\xdb\xe3\xd9\x2f\xd9\xe8\xd9\xee\xde\xf9\x9b"
#: LDMXCSR [RDI] with the zero-divide exception unmasked; XORPS XMM0, XMM0;
#: CVTSI2SS XMM1, ECX; DIVSS XMM1, XMM0
SSE_ERROR = b"\x0f\xae\x17\x0f\x57\xc0\xf3\x0f\x2a\xc9\xf3\x0f\x5e\xc8"


@dataclass(frozen=True)
class Raise:
    """Code of L2 that raises one exception.

    ``at`` is the offset of the instruction, ``returns`` the offset that L2's handler would
    return to. ``error`` None: no error code. ``length``: only software exceptions define it.
    """

    code: bytes
    error: int | None = None
    at: int = 0
    returns: int | None = None
    regs: dict[str, int] = field(default_factory=dict)
    operand: bytes = b""
    fields: dict[str, int] = field(default_factory=dict)
    qualification: int = 0
    type: IntrType = IntrType.HARDWARE_EXCEPTION
    length: int | None = None
    mode: L2Mode = L2Mode.LONG
    cpl: int = 0


_SOFTWARE = IntrType.SOFTWARE_EXCEPTION
_READ = b"\x8a\x07"  # MOV AL, [RDI]
EXCEPTIONS = {
    "DE": (Vector.DE, Raise(b"\xf7\xf1", regs={"rcx": 0, "rdx": 0})),
    "DB-single-step": (
        Vector.DB,
        Raise(code.NOP * 2, at=1, returns=1, fields={"GUEST_RFLAGS": 0x102}, qualification=0x4000),
    ),
    "DB-INT1": (
        Vector.DB,
        Raise(code.INT1, returns=1, type=IntrType.PRIVILEGED_SOFTWARE_EXCEPTION, length=1),
    ),
    "BP": (Vector.BP, Raise(code.INT3, returns=1, type=_SOFTWARE, length=1)),
    "BP-prefixed": (Vector.BP, Raise(b"\x66\xcc", returns=2, type=_SOFTWARE, length=2)),
    "OF": (
        Vector.OF,
        Raise(*(b"\xce",), returns=1, fields={"GUEST_RFLAGS": 0x2 | Rflags.OF}, type=_SOFTWARE,
              length=1, mode=L2Mode.PROTECTED),
    ),
    "BR": (
        Vector.BR,  # BOUND EAX, [EDI]
        Raise(b"\x62\x07", regs={"rax": 5}, operand=b"\0\0\0\0\4\0\0\0", mode=L2Mode.PROTECTED),
    ),
    "UD": (Vector.UD, Raise(code.UD2)),
    "NM": (Vector.NM, Raise(b"\xdb\xe3", fields={"GUEST_CR0": Cr0.TS})),
    "NP": (Vector.NP, Raise(b"\x8e\xd8", NOT_PRESENT, regs={"rax": NOT_PRESENT})),
    "SS": (Vector.SS, Raise(b"\x8a\x45\x00", 0, regs={"rbp": NONCANONICAL})),
    "GP": (Vector.GP, Raise(_READ, 0, regs={"rdi": NONCANONICAL})),
    "GP-selector": (Vector.GP, Raise(b"\x8e\xd8", 0x1238, regs={"rax": 0x1238})),
    "PF": (Vector.PF, Raise(_READ, 0, regs={"rdi": UNMAPPED}, qualification=UNMAPPED)),
    "MF": (Vector.MF, Raise(X87_ERROR, at=10, operand=b"\x7b\x03")),
    "AC": (
        Vector.AC,  # MOV EAX, [RDI+1]
        Raise(b"\x8b\x47\x01", 0, cpl=3,
              fields={"GUEST_CR0": Cr0.AM, "GUEST_RFLAGS": 0x2 | Rflags.AC}),
    ),
    "XM": (Vector.XM, Raise(SSE_ERROR, at=10, operand=b"\x80\x1d\0\0")),
}  # fmt: skip


def _prepare(l1: L1, case: Raise) -> Guest:
    guest = Guest(l1, mode=case.mode)
    if case.cpl:
        guest.set_cpl(case.cpl)
    # A copy of the descriptor table with a data segment that is not present.
    base, limit = guest.vmcs[Field.GUEST_GDTR_BASE], guest.vmcs[Field.GUEST_GDTR_LIMIT]
    table = l1.alloc()
    l1.write(table, l1.read(base, limit + 1))
    l1.write_int(table + NOT_PRESENT, 0x00CF13000000FFFF)
    guest.vmcs[Field.GUEST_GDTR_BASE] = table
    guest.vmcs[Field.GUEST_GDTR_LIMIT] = NOT_PRESENT + 7
    return guest


def _raise(guest: Guest, case: Raise, bitmap: int) -> Outcome:
    data = guest.l1.sym("l2_data")
    guest.l1.write(data, case.operand or bytes(8))
    fields = dict(case.fields)
    if "GUEST_CR0" in fields:
        fields["GUEST_CR0"] |= guest.vmcs.baseline[Field.GUEST_CR0]
    regs = {"rdi": data, "cr2": 0x1111, **case.regs}
    return guest.run(case.code, regs, EXCEPTION_BITMAP=bitmap, **fields)


@pytest.mark.parametrize("name", EXCEPTIONS)
def test_exception(l1: L1, name: str) -> None:
    """The bit of its vector, and no other, sends an exception to L1 instead of L2's handler."""
    vector, case = EXCEPTIONS[name]
    guest = _prepare(l1, case)
    in_l2 = Fault(
        vector, error_code=case.error or 0, rip=case.at if case.returns is None else case.returns
    )
    for bitmap in (0, 0xFFFFFFFF & ~(1 << vector)):
        seen = _raise(guest, case, bitmap)
        assert seen == in_l2, f"bitmap {bitmap:#x}"
        assert seen.cr2 == (case.qualification if vector is Vector.PF else 0x1111)
    more = {} if case.length is None else {"length": case.length}
    for bitmap in (1 << vector, 0xFFFFFFFF):
        seen = _raise(guest, case, bitmap)
        assert seen == guest.exception(
            vector,
            case.error,
            offset=case.at,
            type=case.type,
            qualification=case.qualification,
            **more,
        ), f"bitmap {bitmap:#x}"
        # The exception had no effect in L2: not even CR2 changed.
        assert seen.cr2 == 0x1111
        assert guest.vmcs.read(Field.GUEST_RSP) == (guest.vmcs.baseline[Field.GUEST_RSP],)


def test_software_interrupt_is_no_exception(l1: L1) -> None:
    """INT n never exits because of the exception bitmap, with the vector of an exception either."""
    guest = Guest(l1)
    for vector in (0x00, 0x01, 0x03, 0x04, 0x06, 0x20, 0xFF):
        seen = guest.run(code.int_n(vector), EXCEPTION_BITMAP=0xFFFFFFFF)
        assert seen == Fault(vector, error_code=0, rip=2), hex(vector)


def test_error_code_field_follows_the_exception(l1: L1) -> None:
    """The error code that L1 reads belongs to this exception, not to one before it."""
    guest = Guest(l1)
    for selector in (0x18 << 8, 0x4320, 0xFFF8):
        seen = guest.run(b"\x8e\xd8", {"rax": selector}, EXCEPTION_BITMAP=1 << Vector.GP)
        assert seen == guest.exception(Vector.GP, selector), hex(selector)
    seen = guest.run(_READ, {"rdi": NONCANONICAL}, EXCEPTION_BITMAP=1 << Vector.GP)
    assert seen == guest.exception(Vector.GP, 0)


# --- page faults ---

_SUPERVISOR, _READ_ONLY, _RESERVED, _NO_EXECUTE = 0x63, 0x65, 0x67 | 1 << 51, 0x67 | 1 << 63
#: Error code: (CPL, page-table entry, code); RDI is in the page.
PAGE_FAULTS = {
    0x00: (0, 0, _READ),
    0x02: (0, 0, b"\x88\x07"),  # MOV [RDI], AL
    0x03: (0, _READ_ONLY, b"\x88\x07"),
    0x04: (3, 0, _READ),
    0x05: (3, _SUPERVISOR, _READ),
    0x07: (3, _READ_ONLY, b"\x88\x07"),
    0x09: (0, _RESERVED, _READ),
    0x11: (0, _NO_EXECUTE, b"\xff\xe7"),  # JMP RDI
}


@pytest.mark.parametrize("error", PAGE_FAULTS, ids=lambda e: f"code-{e:#x}")
def test_page_fault_mask_and_match(l1: L1, error: int) -> None:
    """Bit 14 of the bitmap counts when error code AND mask equals the match, else its opposite."""
    guest = Guest(l1)
    cpl, entry, instruction = PAGE_FAULTS[error]
    page = l1.alloc()
    if entry:
        entry |= page
    l1.write_int(l1.sym("l2_pml4_pt") + page // 4096 * 8, entry)
    guest.set_cpl(cpl)
    where = page + 0x123
    fetch = bool(error & 0x10)
    for mask in (0, error, 0x1F, 0xFFFFFFFF, 0xFFFFFFE0):
        for match in (error & mask, (error & mask) ^ 1, error & mask | 1 << 31):
            for bit in (0, 1 << Vector.PF):
                text = f"mask {mask:#x} match {match:#x} bitmap {bit:#x}"
                seen = guest.run(
                    instruction,
                    {"rdi": where, "cr2": 0x1111},
                    EXCEPTION_BITMAP=bit,
                    PAGE_FAULT_ERROR_CODE_MASK=mask,
                    PAGE_FAULT_ERROR_CODE_MATCH=match,
                )
                rip = where - guest.start if fetch else 0
                if (error & mask == match) == bool(bit):
                    assert seen == guest.exception(
                        Vector.PF, error, offset=rip, qualification=where
                    ), text
                    assert seen.cr2 == 0x1111, text
                else:
                    assert seen == Fault(Vector.PF, error_code=error, rip=rip), text
                    assert seen.cr2 == where, text


def test_mask_and_match_are_for_page_faults_only(l1: L1) -> None:
    """The mask and match of page faults leave other exceptions alone."""
    guest = Guest(l1)
    for bitmap in (0, 1 << Vector.UD):
        seen = guest.run(
            code.UD2,
            EXCEPTION_BITMAP=bitmap,
            PAGE_FAULT_ERROR_CODE_MASK=0,
            PAGE_FAULT_ERROR_CODE_MATCH=1,
        )
        expected: Outcome = Fault(Vector.UD, error_code=0, rip=0)
        assert seen == (guest.exception(Vector.UD) if bitmap else expected)


# --- faults while another is delivered ---


def test_double_fault(l1: L1) -> None:
    """#DF is L2's own, or with its bit L1's with error code 0 and no IDT vectoring."""
    guest = Guest(l1)
    # #GP cannot be delivered (its gate is beyond the limit), and #DF can.
    limit = 16 * Vector.DF + 15
    regs = {"rdi": NONCANONICAL}
    seen = guest.run(_READ, regs, GUEST_IDTR_LIMIT=limit, EXCEPTION_BITMAP=0)
    assert seen == Fault(Vector.DF, error_code=0)
    seen = guest.run(_READ, regs, EXCEPTION_BITMAP=1 << Vector.DF)
    assert seen == Exit(
        ExitReason.EXCEPTION_NMI,
        qualification=0,
        intr_info=intr_info(Vector.DF, IntrType.HARDWARE_EXCEPTION, True),
        intr_error=0,
        idt_info=NOT_VALID,
    )


def test_nested_exception_is_intercepted(l1: L1) -> None:
    """A fault on the delivery of another exits with that other as IDT vectoring."""
    guest = Guest(l1)
    seen = guest.run(code.UD2, GUEST_IDTR_LIMIT=0, EXCEPTION_BITMAP=1 << Vector.GP)
    assert seen == Exit(
        ExitReason.EXCEPTION_NMI,
        qualification=0,
        rip=guest.at(),
        intr_info=intr_info(Vector.GP, IntrType.HARDWARE_EXCEPTION, True),
        # Gate 6 of the IDT, external to the program.
        intr_error=Vector.UD << 3 | 2 | 1,
        idt_info=intr_info(Vector.UD, IntrType.HARDWARE_EXCEPTION),
    )


def test_invalid_tss(l1: L1) -> None:
    """#TS from a stack switch beyond the TSS's limit is intercepted by bit 10."""
    guest = Guest(l1)
    guest.set_cpl(3)
    seen = guest.run(code.UD2, GUEST_TR_LIMIT=7, EXCEPTION_BITMAP=1 << Vector.TS)
    assert seen == Exit(
        ExitReason.EXCEPTION_NMI,
        qualification=0,
        rip=guest.at(),
        intr_info=intr_info(Vector.TS, IntrType.HARDWARE_EXCEPTION, True),
        intr_error=l1.sym("SEL_TSS_L2") | 1,
        idt_info=intr_info(Vector.UD, IntrType.HARDWARE_EXCEPTION),
    )


@pytest.mark.sdm("Other Causes of VM Exits")
def test_triple_fault(l1: L1) -> None:
    """A triple fault of L2 exits without interruption information, and L1 continues."""
    guest = Guest(l1)
    seen = guest.run(code.UD2, GUEST_IDTR_LIMIT=0)
    assert seen == guest.exit(ExitReason.TRIPLE_FAULT)
    assert guest.vmcs.read(Field.GUEST_ACTIVITY_STATE) == (0,)
    # L1 repairs L2, which goes on.
    guest.vmcs[Field.GUEST_IDTR_LIMIT] = 0xFFF
    seen = guest.go_on()
    assert seen == Fault(Vector.UD, error_code=0, rip=0)
    assert guest.run(code.NOP) == Succeed()


@pytest.mark.sdm("Saving Non-Register State")
@pytest.mark.parametrize("blocking", [1, 2], ids=["STI", "MOV-SS"])
def test_blocking_is_saved(l1: L1, blocking: int) -> None:
    """A fault that exits leaves blocking as it was: the instruction has not been executed."""
    guest = Guest(l1)
    for program, fields, vector in (
        (b"\x58", {"GUEST_RSP": 0x50000000}, Vector.PF),  # POP RAX
        (b"\x8e\xd8", {}, Vector.GP),  # MOV DS, AX with a selector beyond the GDT
    ):
        seen = guest.run(
            program,
            {"rax": 0x7FF0},
            EXCEPTION_BITMAP=1 << vector,
            GUEST_RFLAGS=0x202,
            GUEST_INTERRUPTIBILITY_INFO=blocking,
            **fields,
        )
        info = intr_info(vector, IntrType.HARDWARE_EXCEPTION, True)
        assert seen == Exit(ExitReason.EXCEPTION_NMI, rip=guest.at(), intr_info=info)
        assert guest.vmcs[Field.GUEST_INTERRUPTIBILITY_INFO] == blocking


# --- an instruction of another vendor ---


@pytest.mark.parametrize("intercepted", [True, False], ids=["intercepted", "not-intercepted"])
def test_vmmcall(l1: L1, intercepted: bool) -> None:
    """VMMCALL is no instruction of this processor: #UD, no VMCALL exit, and L2's code stays."""
    vmmcall = b"\x0f\x01\xd9"
    guest = Guest(l1)
    seen = guest.run(vmmcall, EXCEPTION_BITMAP=1 << Vector.UD if intercepted else 0)
    if intercepted:
        assert seen == guest.exception(Vector.UD)
    else:
        assert seen == Fault(Vector.UD, rip=0)
    assert l1.read(l1.sym("l2_code"), 3) == vmmcall
