"""Every VMCS field: whether it exists, how wide it is, that it keeps what VMWRITE put there."""

from __future__ import annotations

import pytest

from kvmnest.l1 import L1
from kvmnest.vmx import ExitReason, Field, Kind, Misc, Msr, Vector, VmxError, Width
from kvmnest.vmx.numbers import name_of
from kvmnest.vmx.outcome import Exit, Fault, Succeed, VMfailValid

pytestmark = [
    pytest.mark.series(12),
    pytest.mark.sdm("Field Encoding in VMCS"),
]

#: Fields for SMI handling with the dual-monitor treatment, which few hypervisors offer to guests.
SMM_FIELDS = (
    Field.EXECUTIVE_VMCS_POINTER,
    Field.GUEST_SMBASE,
    Field.IO_RCX,
    Field.IO_RSI,
    Field.IO_RDI,
    Field.IO_RIP,
)
ACCESS_RIGHTS = tuple(field for field in Field if field.name.endswith("_ACCESS_RIGHTS"))
_CF, _ZF = 1, 0x40
_FAILED = _CF | _ZF
_UNSUPPORTED = VMfailValid(VmxError.UNSUPPORTED_VMCS_COMPONENT)

EACH_WIDTH = pytest.mark.parametrize("width", list(Width), ids=lambda width: width.name)


def _group(width: Width) -> list[Field]:
    return [field for field in Field if field.width is width]


def _exist(l1: L1, fields: list[Field]) -> list[Field]:
    return [f for f in fields if f not in SMM_FIELDS and l1.caps.field_exists(f)]


def _encodings(fields: list[Field]) -> list[int]:
    """All ways to name these fields: full access, and high for 64-bit ones."""
    wide = [field.high for field in fields if field.width is Width.BITS64]
    return [*(int(field) for field in fields), *wide]


def _readable(l1: L1, encodings: list[int]) -> list[int]:
    """Those of the encodings that VMREAD accepts."""
    found = []
    step = l1.cpu.list_entries
    for start in range(0, len(encodings), step):
        part = tuple(encodings[start : start + step])
        found += [e for e, _, rflags in l1.vmread_list(l1.cpu, part) if not rflags & _FAILED]
    return found


def _names(encodings: list[int]) -> list[str]:
    return [name_of(Field, e & ~1) or hex(e) for e in encodings]


@EACH_WIDTH
def test_exists(l1: L1, width: Width) -> None:
    """Each field that the capability MSRs promise can be read, 64-bit ones by halves, too."""
    l1.launchable()
    encodings = _encodings(_exist(l1, _group(width)))
    readable = _readable(l1, encodings)
    assert _names([e for e in encodings if e not in readable]) == []


def test_smm_fields_exist(l1: L1) -> None:
    """The fields about SMIs exist on every processor."""
    l1.launchable()
    encodings = _encodings(list(SMM_FIELDS))
    readable = _readable(l1, encodings)
    assert _names([e for e in encodings if e not in readable]) == []


@EACH_WIDTH
def test_does_not_exist(l1: L1, width: Width) -> None:
    """A field exists only where the control that uses it can be 1."""
    l1.launchable()
    missing = [field for field in _group(width) if not l1.caps.field_exists(field)]
    assert _names(_readable(l1, _encodings(missing))) == []


