"""VMCS shadowing: VMREAD and VMWRITE of L2 that exit, or work on the shadow VMCS."""

from __future__ import annotations

from typing import Any

import pytest

from kvmnest.kvm import Cap
from kvmnest.l1 import L1, code
from kvmnest.suite.support.bitmaps import set_io_bitmaps
from kvmnest.suite.support.guest import Masked
from kvmnest.suite.support.shadowing import (
    FLAGS,
    READ,
    READ_MEMORY,
    SHADOW,
    WRITE,
    WRITE_MEMORY,
    Shadowing,
    flags,
)
from kvmnest.vmx import (
    ExitReason,
    Field,
    InstructionInfo,
    Kind,
    Misc,
    Proc2Ctl,
    ProcCtl,
    Rflags,
    Vector,
    VmxError,
    Width,
)
from kvmnest.vmx.outcome import Exit, Fault, HostExit, Succeed, VMfailInvalid, VMfailValid
from kvmnest.vmx.registers import STATUS_FLAGS

pytestmark = [
    pytest.mark.series(13),
    pytest.mark.sdm("VMCS Shadowing Bitmap Addresses"),
    pytest.mark.needs(Proc2Ctl.VMCS_SHADOWING),
]

CF, ZF = int(Rflags.CF), int(Rflags.ZF)
RAX, RBX, RDI = 0, 3, 7
NO_LINK = 0xFFFFFFFFFFFFFFFF
ABSENT = 0x03FE
#: Fields of each width and kind, some of them such that hypervisors keep close at hand.
SOME = (
    *(Field.GUEST_ES_SELECTOR, Field.GUEST_CS_SELECTOR, Field.HOST_FS_SELECTOR),
    *(Field.TSC_OFFSET, Field.VMCS_LINK_POINTER, Field.GUEST_IA32_DEBUGCTL, Field.IO_BITMAP_A),
    *(Field.EXCEPTION_BITMAP, Field.PIN_BASED_VM_EXEC_CONTROL, Field.GUEST_INTERRUPTIBILITY_INFO),
    *(Field.GUEST_SYSENTER_CS, Field.HOST_IA32_SYSENTER_CS, Field.VM_ENTRY_INTR_INFO_FIELD),
    *(Field.GUEST_CR0, Field.GUEST_RIP, Field.GUEST_RSP, Field.HOST_RSP, Field.CR0_READ_SHADOW),
)


def _info(name: str) -> Any:
    """Instruction information of the register forms in ``support.shadowing``."""
    info = InstructionInfo(register=True, reg1=RBX, reg2=RAX)
    return Masked(info.encode(), 0xF << 28 | 1 << 10 | 0xF << 3)


def _exit(shadowing: Shadowing, name: str) -> Exit:
    reason = ExitReason.VMREAD if name == "vmread" else ExitReason.VMWRITE
    any_qualification = Masked(0, 0)
    return shadowing.guest.exit(reason, 3, qualification=any_qualification, info=_info(name))


def _values(salt: int = 0) -> dict[Field, int]:
    return {f: (f * 0x0001000100010001 + salt) & f.width.mask for f in SOME}


BOTH = pytest.mark.parametrize("name", ["vmread", "vmwrite"])


def _do(shadowing: Shadowing, name: str, field: int) -> Any:
    return shadowing.read(field) if name == "vmread" else shadowing.write(field, 0x1234)


def test_read(l1: L1) -> None:
    """With its bit clear a VMREAD gives the shadow VMCS's field, not the current VMCS's."""
    shadowing = Shadowing(l1)
    shadowing.fill(_values())
    for field, value in _values().items():
        seen = shadowing.read(field)
        assert flags(seen) == 0, field.name
        assert seen.regs["rbx"] == value, field.name
        assert shadowing.guest.changed(seen, "rbx", "r15", "rax") == {}


def test_write(l1: L1) -> None:
    """With its bit clear a VMWRITE changes the shadow VMCS, and the current VMCS stays."""
    shadowing = Shadowing(l1)
    shadowing.fill(_values())
    own = {field: l1.vmread(field).value for field in SOME}
    changed_by_l2 = (Field.GUEST_RIP, Field.GUEST_RSP)
    for field, value in _values(0x77).items():
        assert flags(shadowing.write(field, value | ~field.width.mask)) == 0, field.name
        seen = shadowing.read(field)
        assert seen.regs["rbx"] == value, field.name
    assert shadowing.content(*SOME) == _values(0x77)
    for field, value in own.items():
        if field not in changed_by_l2:
            assert l1.vmread(field) == Succeed(value), field.name


