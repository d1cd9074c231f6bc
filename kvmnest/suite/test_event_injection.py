"""Events that VM entry injects, as L2's handlers see them."""

from __future__ import annotations

import pytest

from kvmnest.l1 import L1, L2Mode, code
from kvmnest.suite.support.guest import Guest, copied_idt
from kvmnest.vmx import (
    ERROR_CODE_VECTORS,
    ExitReason,
    Field,
    IntrType,
    Proc2Ctl,
    Rflags,
    Vector,
    intr_info,
)
from kvmnest.vmx.outcome import Exit, Fault, Outcome, Succeed

pytestmark = [pytest.mark.series(21), pytest.mark.sdm("Vectored-Event Injection")]

HARDWARE = IntrType.HARDWARE_EXCEPTION
SOFTWARE = IntrType.SOFTWARE_INTERRUPT
NOT_RF = ~int(Rflags.RF)
#: Vectors for which L2's handlers expect an error code: they report the return address as one.
WITH_ERROR = (8, 10, 11, 12, 13, 14, 17, 21, 29, 30)
#: Exceptions that VM entry injects without an error code, on every processor.
PLAIN = (0, 1, 3, 4, 5, 6, 7, 9, 15, 16, 18, 19, 20)


def _frame(guest: Guest, rip: int, flags: int = 0x2, *, user: bool = False) -> list[int]:
    """Vector, error code and RF aside: what delivery pushes in 64-bit mode."""
    l1, vmcs = guest.l1, guest.vmcs
    cs, ss = ("SEL_USER_CODE64", "SEL_USER_DATA") if user else ("SEL_CODE64", "SEL_DATA")
    return [rip, l1.sym(cs), flags, vmcs.baseline[Field.GUEST_RSP], l1.sym(ss)]


def _inject(guest: Guest, info: int, error: int = 0, length: int = 0, **fields: int) -> Outcome:
    return guest.run(
        code.NOP * 16,
        {"cr2": 0x1111},
        VM_ENTRY_INTR_INFO_FIELD=info,
        VM_ENTRY_EXCEPTION_ERROR_CODE=error,
        VM_ENTRY_INSTRUCTION_LEN=length,
        **fields,
    )


def _seen_frame(guest: Guest) -> list[int]:
    words = guest.l1.l2_frame(7)[2:]
    words[2] &= NOT_RF
    return words


def test_external_interrupts(l1: L1) -> None:
    """Each vector from 16 on arrives with an error code of none, return to GUEST_RIP, IF off."""
    guest = Guest(l1)
    for vector in (*range(16, 48), 0x7F, 0x80, 0x81, 0xEF, 0xFE, 0xFF):
        if vector in WITH_ERROR:
            continue
        info = intr_info(vector, IntrType.EXTERNAL_INTERRUPT)
        seen = _inject(guest, info, GUEST_RFLAGS=0x202)
        assert seen == Fault(vector, error_code=0, rip=0), hex(vector)
        assert _seen_frame(guest) == _frame(guest, guest.start, 0x202), hex(vector)
        saved = guest.vmcs.read(Field.GUEST_RFLAGS, Field.VM_ENTRY_INTR_INFO_FIELD)
        # The exit clears the valid bit, so that the event is injected once.
        assert saved == (0x2, info & 0x7FFFFFFF)
    guest.vmcs[Field.GUEST_RIP] = guest.start
    assert guest.go_on() == Succeed()


def test_hardware_exceptions(l1: L1) -> None:
    """Each exception without error code; the exception bitmap has no say."""
    guest = Guest(l1)
    for bitmap in (0, 0xFFFFFFFF):
        for vector in PLAIN:
            seen = _inject(guest, intr_info(vector, HARDWARE), EXCEPTION_BITMAP=bitmap)
            assert seen == Fault(vector, error_code=0, rip=0), vector
            assert seen.cr2 == 0x1111
            assert _seen_frame(guest) == _frame(guest, guest.start)


def test_error_codes(l1: L1) -> None:
    """Exceptions with an error code push the one of the VM-entry field."""
    guest = Guest(l1)
    for bitmap in (0, 0xFFFFFFFF):
        for vector in sorted(ERROR_CODE_VECTORS):
            for error in (0, 0x18, 0x7FFF):
                info = intr_info(vector, HARDWARE, True)
                seen = _inject(guest, info, error, EXCEPTION_BITMAP=bitmap)
                assert seen == Fault(vector, error_code=error, rip=0), (vector, error)
                # CR2 is nobody's but L1's: an injected #PF does not change it.
                assert seen.cr2 == 0x1111
                assert _seen_frame(guest) == _frame(guest, guest.start)


