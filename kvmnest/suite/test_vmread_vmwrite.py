"""VMREAD and VMWRITE: operands, unsupported and read-only fields, faults."""

from typing import Any

import pytest

from kvmnest.l1 import L1, Mode
from kvmnest.vmx import ExitReason, Field, Misc, Vector, VmxError
from kvmnest.vmx.outcome import Exit, Fault, Outcome, Succeed, VMfailInvalid, VMfailValid
from kvmnest.vmx.registers import STATUS_FLAGS

SDM_READ = "VMREAD - Read Field from Virtual-Machine Control Structure"
SDM_WRITE = "VMWRITE - Write Field to Virtual-Machine Control Structure"

pytestmark = pytest.mark.series(13)

BOTH = [
    pytest.param("vmread", marks=pytest.mark.sdm(SDM_READ)),
    pytest.param("vmwrite", marks=pytest.mark.sdm(SDM_WRITE)),
]
FORMS = pytest.mark.parametrize("memory", [False, True], ids=["register", "memory"])

#: Encodings that no processor defines: an index far beyond the last of its kind, bit 12 (which
#: must be 0), and bits above 14.
UNSUPPORTED = [0x03FE, 0x2BFE, 0x4BFE, 0x6BFE, 0x1000 | Field.GUEST_RIP, 0x8000, 0xFFFFFFFF]


def _do(l1: L1, name: str, field: int = Field.GUEST_RIP, **how: Any) -> Outcome:
    if name == "vmread":
        return l1.vmread(field, **how)
    return l1.vmwrite(field, 0x1000, **how)


@pytest.mark.parametrize("name", BOTH)
@FORMS
def test_outside_vmx_operation(l1: L1, name: str, memory: bool) -> None:
    """#UD outside VMX operation, whatever the CPL."""
    assert _do(l1, name, memory=memory) == Fault(Vector.UD, error_code=0, rip=0)
    assert _do(l1, name, memory=memory, cpl=3) == Fault(Vector.UD, error_code=0, rip=0)


@pytest.mark.parametrize("name", BOTH)
@FORMS
def test_at_cpl_3(l1: L1, name: str, memory: bool) -> None:
    """#GP(0) at CPL 3."""
    l1.launchable()
    assert _do(l1, name, memory=memory, cpl=3) == Fault(Vector.GP, error_code=0, rip=0)


@pytest.mark.parametrize("name", BOTH)
@FORMS
def test_in_compatibility_mode(l1: L1, name: str, memory: bool) -> None:
    """#UD in compatibility mode."""
    l1.launchable()
    assert _do(l1, name, memory=memory, mode=Mode.COMPAT) == Fault(Vector.UD, error_code=0, rip=0)


@pytest.mark.parametrize("name", BOTH)
@FORMS
def test_without_current_vmcs(l1: L1, name: str, memory: bool) -> None:
    """VMfailInvalid without a current VMCS."""
    l1.enter_vmx()
    assert _do(l1, name, memory=memory) == VMfailInvalid()


@FORMS
@pytest.mark.sdm(SDM_WRITE)
@pytest.mark.parametrize(
    ("field", "value"),
    [
        (Field.GUEST_ES_SELECTOR, 0xFFFF),
        (Field.EXCEPTION_BITMAP, 0xDEADBEEF),
        (Field.TSC_OFFSET, 0xFEDCBA9876543210),
        (Field.GUEST_RIP, 0xFEDCBA9876543210),
        (Field.HOST_RSP, 0x0123456789ABCDEF),
    ],
    ids=lambda v: v.name if isinstance(v, Field) else "",
)
def test_value_written_is_read(l1: L1, memory: bool, field: Field, value: int) -> None:
    """Each width gives back what was written, zero-extended to 64 bits."""
    l1.launchable()
    assert l1.vmwrite(field, value, memory=memory) == Succeed()
    assert l1.vmread(field, memory=memory) == Succeed(value)
    assert l1.vmread(field, memory=not memory) == Succeed(value)


@FORMS
@pytest.mark.sdm(SDM_WRITE)
def test_narrow_fields_take_the_low_bits(l1: L1, memory: bool) -> None:
    """A value wider than the field loses its upper bits."""
    l1.launchable()
    value = 0x123456789ABCDEF0
    for field, mask in ((Field.GUEST_ES_SELECTOR, 0xFFFF), (Field.EXCEPTION_BITMAP, 0xFFFFFFFF)):
        assert l1.vmwrite(field, value, memory=memory) == Succeed()
        assert l1.vmread(field, memory=memory) == Succeed(value & mask)


@pytest.mark.parametrize("name", BOTH)
@FORMS
@pytest.mark.parametrize("field", UNSUPPORTED, ids=hex)
def test_unsupported_field(l1: L1, name: str, memory: bool, field: Field) -> None:
    """A field that does not exist: error 12."""
    l1.launchable()
    expected = VMfailValid(VmxError.UNSUPPORTED_VMCS_COMPONENT)
    assert _do(l1, name, field, memory=memory) == expected


@pytest.mark.parametrize("name", BOTH)
def test_field_operand_has_64_bits(l1: L1, name: str) -> None:
    """In 64-bit mode a bit above 31 of the field operand makes it unsupported."""
    l1.launchable()
    expected = VMfailValid(VmxError.UNSUPPORTED_VMCS_COMPONENT)
    assert _do(l1, name, Field.GUEST_RIP | 1 << 32) == expected
    assert _do(l1, name, Field.GUEST_RIP | 1 << 63) == expected


