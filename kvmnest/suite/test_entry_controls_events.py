"""VM entry checks the event to inject: interruption information, error code, length; error 7."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pytest

from kvmnest.l1 import L1, L2Mode
from kvmnest.suite.support.batch import Changes
from kvmnest.suite.support.entries import (
    BAD_CONTROL,
    BAD_GUEST,
    Entries,
    each,
    entries,
    expect_accepted,
    expect_refused,
    shown,
)
from kvmnest.vmx import (
    ERROR_CODE_VECTORS,
    Cr0,
    ExitReason,
    Field,
    IntrType,
    Proc2Ctl,
    ProcCtl,
    Rflags,
    Vector,
    intr_info,
)
from kvmnest.vmx.outcome import Exit

pytestmark = [pytest.mark.series(14), pytest.mark.sdm("VM-Entry Control Fields")]

_INFO = Field.VM_ENTRY_INTR_INFO_FIELD
_CODE = Field.VM_ENTRY_EXCEPTION_ERROR_CODE
_LENGTH = Field.VM_ENTRY_INSTRUCTION_LEN

#: What the delivery of an event changes in L2.
_CHANGED = (
    *(Field.GUEST_RIP, Field.GUEST_RSP, Field.GUEST_RFLAGS, Field.GUEST_INTERRUPTIBILITY_INFO),
    *(Field.GUEST_CS_SELECTOR, Field.GUEST_CS_BASE, Field.GUEST_CS_ACCESS_RIGHTS),
)
_SOFTWARE = (
    IntrType.SOFTWARE_INTERRUPT,
    IntrType.PRIVILEGED_SOFTWARE_EXCEPTION,
    IntrType.SOFTWARE_EXCEPTION,
)


def _ready(l1: L1, mode: L2Mode = L2Mode.LONG) -> Entries:
    """Make a VMCS into which any event can be injected; L2's handlers report it by VMCALL."""
    tries = entries(l1, mode=mode)
    tries.vmcs[Field.GUEST_RFLAGS] = 2 | Rflags.IF
    tries.vmcs[_LENGTH] = 1
    return tries


def expect_delivered(tries: Entries, cases: Iterable[Changes], size: int = 8) -> None:
    """Assert that each event arrives in L2: its handler was reached with that vector."""
    wrong = []
    for changes in cases:
        outcome = tries(changes)
        vector, *_ = tries.l1.l2_frame(1, size)
        known = tries.vmcs.fields()
        tries.vmcs.update({field: known[field] for field in _CHANGED})
        if outcome != Exit(ExitReason.VMCALL) or vector != changes[_INFO] & 0xFF:
            wrong.append(f"{changes[_INFO]:#x}: {outcome!r}, vector {vector}")
    assert not wrong, shown("expected delivery in L2", wrong)


def _exception(vector: int, *, code: bool | None = None) -> int:
    """Information of a hardware exception, with the error code it has or as stated."""
    has_code = vector in ERROR_CODE_VECTORS if code is None else code
    return intr_info(vector, IntrType.HARDWARE_EXCEPTION, error_code=has_code)


# --- type, vector, reserved bits ---


def test_reserved_type(l1: L1) -> None:
    """Interruption type 1 is reserved, whatever the vector."""
    tries = _ready(l1)
    bad = [intr_info(vector, 1) for vector in (0, 2, 13, 32, 255)]
    expect_refused(tries, BAD_CONTROL, each(_INFO, bad))


def test_reserved_bits(l1: L1) -> None:
    """Bits 30:12 of the interruption information must be 0, one at a time."""
    tries = _ready(l1)
    good = intr_info(32, IntrType.EXTERNAL_INTERRUPT)
    expect_refused(tries, BAD_CONTROL, each(_INFO, [good | 1 << bit for bit in range(12, 31)]))
    expect_delivered(tries, [{_INFO: good}])


def test_nmi_vector(l1: L1) -> None:
    """An NMI has vector 2."""
    tries = _ready(l1)
    bad = [intr_info(vector, IntrType.NMI) for vector in (0, 1, 3, 18, 32, 34, 0x82, 255)]
    expect_refused(tries, BAD_CONTROL, each(_INFO, bad))
    expect_delivered(tries, [{_INFO: intr_info(2, IntrType.NMI)}])


def test_hardware_exception_vector(l1: L1) -> None:
    """A hardware exception has a vector of at most 31."""
    tries = _ready(l1)
    bad = [intr_info(v, IntrType.HARDWARE_EXCEPTION) for v in (32, 33, 63, 64, 128, 255)]
    bad += [info | 1 << 11 for info in bad]
    expect_refused(tries, BAD_CONTROL, each(_INFO, bad))