def test_error_code_field_without_the_bit(l1: L1) -> None:
    """The error-code field is ignored for events that push none."""
    guest = Guest(l1)
    for vector, kind in ((6, HARDWARE), (0x40, IntrType.EXTERNAL_INTERRUPT), (0x41, SOFTWARE)):
        seen = _inject(guest, intr_info(vector, kind), 0x7FF8, 1, GUEST_RFLAGS=0x202)
        assert isinstance(seen, Fault)
        assert (seen.vector, seen.error_code) == (vector, 0)


def _touch(guest: Guest) -> None:
    """Deliver something: no hypervisor below needs to map IDT and stack afterwards."""
    for vector in (0x20, 0xFF):  # the IDT may lie in two pages
        assert _inject(guest, intr_info(vector, SOFTWARE), length=1) == Fault(vector, rip=1)


@pytest.mark.parametrize(
    ("kind", "vectors"),
    [
        pytest.param(SOFTWARE, (0, 3, 0x20, 0x80, 0xFF), id="INT-n"),
        pytest.param(IntrType.PRIVILEGED_SOFTWARE_EXCEPTION, (1,), id="INT1"),
        pytest.param(IntrType.SOFTWARE_EXCEPTION, (3, 4), id="INT3-INTO"),
        pytest.param(IntrType.SOFTWARE_EXCEPTION, (0, 5, 31, 0x20, 0xFF), id="software-exception"),
    ],
)
def test_software_events(l1: L1, kind: IntrType, vectors: tuple[int, ...]) -> None:
    """The return address of a software event is GUEST_RIP plus the VM-entry length."""
    guest = Guest(l1)
    _touch(guest)
    lengths = [0] if l1.caps.misc.zero_length_injection else []
    for vector in vectors:
        for length in (*lengths, 1, 2, 3, 8, 15):
            seen = _inject(guest, intr_info(vector, kind), length=length)
            assert seen == Fault(vector, error_code=0, rip=length), (vector, length)
            assert _seen_frame(guest) == _frame(guest, guest.start + length)


def test_software_interrupt_with_the_vector_of_an_exception(l1: L1) -> None:
    """INT n pushes no error code, with a vector whose exception has one neither."""
    guest = Guest(l1)
    for vector in WITH_ERROR:
        _inject(guest, intr_info(vector, SOFTWARE), length=2)
        words = l1.l2_frame(6)
        words[3] &= NOT_RF
        assert words == [vector, *_frame(guest, guest.start + 2)]


def test_int1_over_a_fault_of_the_host(l1: L1) -> None:
    """INT1 is not lost when the host's hypervisor still has to map the pages of its delivery."""
    guest = Guest(l1)
    stack = l1.alloc()
    info = intr_info(1, IntrType.PRIVILEGED_SOFTWARE_EXCEPTION)
    seen = _inject(guest, info, length=1, GUEST_RSP=stack + 0x800)
    assert seen == Fault(1, error_code=0, rip=1)


@pytest.mark.parametrize(
    "vector",
    [
        pytest.param(Vector.BP, id="INT3"),
        pytest.param(Vector.OF, id="INTO"),
        *(pytest.param(other, id=f"vector-{other}") for other in (5, 6, 31, 0x20, 0x40, 0xFF)),
    ],
)
def test_software_exception_over_a_fault_of_the_host(l1: L1, vector: int) -> None:
    """A software exception of any vector, whose delivery the host's hypervisor has to restart.

    The SDM names no vectors for the type. What begins again is the same event: it returns behind
    the instruction, and is still checked like a software exception.
    """
    guest = Guest(l1)
    info = intr_info(vector, IntrType.SOFTWARE_EXCEPTION)
    seen = _inject(guest, info, length=1, GUEST_RSP=l1.alloc() + 0x800)
    assert seen == Fault(vector, error_code=0, rip=1)


def test_length_is_ignored_for_the_others(l1: L1) -> None:
    """Interrupts, NMIs and hardware exceptions return to GUEST_RIP whatever the length field."""
    guest = Guest(l1)
    for vector, kind in (
        (0x30, IntrType.EXTERNAL_INTERRUPT),
        (Vector.NMI, IntrType.NMI),
        (Vector.UD, HARDWARE),
        (Vector.BP, HARDWARE),
    ):
        for length in (0, 3, 15, 16, 0xFFFF):
            seen = _inject(guest, intr_info(vector, kind), length=length, GUEST_RFLAGS=0x202)
            assert seen == Fault(vector, error_code=0, rip=0), (vector, length)