@pytest.mark.sdm(SDM_WRITE)
@FORMS
@pytest.mark.parametrize(
    "field",
    [Field.VM_EXIT_REASON, Field.VM_INSTRUCTION_ERROR, Field.EXIT_QUALIFICATION],
    ids=lambda field: field.name,
)
def test_read_only_field(l1: L1, memory: bool, field: Field) -> None:
    """VM-exit information fields: error 13, unless IA32_VMX_MISC allows to write them."""
    l1.launchable()
    outcome = l1.vmwrite(field, 0x5A, memory=memory)
    if l1.caps.supports(Misc.VMWRITE_ANY_FIELD):
        assert outcome == Succeed()
        assert l1.vmread(field) == Succeed(0x5A)
    else:
        assert outcome == VMfailValid(VmxError.VMWRITE_READ_ONLY_COMPONENT)


@pytest.mark.parametrize("name", BOTH)
def test_operand_not_mapped(l1: L1, name: str) -> None:
    """#PF at the memory operand; VMREAD writes it, VMWRITE reads it."""
    l1.launchable()
    write = 2 if name == "vmread" else 0
    at = 0x40000120
    # KVM lets the processor access some fields of a shadow VMCS by itself, and others not.
    for field in (Field.GUEST_RIP, Field.GUEST_LDTR_LIMIT):
        seen = _do(l1, name, field, at=at)
        assert seen == Fault(Vector.PF, error_code=write, cr2=at, rip=0), field.name


@pytest.mark.sdm(SDM_WRITE)
@pytest.mark.parametrize("rflags", [0x2, 0x8D7], ids=["clear", "set"])
def test_vmwrite_from_unmapped_memory(l1: L1, rflags: int) -> None:
    """The fault leaves the status flags as they were, and the field."""
    l1.launchable()
    for field in (Field.GUEST_RIP, Field.GUEST_LDTR_LIMIT):
        before = l1.vmread(field)
        seen = _do(l1, "vmwrite", field, at=0x40000120, rflags=rflags)
        assert seen == Fault(Vector.PF, error_code=0, cr2=0x40000120, rip=0), field.name
        assert seen.rflags & STATUS_FLAGS == rflags & STATUS_FLAGS, field.name
        assert l1.vmread(field) == before, field.name


@pytest.mark.parametrize("name", BOTH)
def test_operand_not_canonical(l1: L1, name: str) -> None:
    """#GP(0) through DS, #SS(0) through SS."""
    l1.launchable()
    at = 0x8000000000000000
    assert _do(l1, name, at=at) == Fault(Vector.GP, error_code=0, rip=0)
    assert _do(l1, name, at=at, via_ss=True) == Fault(Vector.SS, error_code=0, rip=0)


@pytest.mark.sdm(SDM_READ)
def test_vmread_stores_64_bits(l1: L1) -> None:
    """In 64-bit mode the memory operand has 64 bits, whatever the field's width."""
    l1.launchable()
    page = l1.alloc()
    l1.write(page, b"\xa5" * 32)
    assert l1.vmwrite(Field.GUEST_ES_SELECTOR, 0x1234) == Succeed()
    assert l1.vmread(Field.GUEST_ES_SELECTOR, at=page + 8) == Succeed(0x1234)
    assert l1.read(page, 32) == b"\xa5" * 8 + b"\x34\x12" + bytes(6) + b"\xa5" * 16


@pytest.mark.sdm(SDM_READ)
def test_failed_vmread_changes_nothing(l1: L1) -> None:
    """A VMREAD that fails leaves its destination alone."""
    l1.launchable()
    page = l1.alloc()
    l1.write(page, b"\xa5" * 16)
    expected = VMfailValid(VmxError.UNSUPPORTED_VMCS_COMPONENT)
    assert l1.vmread(UNSUPPORTED[0], at=page) == expected
    assert l1.read(page, 16) == b"\xa5" * 16


@pytest.mark.sdm(SDM_WRITE)
def test_failed_vmwrite_changes_no_field(l1: L1) -> None:
    """A VMWRITE that faults on its operand leaves the field alone."""
    vmcs = l1.launchable()
    rip = vmcs[Field.GUEST_RIP]
    vmcs.flush()
    assert l1.vmwrite(Field.GUEST_RIP, 0, at=0x40000000) == Fault(Vector.PF)
    assert l1.vmread(Field.GUEST_RIP) == Succeed(rip)
    assert l1.vmlaunch() == Exit(ExitReason.VMCALL, rip=rip)


@pytest.mark.sdm(SDM_WRITE)
def test_high_half_of_a_64_bit_field(l1: L1) -> None:
    """The odd encoding gives access to bits 63:32."""
    l1.launchable()
    assert l1.vmwrite(Field.TSC_OFFSET, 0x1111111122222222) == Succeed()
    assert l1.vmread(Field.TSC_OFFSET.high) == Succeed(0x11111111)
    assert l1.vmwrite(Field.TSC_OFFSET.high, 0x33333333) == Succeed()
    assert l1.vmread(Field.TSC_OFFSET) == Succeed(0x3333333322222222)