@BOTH
def test_exit_by_bitmap(l1: L1, name: str) -> None:
    """With its bit set the access exits: nothing else of the same byte does, nor of the twin."""
    shadowing = Shadowing(l1)
    shadowing.fill(_values())
    other = "vmwrite" if name == "vmread" else "vmread"
    for field in SOME[::2]:
        bits = ([field], []) if name == "vmread" else ([], [field])
        shadowing.exits(*bits)
        assert _do(shadowing, name, field) == _exit(shadowing, name), field.name
        assert flags(_do(shadowing, other, field)) == 0, field.name
        for neighbour in SOME[1::3]:
            if neighbour != field:
                assert flags(_do(shadowing, name, neighbour)) == 0, neighbour.name


def test_all_bits_but_one(l1: L1) -> None:
    """With all bits set but one only that field is shadowed."""
    shadowing = Shadowing(l1)
    shadowing.fill(_values())
    for name in ("vmread", "vmwrite"):
        for field in SOME[:8]:
            shadowing.exits_all_but(field)
            assert flags(_do(shadowing, name, field)) == 0, field.name
            for neighbour in (SOME[8], SOME[-1], field | 1):
                assert _do(shadowing, name, neighbour) == _exit(shadowing, name)


def test_first_and_last_bit(l1: L1) -> None:
    """The bitmap covers encodings 0 to 0x7fff."""
    shadowing = Shadowing(l1)
    for name in ("vmread", "vmwrite"):
        for encoding in (0, 0x7FFF):
            shadowing.exits_all_but(encoding)
            seen = _do(shadowing, name, encoding)
            assert seen == Succeed(), hex(encoding)
            shadowing.exits([encoding], [encoding])
            assert _do(shadowing, name, encoding) == _exit(shadowing, name), hex(encoding)


def test_field_beyond_the_bitmap(l1: L1) -> None:
    """A field operand with any of bits 63:15 set exits, whatever the bitmaps hold."""
    shadowing = Shadowing(l1)
    for name in ("vmread", "vmwrite"):
        for bit in (*range(15, 64, 4), 32, 63):
            field = Field.GUEST_RSP | 1 << bit
            assert _do(shadowing, name, field) == _exit(shadowing, name), bit


def test_without_link_pointer(l1: L1) -> None:
    """Link pointer all ones: VMfailInvalid in L2; an access that exits exits all the same."""
    shadowing = Shadowing(l1)
    shadowing.guest.vmcs[Field.VMCS_LINK_POINTER] = NO_LINK
    for name in ("vmread", "vmwrite"):
        for field in (*SOME, ABSENT, Field.VM_EXIT_REASON):
            seen = _do(shadowing, name, field)
            assert flags(seen) == CF, hex(field)
            assert shadowing.guest.changed(seen, "r15", "rax", "rbx") == {}
            if name == "vmread":
                assert seen.regs["rbx"] == shadowing.guest.loaded["rbx"]
        shadowing.exits([SOME[0]], [SOME[0]])
        assert _do(shadowing, name, SOME[0]) == _exit(shadowing, name)
        shadowing.exits([], [])


def test_unsupported_field(l1: L1) -> None:
    """A field that does not exist: VMfailValid in L2, without an exit."""
    shadowing = Shadowing(l1)
    for name in ("vmread", "vmwrite"):
        for field in (ABSENT, Field.encode(Width.NATURAL, Kind.HOST, 0x1FF), 0x1000):
            seen = _do(shadowing, name, field)
            assert flags(seen) == ZF, hex(field)
        assert flags(_do(shadowing, name, SOME[0])) == 0


@BOTH
@pytest.mark.sdm("VM Instruction Error Numbers")
def test_error_of_l2_belongs_to_its_vmcs(l1: L1, name: str) -> None:
    """The number is written to the VMCS that runs L2, to no shadow VMCS and no other one."""
    shadowing = Shadowing(l1)
    linked, error = shadowing.region, Field.VM_INSTRUCTION_ERROR
    others = [linked, l1.sym("vmcs_c"), l1.alloc()]
    for region, shadow in zip(others[1:], (SHADOW, 0), strict=True):
        l1.prepare_region(region, l1.caps.basic.revision_id | shadow)
        assert l1.vmclear(region) == Succeed()
    for region in others:
        assert l1.vmptrld(region) == Succeed()
        assert l1.vmxon() == VMfailValid(VmxError.VMXON_IN_ROOT)
        assert l1.vmclear(region) == Succeed()
    assert l1.vmptrld(shadowing.guest.vmcs.address) == Succeed()
    assert flags(_do(shadowing, name, ABSENT)) == ZF
    assert l1.vmread(error) == Succeed(VmxError.UNSUPPORTED_VMCS_COMPONENT)
    for region in others:
        shadowing.region = region
        assert shadowing.content(error) == {error: VmxError.VMXON_IN_ROOT}


