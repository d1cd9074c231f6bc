"""INVEPT and INVVPID in L1: types, descriptors, operands, capabilities."""

from __future__ import annotations

from typing import Any

import pytest

from kvmnest.l1 import L1, Mode
from kvmnest.suite.support.entries import address_bits, not_canonical
from kvmnest.suite.support.ept import poke
from kvmnest.vmx import EptVpidCap, ExitReason, Field, Msr, Proc2Ctl, Vector, VmxError
from kvmnest.vmx.outcome import Exit, Fault, Outcome, Succeed, VMfailInvalid, VMfailValid

INVALID = VMfailValid(VmxError.INVALID_OPERAND_TO_INVEPT_INVVPID)
INDIVIDUAL, SINGLE, ALL, SINGLE_KEEP_GLOBAL = range(4)

_EPT = [
    pytest.mark.sdm("INVEPT - Invalidate Translations Derived from EPT"),
    pytest.mark.needs(EptVpidCap.INVEPT),
]
_VPID = [
    pytest.mark.sdm("INVVPID - Invalidate Translations Based on VPID"),
    pytest.mark.needs(EptVpidCap.INVVPID),
]
pytestmark = [pytest.mark.series(17)]
invept = pytest.mark.parametrize("name", [pytest.param("invept", marks=_EPT)])
invvpid = pytest.mark.parametrize("name", [pytest.param("invvpid", marks=_VPID)])
both = pytest.mark.parametrize(
    "name", [pytest.param("invept", marks=_EPT), pytest.param("invvpid", marks=_VPID)]
)

_TYPES = {
    "invept": {
        SINGLE: EptVpidCap.INVEPT_SINGLE_CONTEXT,
        ALL: EptVpidCap.INVEPT_ALL_CONTEXTS,
    },
    "invvpid": {
        INDIVIDUAL: EptVpidCap.INVVPID_INDIVIDUAL_ADDRESS,
        SINGLE: EptVpidCap.INVVPID_SINGLE_CONTEXT,
        ALL: EptVpidCap.INVVPID_ALL_CONTEXTS,
        SINGLE_KEEP_GLOBAL: EptVpidCap.INVVPID_SINGLE_CONTEXT_RETAINING_GLOBALS,
    },
}
#: Not types: beyond the last, ones that a shift by 32 or 64 would take for 1, negative ones.
_BAD_TYPES = (
    *(4, 5, 7, 31, 32, 33, 34, 63, 64, 65, 66),
    *(1 << bit | SINGLE for bit in (7, 8, 16, 31, 32, 33, 63)),
    (1 << 64) - 1,
    (1 << 64) - 2,
)


def _supported(l1: L1, name: str) -> list[int]:
    return [kind for kind, flag in _TYPES[name].items() if l1.caps.supports(flag)]


def _do(l1: L1, name: str, kind: int = ALL, **how: Any) -> Outcome:
    """Execute with a good descriptor of the present EPT pointer or VPID 1."""
    if name == "invept":
        return l1.invept(kind, l1.sym("ept_pml4") | 0x1E, **how)
    return l1.invvpid(kind, 1, 0x1000, **how)


@both
def test_supported_types(l1: L1, name: str) -> None:
    """Every type that IA32_VMX_EPT_VPID_CAP reports succeeds; registers and memory stay."""
    l1.launchable()
    kinds = _supported(l1, name)
    assert kinds
    for kind in kinds:
        seen = _do(l1, name, kind, regs={"rbx": 0x1234, "r15": 0x5678})
        assert seen == Succeed(), kind
        assert (seen.regs["rax"], seen.regs["rbx"], seen.regs["r15"]) == (kind, 0x1234, 0x5678)
    assert l1.vmlaunch() == Exit(ExitReason.VMCALL)


@both
def test_unsupported_types(l1: L1, name: str) -> None:
    """Every other type is error 28: the type has 64 bits."""
    l1.launchable()
    kinds = [kind for kind in range(4) if kind not in _supported(l1, name)]
    for kind in (*kinds, *_BAD_TYPES):
        assert _do(l1, name, kind) == INVALID, hex(kind)
    assert l1.vmlaunch() == Exit(ExitReason.VMCALL)