def test_other_event(l1: L1) -> None:
    """Type 7 is a pending monitor-trap-flag exit: vector 0, and only where MTF is supported."""
    tries = _ready(l1)
    bad = [intr_info(vector, IntrType.OTHER_EVENT) for vector in (3, 7, 32, 255)]
    pending_mtf = intr_info(0, IntrType.OTHER_EVENT)
    if l1.caps.supports(ProcCtl.MONITOR_TRAP_FLAG):
        expect_refused(tries, BAD_CONTROL, each(_INFO, bad))
        rip = tries.vmcs[Field.GUEST_RIP]
        assert tries({_INFO: pending_mtf}) == Exit(ExitReason.MONITOR_TRAP_FLAG, rip=rip)
    else:
        expect_refused(tries, BAD_CONTROL, each(_INFO, [pending_mtf, *bad]))


def test_without_valid_bit(l1: L1) -> None:
    """With bit 31 clear nothing of the event is looked at and nothing is injected."""
    tries = _ready(l1)
    tries.vmcs[_CODE] = 0xFFFFFFFF
    tries.vmcs[_LENGTH] = 0xFFFFFFFF
    anything = [0x7FFFFFFF, intr_info(0, 1, valid=False), intr_info(255, 3, True, valid=False)]
    expect_accepted(tries, each(_INFO, anything))


# --- error code ---


def test_error_code_by_vector(l1: L1) -> None:
    """The deliver-error-code bit must be right for the exception's vector, where it matters."""
    tries = _ready(l1)
    wrong = [_exception(v, code=v not in ERROR_CODE_VECTORS) for v in range(32)]
    if l1.caps.basic.error_code_optional:
        expect_delivered(tries, [{_INFO: info} for info in wrong])
    else:
        # Of #CP the answer depends on the processor's support of CET.
        decided = [info for info in wrong if info & 0xFF != Vector.CP]
        expect_refused(tries, BAD_CONTROL, each(_INFO, decided))


def test_every_hardware_exception(l1: L1) -> None:
    """Each vector with the error-code bit that it should have is injected."""
    tries = _ready(l1)
    # 9, 15, 21 to 31 have no exception of their own, or one of newer processors.
    vectors = [*range(9), *range(10, 15), *range(16, 20)]
    expect_delivered(tries, [{_INFO: _exception(vector), _CODE: 0} for vector in vectors])


def _with_code(vector: int) -> Iterator[int]:
    """Every type but hardware exception, with the deliver-error-code bit."""
    yield intr_info(vector, IntrType.EXTERNAL_INTERRUPT, error_code=True)
    for kind in _SOFTWARE:
        yield intr_info(vector, kind, error_code=True)


def test_error_code_of_other_types(l1: L1) -> None:
    """Only hardware exceptions deliver an error code, even with a vector that has one."""
    tries = _ready(l1)
    bad = [info for vector in (8, 13, 14, 32) for info in _with_code(vector)]
    bad.append(intr_info(2, IntrType.NMI, error_code=True))
    expect_refused(tries, BAD_CONTROL, each(_INFO, bad))


def test_error_code_high_bits(l1: L1) -> None:
    """Bits 31:16 of an error code to deliver must be 0; of one not delivered they are ignored."""
    tries = _ready(l1)
    event = {_INFO: _exception(Vector.GP)}
    bad = [1 << bit for bit in range(16, 32)] + [0xFFFFFFFF]
    expect_refused(tries, BAD_CONTROL, each(_CODE, bad, event))
    expect_delivered(tries, [{**event, _CODE: code} for code in (0, 1, 0x7FFF)])
    no_code = {_INFO: _exception(Vector.UD)}
    expect_delivered(tries, [{**no_code, _CODE: code} for code in (0x10000, 0xFFFFFFFF)])


@pytest.mark.needs(Proc2Ctl.UNRESTRICTED_GUEST)
def test_error_code_in_real_mode(l1: L1) -> None:
    """An unrestricted guest with CR0.PE 0 takes no error code, whatever the vector."""
    tries = _ready(l1, L2Mode.REAL)
    bad = [_exception(vector, code=True) for vector in sorted(ERROR_CODE_VECTORS)]
    expect_refused(tries, BAD_CONTROL, each(_INFO, bad))
    good = [Vector.DF, Vector.NP, Vector.SS, Vector.GP, Vector.AC, Vector.DE, Vector.UD]
    expect_delivered(tries, [{_INFO: _exception(vector, code=False)} for vector in good], size=2)