def test_from_cpl_3(l1: L1) -> None:
    """Delivery from CPL 3 switches to the stack of the TSS."""
    guest = Guest(l1)
    guest.set_cpl(3)
    rsp = l1.sym("l2_stack_top") - 0x400
    for vector, kind, error in (
        (0x30, IntrType.EXTERNAL_INTERRUPT, False),
        (Vector.NMI, IntrType.NMI, False),
        (Vector.GP, HARDWARE, True),
    ):
        seen = _inject(
            guest, intr_info(vector, kind, error), 0x18, GUEST_RFLAGS=0x202, GUEST_RSP=rsp
        )
        assert seen == Fault(vector, error_code=0x18 if error else 0, rip=0)
        frame = _frame(guest, guest.start, 0x202, user=True)
        frame[3] = rsp
        assert _seen_frame(guest) == frame
        # RSP0 of the task-state segment, seven words deep.
        saved = guest.vmcs.read(Field.GUEST_RSP, Field.GUEST_SS_SELECTOR, Field.GUEST_CS_SELECTOR)
        assert saved == (l1.sym("l2_stack_top") - 56, 0, l1.sym("SEL_CODE64"))


def test_gate_privilege(l1: L1) -> None:
    """Only software events are checked against the DPL of their gate."""
    guest = Guest(l1)
    guest.set_cpl(3)
    for vector, kind in ((0x30, SOFTWARE), (3, IntrType.SOFTWARE_EXCEPTION)):
        seen = _inject(guest, intr_info(vector, kind), length=2)
        # #GP with the gate as error code, IDT bit set; not external to the program.
        assert seen == Fault(Vector.GP, error_code=vector << 3 | 2, rip=0), vector
    privileged = intr_info(1, IntrType.PRIVILEGED_SOFTWARE_EXCEPTION)
    assert _inject(guest, privileged, length=1) == Fault(1, error_code=0, rip=1)


def test_debug_exception_has_no_side_effects(l1: L1) -> None:
    """An injected #DB changes neither DR6 nor DR7, and not IA32_DEBUGCTL."""
    guest = Guest(l1)
    assert l1.write_dr(6, 0xFFFF0FF0) == Succeed()
    seen = _inject(guest, intr_info(Vector.DB, HARDWARE), GUEST_DR7=0x2400)
    assert seen == Fault(Vector.DB, error_code=0, rip=0)
    assert guest.vmcs.read(Field.GUEST_DR7) == (0x2400,)
    assert l1.read_dr(6) == Succeed(0xFFFF0FF0)


def test_wakes_from_hlt(l1: L1) -> None:
    """An injected event makes L2 active that was entered in HLT."""
    guest = Guest(l1)
    for vector, kind in (
        (0x30, IntrType.EXTERNAL_INTERRUPT),
        (Vector.NMI, IntrType.NMI),
        (Vector.DB, HARDWARE),
        (Vector.MC, HARDWARE),
    ):
        seen = _inject(guest, intr_info(vector, kind), GUEST_RFLAGS=0x202, GUEST_ACTIVITY_STATE=1)
        assert seen == Fault(vector, error_code=0, rip=0), vector
        assert guest.vmcs.read(Field.GUEST_ACTIVITY_STATE) == (0,)


def test_injection_ends_blocking(l1: L1) -> None:
    """The blocking by STI or MOV SS that the VMCS states is over when the handler runs."""
    guest = Guest(l1)
    for blocking in (1, 2):
        seen = _inject(
            guest,
            intr_info(Vector.UD, HARDWARE),
            GUEST_RFLAGS=0x202,
            GUEST_INTERRUPTIBILITY_INFO=blocking,
        )
        assert seen == Fault(Vector.UD, error_code=0, rip=0)
        assert guest.vmcs.read(Field.GUEST_INTERRUPTIBILITY_INFO) == (0,)


def test_flags_that_delivery_clears(l1: L1) -> None:
    """Delivery pushes TF, NT and IF and clears them; a pending single step does not follow."""
    guest = Guest(l1)
    flags = 0x202 | Rflags.NT | Rflags.TF | Rflags.CF
    seen = _inject(guest, intr_info(0x30, IntrType.EXTERNAL_INTERRUPT), GUEST_RFLAGS=flags)
    assert seen == Fault(0x30, error_code=0, rip=0)
    assert _seen_frame(guest) == _frame(guest, guest.start, flags)
    assert guest.vmcs.read(Field.GUEST_RFLAGS) == (0x2 | Rflags.CF,)