def test_read_only_field(l1: L1) -> None:
    """A VMWRITE of exit information works or fails as IA32_VMX_MISC says."""
    shadowing = Shadowing(l1)
    expected = 0 if l1.caps.supports(Misc.VMWRITE_ANY_FIELD) else ZF
    for field in (Field.VM_EXIT_REASON, Field.EXIT_QUALIFICATION, Field.GUEST_LINEAR_ADDRESS):
        assert flags(shadowing.write(field, 0x5A)) == expected, field.name
        if not expected:
            assert shadowing.read(field).regs["rbx"] == 0x5A
            assert shadowing.content(field) == {field: 0x5A}


@BOTH
@pytest.mark.sdm("Relative Priority of Faults and VM Exits")
def test_at_cpl_3(l1: L1, name: str) -> None:
    """At CPL 3 a shadowed access gives #GP(0) in L2, one that exits exits."""
    shadowing = Shadowing(l1)
    shadowing.guest.set_cpl(3)
    text = READ if name == "vmread" else WRITE
    regs = {"rax": int(SOME[0]), "rbx": 0x55}
    seen = shadowing.guest.run(text, regs)
    assert seen == Fault(Vector.GP, error_code=0, rip=0)
    shadowing.exits([SOME[0]], [SOME[0]])
    seen = shadowing.guest.run(text, regs)
    assert seen == _exit(shadowing, name)


@BOTH
def test_memory_operand(l1: L1, name: str) -> None:
    """With memory operands, too: 64 bits are stored, and L2's page faults are L2's."""
    shadowing = Shadowing(l1)
    field, data = Field.GUEST_ES_SELECTOR, l1.sym("l2_data")
    shadowing.fill({field: 0x1234})
    l1.write(data, b"\xa5" * 16)
    text = READ_MEMORY if name == "vmread" else WRITE_MEMORY
    seen = shadowing.guest.run(text + FLAGS, {"rax": field, "rdi": data})
    assert flags(seen) == 0
    if name == "vmread":
        assert l1.read(data, 16) == b"\x34\x12" + bytes(6) + b"\xa5" * 8
    else:
        assert shadowing.content(field) == {field: 0xA5A5}
    at = 0x40000120
    seen = shadowing.guest.run(text, {"rax": field, "rdi": at})
    error = 2 if name == "vmread" else 0
    assert seen == Fault(Vector.PF, error_code=error, cr2=at, rip=0)
    seen = shadowing.guest.run(text, {"rax": field, "rdi": 1 << 63})
    assert seen == Fault(Vector.GP, error_code=0, rip=0)


def test_switched_off(l1: L1) -> None:
    """Without the control every VMREAD and VMWRITE exits, bitmaps and link pointer or not."""
    shadowing = Shadowing(l1)
    guest = shadowing.guest
    guest.off(Proc2Ctl.VMCS_SHADOWING)
    guest.vmcs[Field.VMCS_LINK_POINTER] = NO_LINK
    for name in ("vmread", "vmwrite"):
        for field in (*SOME[:6], ABSENT, 0x8000):
            assert _do(shadowing, name, field) == _exit(shadowing, name), hex(field)


def test_bitmap_is_read_at_each_access(l1: L1) -> None:
    """A change of the bitmaps between two entries counts at once."""
    shadowing = Shadowing(l1)
    shadowing.fill(_values())
    field = Field.GUEST_RIP
    for turn in range(8):
        shadowing.exits([field] * (turn % 2), [])
        seen = shadowing.read(field)
        if turn % 2:
            assert seen == _exit(shadowing, "vmread")
        else:
            assert seen.regs["rbx"] == _values()[field]


# --- the shadow VMCS in L1's hands ---


@pytest.mark.sdm("VMLAUNCH/VMRESUME - Launch/Resume Virtual Machine")
def test_shadow_vmcs_cannot_be_launched(l1: L1) -> None:
    """VMLAUNCH and VMRESUME of a current VMCS with the shadow indicator: VMfailInvalid."""
    shadowing = Shadowing(l1)
    l1.prepare_region(l1.sym("vmcs_b"), l1.caps.basic.revision_id | SHADOW)
    assert l1.vmclear(l1.sym("vmcs_b")) == Succeed()
    assert l1.vmptrld(l1.sym("vmcs_b")) == Succeed()
    for field, value in shadowing.guest.vmcs.baseline.items():
        assert l1.vmwrite(field, value) == Succeed()
    assert l1.vmlaunch() == VMfailInvalid()
    assert l1.vmresume() == VMfailInvalid()
    assert l1.vmread(Field.GUEST_RIP) == Succeed(shadowing.guest.vmcs.baseline[Field.GUEST_RIP])
    # The indicator is fixed by VMCLEAR; the same region as an ordinary VMCS can be launched.
    assert l1.vmclear(l1.sym("vmcs_b")) == Succeed()
    assert l1.read_int(l1.sym("vmcs_b"), 4) == l1.caps.basic.revision_id | SHADOW
    l1.load_vmcs("vmcs_b")
    assert l1.vmlaunch() == Exit(ExitReason.VMCALL)