@pytest.mark.needs(Proc2Ctl.UNRESTRICTED_GUEST)
@pytest.mark.parametrize("mode", [L2Mode.PROTECTED, L2Mode.UNPAGED], ids=lambda mode: mode.name)
def test_error_code_of_unrestricted_protected_mode(l1: L1, mode: L2Mode) -> None:
    """An unrestricted guest with CR0.PE 1 obeys the ordinary error-code rules."""
    tries = _ready(l1, mode)
    tries.vmcs.update(tries.using(Proc2Ctl.UNRESTRICTED_GUEST))
    if not l1.caps.basic.error_code_optional:
        bad = [_exception(Vector.GP, code=False), _exception(Vector.UD, code=True)]
        expect_refused(tries, BAD_CONTROL, each(_INFO, bad))
    expect_delivered(tries, [{_INFO: _exception(v)} for v in (Vector.GP, Vector.UD)], size=4)


@pytest.mark.needs(Proc2Ctl.UNRESTRICTED_GUEST)
def test_error_code_of_restricted_real_mode(l1: L1) -> None:
    """Without "unrestricted guest" CR0.PE does not matter: the controls pass, CR0 is refused then.

    Controls are checked before guest state: a wrong event is error 7, a right one not.
    """
    tries = _ready(l1)
    real = {
        **tries.using(without=Proc2Ctl.UNRESTRICTED_GUEST),
        Field.GUEST_CR0: tries.vmcs[Field.GUEST_CR0] & ~(Cr0.PE | Cr0.PG),
    }
    if not l1.caps.basic.error_code_optional:
        bad = [_exception(Vector.GP, code=False), _exception(Vector.UD, code=True)]
        expect_refused(tries, BAD_CONTROL, each(_INFO, bad, real))
    good = [_exception(vector) for vector in (Vector.GP, Vector.UD)]
    expect_refused(tries, BAD_GUEST, each(_INFO, good, real))


# --- instruction length ---


@pytest.mark.parametrize("kind", _SOFTWARE, ids=lambda kind: kind.name)
def test_instruction_length(l1: L1, kind: IntrType) -> None:
    """Software events need an instruction length of 1 to 15; 0 only where it is reported."""
    tries = _ready(l1)
    event = {_INFO: intr_info({4: 0x80, 5: Vector.DB, 6: Vector.BP}[kind], kind)}
    bad = [16, 17, 31, 255, 256, 0x10001, 1 << 31, 0xFFFFFFFF]
    good = [1, 2, 15]
    (good if l1.caps.misc.zero_length_injection else bad).append(0)
    expect_refused(tries, BAD_CONTROL, each(_LENGTH, bad, event))
    cases = [{**event, _LENGTH: length} for length in good]
    if kind is IntrType.PRIVILEGED_SOFTWARE_EXCEPTION:
        # KVM drops the event when it has to map memory during the delivery.
        assert [tries(case) for case in cases] == [Exit(ExitReason.VMCALL)] * len(cases)
    else:
        expect_delivered(tries, cases)


def test_instruction_length_of_other_types(l1: L1) -> None:
    """Interrupts, NMIs and hardware exceptions ignore the instruction length."""
    tries = _ready(l1)
    infos = [
        intr_info(32, IntrType.EXTERNAL_INTERRUPT),
        intr_info(2, IntrType.NMI),
        _exception(Vector.UD),
    ]
    cases = [{_INFO: info, _LENGTH: length} for info in infos for length in (0, 16, 0xFFFFFFFF)]
    expect_delivered(tries, cases)


def test_refused_event_stays(l1: L1) -> None:
    """A refused entry leaves the event's fields alone; put right, it is injected then."""
    tries = _ready(l1)
    vmcs = tries.vmcs
    bad = {_INFO: _exception(Vector.GP), _CODE: 0x10018, _LENGTH: 7}
    vmcs.update(bad)
    assert l1.vmlaunch() == BAD_CONTROL
    assert dict(zip(bad, vmcs.read(*bad), strict=True)) == bad
    vmcs[_CODE] = 0x18
    assert l1.vmlaunch() == Exit(ExitReason.VMCALL)
    assert l1.l2_frame(2) == [Vector.GP, 0x18]
    # The entry took the event: its valid bit is gone, the rest is as it was.
    assert vmcs.read(_INFO, _CODE, _LENGTH) == (bad[_INFO] & 0x7FFFFFFF, 0x18, 7)