@both
def test_type_withdrawn_by_the_host(l1: L1, name: str) -> None:
    """A type that the host takes out of IA32_VMX_EPT_VPID_CAP is error 28."""
    cap = l1.vcpu.get_msrs([Msr.IA32_VMX_EPT_VPID_CAP])[Msr.IA32_VMX_EPT_VPID_CAP]
    kept = _TYPES[name][ALL]
    gone = [flag for kind, flag in _TYPES[name].items() if kind != ALL]
    assert cap & kept
    for flag in gone:
        cap &= ~flag.value
    l1.set_feature_msrs({Msr.IA32_VMX_EPT_VPID_CAP: cap})
    l1.launchable()
    assert _do(l1, name, ALL) == Succeed()
    for kind in _TYPES[name]:
        if kind != ALL:
            assert _do(l1, name, kind) == INVALID, kind


@both
def test_without_current_vmcs(l1: L1, name: str) -> None:
    """A bad type without a current VMCS: VMfailInvalid; a good one succeeds."""
    l1.enter_vmx()
    assert _do(l1, name, 9) == VMfailInvalid()
    for kind in _supported(l1, name):
        assert _do(l1, name, kind) == Succeed()


@both
def test_where_it_is_not_allowed(l1: L1, name: str) -> None:
    """#UD outside VMX operation and in compatibility mode, #GP(0) at CPL 3; operands or not."""
    undefined = Fault(Vector.UD, error_code=0, rip=0)
    protection = Fault(Vector.GP, error_code=0, rip=0)
    assert _do(l1, name) == undefined
    assert _do(l1, name, cpl=3) == undefined
    assert _do(l1, name, at=0x40000000) == undefined
    l1.enter_vmx()
    assert _do(l1, name) == Succeed()
    assert _do(l1, name, mode=Mode.COMPAT) == undefined
    assert _do(l1, name, cpl=3) == protection
    assert _do(l1, name, 9, cpl=3) == protection
    assert _do(l1, name, cpl=3, at=0x40000000) == protection
    assert l1.vmxoff() == Succeed()
    assert _do(l1, name) == undefined


@both
def test_operand_faults(l1: L1, name: str) -> None:
    """The descriptor is read for every type: #PF, #GP(0), through SS #SS(0)."""
    l1.launchable()
    for kind in _supported(l1, name):
        at = 0x40000120
        assert _do(l1, name, kind, at=at) == Fault(Vector.PF, error_code=0, cr2=at, rip=0)
        at = 0x8000000000000000
        assert _do(l1, name, kind, at=at) == Fault(Vector.GP, error_code=0, rip=0)
        seen = _do(l1, name, kind, at=at, via_ss=True)
        assert seen == Fault(Vector.SS, error_code=0, rip=0)


@both
def test_operand_has_128_bits(l1: L1, name: str) -> None:
    """A descriptor whose second half lies in an unmapped page: #PF at that page."""
    l1.launchable()
    page = l1.alloc(2)
    poke(l1, l1.sym("l1_pml4_pt") + 8 * ((page >> 12) + 1), 0)
    assert l1.execute("invlpg", {}, at=page + 0x1000) == Succeed()
    expected = Fault(Vector.PF, error_code=0, cr2=page + 0x1000, rip=0)
    for at in (page + 0xFF8, page + 0xFF1):
        assert _do(l1, name, at=at) == expected
    l1.write_int(page + 0xFF0, 1)
    assert _do(l1, name, at=page + 0xFF0) == Succeed()


@both
def test_withdrawn_instruction(l1: L1, name: str) -> None:
    """#UD where IA32_VMX_EPT_VPID_CAP does not report the instruction."""
    flag = EptVpidCap.INVEPT if name == "invept" else EptVpidCap.INVVPID
    cap = l1.vcpu.get_msrs([Msr.IA32_VMX_EPT_VPID_CAP])[Msr.IA32_VMX_EPT_VPID_CAP]
    l1.set_feature_msrs({Msr.IA32_VMX_EPT_VPID_CAP: cap & ~flag.value})
    l1.launchable()
    assert _do(l1, name) == Fault(Vector.UD, error_code=0, rip=0)
    other = "invvpid" if name == "invept" else "invept"
    if _supported(l1, other):
        assert _do(l1, other) == Succeed()


# --- descriptors ---


@invept
def test_invept_bad_ept_pointer(l1: L1, name: str) -> None:
    """Single context: an EPT pointer that VM entry would refuse is error 28."""
    l1.launchable()
    good = l1.sym("ept_pml4") | 0x1E
    physical, _ = address_bits(l1)
    bad = {f"memory type {kind}": good & ~7 | kind for kind in (1, 2, 3, 4, 5, 7)}
    bad |= {f"walk length {n + 1}": good & ~0x38 | n << 3 for n in (0, 1, 2, 5, 6, 7)}
    bad |= {f"bit {bit}": good | 1 << bit for bit in (*range(8, 12), *range(physical, 64))}
    if not l1.caps.supports(EptVpidCap.SUPERVISOR_SHADOW_STACK):
        bad["bit 7"] = good | 1 << 7
    for text, pointer in bad.items():
        assert l1.invept(SINGLE, pointer) == INVALID, text
    assert l1.invept(SINGLE, good) == Succeed()
    if l1.caps.supports(EptVpidCap.ACCESSED_DIRTY):
        assert l1.invept(SINGLE, good | 1 << 6) == Succeed()