def test_unsupported_encodings(l1: L1) -> None:
    """All encodings up to 0x7fff that name no field: error 12 for VMREAD; VMWRITE likewise."""
    l1.launchable()
    known = set(_encodings(list(Field)))
    unknown = [encoding for encoding in range(0x8000) if encoding not in known]
    assert [hex(encoding) for encoding in _readable(l1, unknown)] == []
    # For VMWRITE: the reserved bit 12, odd encodings of narrow fields, indices behind the last.
    sample = [e for e in unknown if e & 0x1000 and not e & 0x3C0][::5]
    sample += [field | 1 for field in Field if field.width is not Width.BITS64]
    sample += [Field.encode(width, kind, 0x1FF) for width in Width for kind in Kind]
    for start in range(0, len(sample), l1.cpu.list_entries):
        part = [(encoding, 0x55) for encoding in sample[start : start + l1.cpu.list_entries]]
        l1.cpu.submit([l1.cpu.write_list("OP_VMWRITE_LIST", part)])
        seen = {e: rflags & _FAILED for e, _, rflags in l1.cpu.read_list(len(part))}
        assert {e: flags for e, flags in seen.items() if flags != _ZF} == {}
    for encoding in (sample[0], sample[-1], 0x7FFF):
        assert l1.vmread(encoding) == _UNSUPPORTED
        assert l1.vmwrite(encoding, 0) == _UNSUPPORTED
    assert l1.vmlaunch() == Exit(ExitReason.VMCALL)


@EACH_WIDTH
@pytest.mark.sdm("VMWRITE - Write Field to Virtual-Machine Control Structure")
def test_keeps_what_was_written(l1: L1, width: Width) -> None:
    """Each field is a store of its own and of its own width: all written, then all read."""
    l1.launchable()
    l1.vmcs.flush()
    fields = [f for f in _exist(l1, _group(width)) if f not in ACCESS_RIGHTS]
    if not l1.caps.supports(Misc.VMWRITE_ANY_FIELD):
        for field in (f for f in fields if f.read_only):
            expected = VMfailValid(VmxError.VMWRITE_READ_ONLY_COMPONENT)
            assert l1.vmwrite(field, 1) == expected, field.name
        fields = [f for f in fields if not f.read_only]
    # VMREAD and VMWRITE that fail set this one field.
    fields = [f for f in fields if f is not Field.VM_INSTRUCTION_ERROR]
    for salt in (0x0123456789ABCDEF, 0xFEDCBA9876543210, (1 << 64) - 1, 0):
        values = {f: (salt ^ n * 0x0101010101010101) & ((1 << 64) - 1)
                  for n, f in enumerate(fields)}  # fmt: skip
        l1.cpu.submit([l1.cpu.write_list("OP_VMWRITE_LIST", list(values.items()))])
        flags = [rflags & _FAILED for _, _, rflags in l1.cpu.read_list(len(fields))]
        assert flags == [0] * len(fields)
        seen = {f: value for f, value, _ in l1.vmread_list(l1.cpu, tuple(fields))}
        wrong = {f.name: (hex(values[f] & width.mask), hex(seen[f])) for f in fields
                 if seen[f] != values[f] & width.mask}  # fmt: skip
        assert wrong == {}, f"(written, read) with {salt:#x}"


def test_high_halves(l1: L1) -> None:
    """The high access type reads and writes bits 63:32 of a 64-bit field and nothing else."""
    l1.launchable()
    l1.vmcs.flush()
    any_field = l1.caps.supports(Misc.VMWRITE_ANY_FIELD)
    for field in _exist(l1, _group(Width.BITS64)):
        if field.read_only and not any_field:
            expected = VMfailValid(VmxError.VMWRITE_READ_ONLY_COMPONENT)
            assert l1.vmwrite(field.high, 1) == expected
            continue
        assert l1.vmwrite(field, 0x1111111122222222) == Succeed()
        assert l1.vmread(field.high) == Succeed(0x11111111), field.name
        # The value's own upper half is ignored.
        assert l1.vmwrite(field.high, 0x4444444433333333) == Succeed()
        assert l1.vmread(field) == Succeed(0x3333333322222222), field.name
        assert l1.vmread(field.high) == Succeed(0x33333333), field.name
        assert l1.vmwrite(field, 0x5555555566666666) == Succeed()
        assert l1.vmread(field.high) == Succeed(0x55555555), field.name