@pytest.mark.sdm("VMPTRLD - Load Pointer to Virtual-Machine Control Structure")
def test_shadow_indicator_without_capability(l1: L1) -> None:
    """Where "VMCS shadowing" cannot be 1, VMPTRLD refuses the indicator: error 11."""
    msr = 0x48B
    value = l1.vcpu.get_msrs([msr])[msr]
    l1.set_feature_msrs({msr: value & ~(Proc2Ctl.VMCS_SHADOWING << 32)})
    vmcs = l1.launchable()
    region = l1.prepare_region(l1.sym("vmcs_b"), l1.caps.basic.revision_id | SHADOW)
    assert l1.vmptrld(region) == VMfailValid(VmxError.VMPTRLD_INCORRECT_REVISION_ID)
    assert l1.vmptrst() == Succeed(vmcs.address)
    assert l1.vmlaunch() == Exit(ExitReason.VMCALL)


@pytest.mark.sdm("VMREAD - Read Field from Virtual-Machine Control Structure")
def test_l1_reads_and_writes_a_shadow_vmcs(l1: L1) -> None:
    """For VMREAD and VMWRITE in VMX root operation a shadow VMCS is like any other."""
    shadowing = Shadowing(l1)
    for salt in (0, 0x5555, 0xFFFF):
        shadowing.fill(_values(salt))
        assert shadowing.content(*SOME) == _values(salt)


@pytest.mark.sdm("Software Use of the VMCS and Related Structures")
def test_two_shadow_vmcss(l1: L1) -> None:
    """The link pointer of the moment decides which shadow VMCS L2 sees."""
    shadowing = Shadowing(l1)
    first, second = shadowing.region, l1.sym("vmcs_c")
    l1.prepare_region(second, l1.caps.basic.revision_id | SHADOW)
    assert l1.vmclear(second) == Succeed()
    field = Field.HOST_RSP
    for number, region in enumerate((first, second)):
        shadowing.region = region
        shadowing.fill({field: 0x1000 + number})
    for turn in range(6):
        shadowing.guest.vmcs[Field.VMCS_LINK_POINTER] = (first, second)[turn % 2]
        seen = shadowing.read(field)
        assert flags(seen) == 0
        assert seen.regs["rbx"] == 0x1000 + turn % 2
    assert flags(shadowing.write(field, 0x9999)) == 0
    assert shadowing.content(field) == {field: 0x9999}
    shadowing.region = first
    assert shadowing.content(field) == {field: 0x1000}


def test_flags_of_l2(l1: L1) -> None:
    """VMsucceed clears all six status flags and leaves the rest of RFLAGS."""
    shadowing = Shadowing(l1)
    direction = int(Rflags.DF)
    for text in (READ, WRITE):
        seen = shadowing.guest.run(
            text + FLAGS,
            {"rax": Field.GUEST_RSP, "rbx": 1},
            GUEST_RFLAGS=2 | STATUS_FLAGS | direction,
        )
        assert seen == Succeed()
        assert seen.regs["r15"] == 2 | direction


@pytest.mark.needs(Cap.NESTED_STATE)
@pytest.mark.sdm("VMCS Shadowing")
def test_shadow_vmcs_moves_with_l2(l1: L1) -> None:
    """What L1 and L2 wrote into the shadow VMCS is there after L2 was moved into another VM."""
    shadowing = Shadowing(l1)
    shadowing.exits((), ())
    guest = shadowing.guest
    guest.on(ProcCtl.USE_IO_BITMAPS)
    set_io_bitmaps(l1, ())
    shadowing.fill({Field.GUEST_ES_LIMIT: 0x1234})
    out = code.out8(0x30)
    # L2 writes one field, stops in userspace, and reads both.
    # VMREAD RCX, RAX; MOV RAX, R8; VMREAD R9, RAX
    snippet = WRITE + out + b"\x0f\x78\xc1" + b"\x4c\x89\xc0" + b"\x41\x0f\x78\xc1"
    regs = {"rax": int(Field.GUEST_CS_LIMIT), "rbx": 0x5678, "r8": int(Field.GUEST_ES_LIMIT)}
    assert isinstance(guest.run(snippet, regs), HostExit)
    l1.round_trip()
    seen = guest.resume()
    assert seen == Succeed()
    assert (seen.regs["rcx"], seen.regs["r9"]) == (0x5678, 0x1234)
    assert shadowing.content(Field.GUEST_CS_LIMIT) == {Field.GUEST_CS_LIMIT: 0x5678}