@invept
def test_invept_all_contexts_ignores_the_pointer(l1: L1, name: str) -> None:
    """Global: the EPT pointer in the descriptor does not matter."""
    l1.launchable()
    for pointer in (0, 7, 0xFFF, (1 << 64) - 1):
        assert l1.invept(ALL, pointer) == Succeed(), hex(pointer)


@invept
def test_invept_of_unused_tables(l1: L1, name: str) -> None:
    """Single context of tables that no VMCS uses succeeds and leaves L2 alone."""
    l1.launchable(ept=True)
    assert l1.vmlaunch() == Exit(ExitReason.VMCALL)
    for _ in range(8):
        assert l1.invept(SINGLE, l1.alloc() | 0x1E) == Succeed()
        assert l1.vmresume() == Exit(ExitReason.VMCALL)


@invvpid
def test_invvpid_reserved_bits(l1: L1, name: str) -> None:
    """Bits 63:16 of the descriptor must be 0 for every type: error 28."""
    l1.launchable()
    for kind in _supported(l1, name):
        for bit in (*range(16, 64, 5), 31, 32, 63):
            assert l1.invvpid(kind, 1 | 1 << bit) == INVALID, f"type {kind}, bit {bit}"
        assert l1.invvpid(kind, 1) == Succeed()


@invvpid
def test_invvpid_vpid_0(l1: L1, name: str) -> None:
    """VPID 0 is error 28 for each type but "all contexts", which ignores the VPID."""
    l1.launchable()
    for kind in _supported(l1, name):
        expected: Outcome = Succeed() if kind == ALL else INVALID
        assert l1.invvpid(kind, 0) == expected, kind


@invvpid
def test_invvpid_any_vpid(l1: L1, name: str) -> None:
    """Any other VPID will do, whether a VMCS uses it or not."""
    l1.launchable()
    for kind in _supported(l1, name):
        for vpid in (1, 2, 0x7FFF, 0x8000, 0xFFFF):
            assert l1.invvpid(kind, vpid) == Succeed(), f"type {kind}, VPID {vpid:#x}"


@invvpid
def test_invvpid_linear_address(l1: L1, name: str) -> None:
    """Individual address: it must be canonical, else error 28; other types ignore it."""
    l1.launchable()
    _, linear = address_bits(l1)
    top = 1 << linear - 1
    kinds = _supported(l1, name)
    assert INDIVIDUAL in kinds
    for address in not_canonical(l1):
        for kind in kinds:
            expected: Outcome = INVALID if kind == INDIVIDUAL else Succeed()
            assert l1.invvpid(kind, 1, address) == expected, f"type {kind}, {address:#x}"
    for address in (0, top - 1, (1 << 64) - top, (1 << 64) - 1):
        assert l1.invvpid(INDIVIDUAL, 1, address) == Succeed(), hex(address)


@both
def test_keeps_what_l1_and_l2_see(l1: L1, name: str) -> None:
    """Invalidations between entries disturb nothing: L2 goes on, VMCS and registers stay."""
    vmcs = l1.launchable(l2="l2_registers")
    if l1.caps.supports(Proc2Ctl.ENABLE_VPID):
        vmcs[Field.SECONDARY_VM_EXEC_CONTROL] |= Proc2Ctl.ENABLE_VPID
        vmcs.set_bits(Field.CPU_BASED_VM_EXEC_CONTROL, 1 << 31)
        vmcs[Field.VIRTUAL_PROCESSOR_ID] = 1
    start = vmcs[Field.GUEST_RIP]
    seen = l1.vmlaunch(regs={"rax": 0})
    assert seen == Exit(ExitReason.VMCALL)
    for turn in range(1, 6):
        assert seen.regs["rax"] == turn
        for kind in _supported(l1, name):
            assert _do(l1, name, kind) == Succeed()
        vmcs[Field.GUEST_RIP] = start
        seen = l1.vmresume(regs={"rax": turn})
        assert seen == Exit(ExitReason.VMCALL)