@pytest.mark.sdm("Guest Register State")
def test_access_rights(l1: L1) -> None:
    """Reserved access-rights bits are dropped by all eight fields; the others are kept.

    The SDM leaves it to the processor. KVM drops them everywhere, so that a field reads the same
    whether VMCS shadowing serves it or not. VM entry then treats them as 0.
    """
    vmcs = l1.launchable()
    defined = 0x1F0FF
    for field in ACCESS_RIGHTS:
        good = vmcs.baseline[field]
        for value in (0xFFFFFFFF, 0, 0xFFFE0F00, 0x1F0FF, 0x5A5A5A5A):
            assert l1.vmwrite(field, value) == Succeed()
            assert l1.vmread(field) == Succeed(value & defined), field.name
        assert l1.vmwrite(field, good) == Succeed()
        vmcs[field] = good | 0xFFFE0F00
    assert l1.vmlaunch() == Exit(ExitReason.VMCALL)


def test_each_vmcs_has_its_own_fields(l1: L1) -> None:
    """Fields written in one VMCS do not show in another, whatever is current in between."""
    l1.enter_vmx()
    fields = [f for f in _exist(l1, list(Field)) if f.kind in (Kind.GUEST, Kind.HOST)]
    fields = [f for f in fields if f not in ACCESS_RIGHTS]
    regions = ("vmcs_a", "vmcs_b", "vmcs_c")
    for number, region in enumerate(regions):
        l1.load_vmcs(region).flush()
        entries = [(f, f * 0x1001 + number) for f in fields]
        l1.cpu.submit([l1.cpu.write_list("OP_VMWRITE_LIST", entries)])
    for number, region in enumerate(regions):
        assert l1.vmptrld(l1.sym(region)) == Succeed()
        for field, value, _ in l1.vmread_list(l1.cpu, tuple(fields)):
            assert value == (field * 0x1001 + number) & Field(field).width.mask, field


@pytest.mark.sdm("VMCLEAR - Clear Virtual-Machine Control Structure")
def test_fields_survive_vmclear(l1: L1) -> None:
    """VMCLEAR writes all fields to the region; VMPTRLD brings them back."""
    vmcs = l1.launchable()
    vmcs.flush()
    fields = [f for f in _exist(l1, list(Field)) if f.kind is not Kind.EXIT_INFO]
    fields = [f for f in fields if f not in ACCESS_RIGHTS]
    l1.cpu.submit([l1.cpu.write_list("OP_VMWRITE_LIST", [(f, f * 0x10003) for f in fields])])
    assert l1.vmclear(vmcs.address) == Succeed()
    assert l1.vmptrld(vmcs.address) == Succeed()
    for field, value, _ in l1.vmread_list(l1.cpu, tuple(fields)):
        assert value == field * 0x10003 & Field(field).width.mask, Field(field).name


# --- IA32_VMX_VMCS_ENUM ---


@pytest.mark.sdm("VMCS Enumeration")
def test_vmcs_enum(l1: L1) -> None:
    """Bits 9:1 hold the highest index of any field that exists; the rest is reserved, 0."""
    l1.launchable()
    value = l1.rdmsr(Msr.IA32_VMX_VMCS_ENUM).value
    assert value & ~0x3FE == 0
    readable = _readable(l1, [int(field) for field in Field])
    assert value >> 1 == max(encoding >> 1 & 0x1FF for encoding in readable)


@pytest.mark.sdm("VMCS Enumeration")
def test_vmcs_enum_is_read_only(l1: L1) -> None:
    """WRMSR gives #GP(0)."""
    value = l1.rdmsr(Msr.IA32_VMX_VMCS_ENUM).value
    for written in (value, 0, value | 1 << 9):
        expected = Fault(Vector.GP, error_code=0, rip=0)
        assert l1.wrmsr(Msr.IA32_VMX_VMCS_ENUM, written) == expected
    assert l1.rdmsr(Msr.IA32_VMX_VMCS_ENUM) == Succeed(value)