@pytest.mark.parametrize("mode", [L2Mode.PROTECTED, L2Mode.PAE], ids=lambda mode: mode.name)
def test_32_bit(l1: L1, mode: L2Mode) -> None:
    """In 32-bit mode the frame has 32-bit words and, at the same CPL, no stack pointer."""
    guest = Guest(l1, mode=mode)
    for vector, kind, error, length in (
        (0x30, IntrType.EXTERNAL_INTERRUPT, None, 0),
        (Vector.NMI, IntrType.NMI, None, 0),
        (Vector.NP, HARDWARE, 0x1230, 0),
        (Vector.PF, HARDWARE, 0x2, 0),
        (Vector.UD, HARDWARE, None, 0),
        (Vector.OF, IntrType.SOFTWARE_EXCEPTION, None, 1),
        (0x80, SOFTWARE, None, 2),
    ):
        info = intr_info(vector, kind, error is not None)
        seen = _inject(guest, info, error or 0, length, GUEST_RFLAGS=0x202)
        assert seen == Fault(vector, error_code=error or 0, rip=length), vector
        words = l1.l2_frame(5, 4)
        assert (words[3], words[4] & NOT_RF) == (l1.sym("SEL_CODE32"), 0x202)
        assert guest.vmcs.read(Field.GUEST_RSP) == (l1.sym("l2_stack_top") - 20,)


@pytest.mark.needs(Proc2Ctl.UNRESTRICTED_GUEST)
def test_real_mode(l1: L1) -> None:
    """In real mode delivery goes through the vector table, with 16-bit words and no error code."""
    guest = Guest(l1, mode=L2Mode.REAL)
    rsp = guest.vmcs.baseline[Field.GUEST_RSP]
    for vector, kind, length in (
        (0x30, IntrType.EXTERNAL_INTERRUPT, 0),
        (Vector.NMI, IntrType.NMI, 0),
        (Vector.GP, HARDWARE, 0),
        (Vector.UD, HARDWARE, 0),
        (0x80, SOFTWARE, 2),
        (Vector.BP, IntrType.SOFTWARE_EXCEPTION, 1),
    ):
        seen = _inject(guest, intr_info(vector, kind), 0, length, GUEST_RFLAGS=0x202)
        assert isinstance(seen, Fault), vector
        vector_seen, zero, ip, cs, flags = l1.l2_frame(5, 2)
        assert (vector_seen, zero, ip, flags) == (vector, 0, length, 0x202)
        assert cs == l1.sym("l2_code") >> 4
        saved = guest.vmcs.read(Field.GUEST_RSP, Field.GUEST_RFLAGS, Field.GUEST_CS_BASE)
        assert saved == (rsp - 10, 0x2, 0)


def test_handler_gets_another(l1: L1) -> None:
    """An event injected while L2 is in a handler nests: the frames lie behind each other."""
    guest = Guest(l1)
    assert _inject(guest, intr_info(Vector.UD, HARDWARE)) == Fault(Vector.UD, rip=0)
    inner_rip, inner_rsp = guest.vmcs.read(Field.GUEST_RIP, Field.GUEST_RSP)
    guest.vmcs[Field.VM_ENTRY_INTR_INFO_FIELD] = intr_info(Vector.NMI, IntrType.NMI)
    seen = guest.go_on()
    assert seen == Fault(Vector.NMI, error_code=0, rip=inner_rip - guest.start)
    # 64-bit delivery aligns the stack to 16 bytes.
    assert _seen_frame(guest)[3] == inner_rsp
    assert guest.vmcs.read(Field.GUEST_RSP) == ((inner_rsp & ~15) - 56,)


def test_no_injection_without_the_valid_bit(l1: L1) -> None:
    """Without bit 31 the field is ignored, whatever else it holds."""
    guest = Guest(l1)
    for info in (0x7FFFFFFF, 0x306, 0x100, 0x7FFFF000):
        assert _inject(guest, info, 0xFFFFFFFF, 0xFF) == Succeed()
        assert guest.vmcs.read(Field.VM_ENTRY_INTR_INFO_FIELD) == (info,)


def test_intercepts_of_the_handler(l1: L1) -> None:
    """An exit in the handler of an injected event is an ordinary one: no IDT vectoring."""
    guest = Guest(l1)
    idt = copied_idt(l1)
    handler = l1.sym("l2_code") + 0x800
    l1.write_int(idt + 16 * 0x30, handler & 0xFFFF, 2)
    l1.write_int(idt + 16 * 0x30 + 6, handler >> 16, 2)
    l1.write(handler, code.CPUID)
    guest.vmcs[Field.GUEST_IDTR_BASE] = idt
    info = intr_info(0x30, IntrType.EXTERNAL_INTERRUPT)
    seen = _inject(guest, info, GUEST_RFLAGS=0x202)
    assert seen == Exit(
        ExitReason.CPUID, qualification=0, rip=handler, length=2, intr_info=0, idt_info=0
    )
