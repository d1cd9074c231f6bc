"""VMCLEAR, VMPTRLD and VMPTRST: the VMCS pointer as an operand, and what they do to a VMCS."""

from typing import Any

import pytest

from kvmnest.l1 import L1, Mode
from kvmnest.vmx import ExitReason, Field, Vector, VmxError
from kvmnest.vmx.outcome import Exit, Fault, Outcome, Succeed, VMfailInvalid, VMfailValid

NO_VMCS = 0xFFFFFFFFFFFFFFFF

clear = [
    pytest.mark.series(9),
    pytest.mark.sdm("VMCLEAR - Clear Virtual-Machine Control Structure"),
]
load = [
    pytest.mark.series(10),
    pytest.mark.sdm("VMPTRLD - Load Pointer to Virtual-Machine Control Structure"),
]
store = [
    pytest.mark.series(11),
    pytest.mark.sdm("VMPTRST - Store Pointer to Virtual-Machine Control Structure"),
]
BOTH = [pytest.param("vmclear", marks=clear), pytest.param("vmptrld", marks=load)]
ALL = [*BOTH, pytest.param("vmptrst", marks=store)]
INVALID_ADDRESS = {
    "vmclear": VmxError.VMCLEAR_INVALID_ADDRESS,
    "vmptrld": VmxError.VMPTRLD_INVALID_ADDRESS,
}
VMXON_POINTER = {
    "vmclear": VmxError.VMCLEAR_VMXON_POINTER,
    "vmptrld": VmxError.VMPTRLD_VMXON_POINTER,
}


def _do(l1: L1, name: str, address: int = 0, **how: Any) -> Outcome:
    if name == "vmptrst":
        return l1.vmptrst(**how)
    if name == "vmclear":
        return l1.vmclear(address, **how)
    return l1.vmptrld(address, **how)


def _region(l1: L1, name: str = "vmcs_b") -> int:
    return l1.prepare_region(l1.sym(name))


# --- where they may be executed ---


@pytest.mark.parametrize("name", ALL)
def test_outside_vmx_operation(l1: L1, name: str) -> None:
    """#UD outside VMX operation, whatever the CPL."""
    assert _do(l1, name) == Fault(Vector.UD, error_code=0, rip=0)
    assert _do(l1, name, cpl=3) == Fault(Vector.UD, error_code=0, rip=0)


@pytest.mark.parametrize("name", ALL)
def test_at_cpl_3(l1: L1, name: str) -> None:
    """#GP(0) at CPL 3, and the operand is not read: no #PF for an unmapped one."""
    l1.launchable()
    before = l1.vmptrst()
    address = _region(l1)
    assert _do(l1, name, address, cpl=3) == Fault(Vector.GP, error_code=0, rip=0)
    assert _do(l1, name, address, cpl=3, at=0x40000000) == Fault(Vector.GP, error_code=0, rip=0)
    assert l1.vmptrst() == before


@pytest.mark.parametrize("name", ALL)
def test_in_compatibility_mode(l1: L1, name: str) -> None:
    """#UD in compatibility mode."""
    l1.launchable()
    assert _do(l1, name, mode=Mode.COMPAT) == Fault(Vector.UD, error_code=0, rip=0)


# --- the memory operand ---


@pytest.mark.parametrize("name", ALL)
def test_operand_not_mapped(l1: L1, name: str) -> None:
    """#PF at the operand's address; bit 1 of the error code tells a write."""
    l1.enter_vmx()
    write = 2 if name == "vmptrst" else 0
    at = 0x40000120
    assert _do(l1, name, at=at) == Fault(Vector.PF, error_code=write, cr2=at, rip=0)


@pytest.mark.parametrize("name", ALL)
def test_operand_across_a_page_end(l1: L1, name: str) -> None:
    """The operand has 64 bits: #PF at the second page when it is not mapped."""
    l1.enter_vmx()
    page = l1.alloc(2)
    entry = l1.sym("l1_pml4_pt") + 8 * ((page >> 12) + 1)
    l1.write_int(entry, 0)
    assert l1.execute("invlpg", {}, at=page + 0x1000) == Succeed()
    write = 2 if name == "vmptrst" else 0
    expected = Fault(Vector.PF, error_code=write, cr2=page + 0x1000, rip=0)
    assert _do(l1, name, at=page + 0xFFC) == expected


@pytest.mark.parametrize("name", ALL)
def test_operand_not_canonical(l1: L1, name: str) -> None:
    """#GP(0) through DS, #SS(0) through SS."""
    l1.enter_vmx()
    at = 0x8000000000000000
    assert _do(l1, name, at=at) == Fault(Vector.GP, error_code=0, rip=0)
    assert _do(l1, name, at=at, via_ss=True) == Fault(Vector.SS, error_code=0, rip=0)


@pytest.mark.parametrize("name", ALL)
def test_operand_through_ss(l1: L1, name: str) -> None:
    """An operand addressed through SS works like one through DS."""
    l1.enter_vmx()
    assert _do(l1, name, _region(l1), via_ss=True) == Succeed()


@pytest.mark.series(11)
@pytest.mark.sdm("VMPTRST - Store Pointer to Virtual-Machine Control Structure")
def test_vmptrst_to_a_read_only_page(l1: L1) -> None:
    """VMPTRST to a page that is not writable: #PF with P and W/R set, nothing is stored."""
    l1.enter_vmx()
    page = l1.alloc()
    l1.write_int(page, 0x1234)
    l1.write_int(l1.sym("l1_pml4_pt") + 8 * (page >> 12), page | 0x65)
    assert l1.execute("invlpg", {}, at=page) == Succeed()
    assert l1.vmptrst(at=page) == Fault(Vector.PF, error_code=3, cr2=page, rip=0)
    assert l1.read_int(page) == 0x1234


# --- the pointer ---


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("offset", [1, 8, 0x800, 0xFFF], ids=hex)
def test_pointer_not_aligned(l1: L1, name: str, offset: int) -> None:
    """Bits 11:0 must be 0: error 2 or 9 with a current VMCS."""
    l1.launchable()
    outcome = _do(l1, name, _region(l1) + offset)
    assert outcome == VMfailValid(INVALID_ADDRESS[name])


@pytest.mark.parametrize("name", BOTH)
def test_pointer_not_aligned_without_current_vmcs(l1: L1, name: str) -> None:
    """Without a current VMCS there is no place for the number: VMfailInvalid."""
    l1.enter_vmx()
    assert _do(l1, name, _region(l1) + 8) == VMfailInvalid()


@pytest.mark.parametrize("name", BOTH)
def test_pointer_beyond_physical_address_width(l1: L1, name: str) -> None:
    """A bit beyond the physical-address width: error 2 or 9."""
    l1.launchable()
    width = l1.cpuid(0x80000008).value[0] & 0xFF
    for bit in sorted({width, 51, 52, 63}):
        outcome = _do(l1, name, _region(l1) | 1 << bit)
        assert outcome == VMfailValid(INVALID_ADDRESS[name])


@pytest.mark.parametrize("name", BOTH)
def test_pointer_is_the_vmxon_pointer(l1: L1, name: str) -> None:
    """The VMXON region is no VMCS: error 3 or 10."""
    l1.launchable()
    outcome = _do(l1, name, l1.sym("vmxon_region"))
    assert outcome == VMfailValid(VMXON_POINTER[name])


@pytest.mark.parametrize("name", BOTH)
def test_pointer_is_the_vmxon_pointer_without_current_vmcs(l1: L1, name: str) -> None:
    """The same without a current VMCS: VMfailInvalid."""
    l1.enter_vmx()
    assert _do(l1, name, l1.sym("vmxon_region")) == VMfailInvalid()


@pytest.mark.parametrize("name", BOTH)
def test_failure_keeps_the_current_vmcs(l1: L1, name: str) -> None:
    """A failed VMCLEAR or VMPTRLD leaves the current VMCS current, and launchable."""
    vmcs = l1.launchable()
    assert _do(l1, name, _region(l1) + 8) == VMfailValid(INVALID_ADDRESS[name])
    assert l1.vmptrst() == Succeed(vmcs.address)
    assert l1.vmlaunch() == Exit(ExitReason.VMCALL)


# --- VMCLEAR ---


@pytest.mark.series(9)
@pytest.mark.sdm("VMCLEAR - Clear Virtual-Machine Control Structure")
class TestVmclear:
    """What VMCLEAR does to the current VMCS and to others."""

    def test_of_the_current_vmcs(self, l1: L1) -> None:
        """The current-VMCS pointer becomes invalid."""
        vmcs = l1.launchable()
        assert l1.vmptrst() == Succeed(vmcs.address)
        assert l1.vmclear(vmcs.address) == Succeed()
        assert l1.vmptrst() == Succeed(NO_VMCS)
        assert l1.vmread(Field.GUEST_RIP) == VMfailInvalid()

    def test_of_another_vmcs(self, l1: L1) -> None:
        """VMCLEAR of a VMCS that is not current leaves the current one."""
        vmcs = l1.launchable()
        assert l1.vmclear(_region(l1)) == Succeed()
        assert l1.vmptrst() == Succeed(vmcs.address)
        assert l1.vmlaunch() == Exit(ExitReason.VMCALL)

    def test_does_not_look_at_the_revision(self, l1: L1) -> None:
        """VMCLEAR initialises a region whatever revision identifier it holds."""
        l1.enter_vmx()
        region = l1.prepare_region(l1.sym("vmcs_b"), 0x7FFFFFFF)
        assert l1.vmclear(region) == Succeed()

    def test_without_a_current_vmcs(self, l1: L1) -> None:
        """VMCLEAR works without a current VMCS, and twice."""
        l1.enter_vmx()
        assert l1.vmclear(_region(l1)) == Succeed()
        assert l1.vmclear(_region(l1)) == Succeed()
        assert l1.vmptrst() == Succeed(NO_VMCS)


# --- VMPTRLD ---


@pytest.mark.series(10)
@pytest.mark.sdm("VMPTRLD - Load Pointer to Virtual-Machine Control Structure")
class TestVmptrld:
    """What VMPTRLD accepts and does."""

    def test_makes_the_vmcs_current(self, l1: L1) -> None:
        """VMPTRST shows the pointer that VMPTRLD loaded."""
        l1.enter_vmx()
        region = _region(l1)
        assert l1.vmclear(region) == Succeed()
        assert l1.vmptrld(region) == Succeed()
        assert l1.vmptrst() == Succeed(region)

    @pytest.mark.parametrize("change", [1, 0x100, 0x40000000], ids=hex)
    def test_other_revision(self, l1: L1, change: int) -> None:
        """The revision identifier must be the processor's: error 11."""
        vmcs = l1.launchable()
        region = l1.prepare_region(l1.sym("vmcs_b"), l1.caps.basic.revision_id ^ change)
        assert l1.vmptrld(region) == VMfailValid(VmxError.VMPTRLD_INCORRECT_REVISION_ID)
        assert l1.vmptrst() == Succeed(vmcs.address)

    def test_other_revision_without_current_vmcs(self, l1: L1) -> None:
        """The same without a current VMCS: VMfailInvalid."""
        l1.enter_vmx()
        region = l1.prepare_region(l1.sym("vmcs_b"), l1.caps.basic.revision_id ^ 1)
        assert l1.vmptrld(region) == VMfailInvalid()
        assert l1.vmptrst() == Succeed(NO_VMCS)

    def test_keeps_the_vmcs_that_was_current(self, l1: L1) -> None:
        """The VMCS that was current before stays as it is and can be loaded again."""
        vmcs = l1.launchable()
        vmcs[Field.GUEST_RSP] = 0x1238
        vmcs.flush()
        region = _region(l1)
        assert l1.vmclear(region) == Succeed()
        assert l1.vmptrld(region) == Succeed()
        assert l1.vmwrite(Field.GUEST_RSP, 0x777) == Succeed()
        assert l1.vmptrld(vmcs.address) == Succeed()
        assert l1.vmread(Field.GUEST_RSP) == Succeed(0x1238)
        assert l1.vmptrld(region) == Succeed()
        assert l1.vmread(Field.GUEST_RSP) == Succeed(0x777)


# --- VMPTRST ---


@pytest.mark.series(11)
@pytest.mark.sdm("VMPTRST - Store Pointer to Virtual-Machine Control Structure")
class TestVmptrst:
    """What VMPTRST stores."""

    def test_without_current_vmcs(self, l1: L1) -> None:
        """All ones when there is no current VMCS."""
        l1.enter_vmx()
        assert l1.vmptrst() == Succeed(NO_VMCS)

    def test_stores_64_bits_only(self, l1: L1) -> None:
        """Exactly 8 bytes are written."""
        vmcs = l1.launchable()
        page = l1.alloc()
        l1.write(page, b"\xa5" * 64)
        assert l1.vmptrst(at=page + 16) == Succeed(vmcs.address)
        content = l1.read(page, 64)
        assert content[:16] == b"\xa5" * 16
        assert content[16:24] == vmcs.address.to_bytes(8, "little")
        assert content[24:] == b"\xa5" * 40

    def test_follows_vmptrld(self, l1: L1) -> None:
        """Each VMPTRLD shows."""
        l1.enter_vmx()
        for name in ("vmcs_a", "vmcs_b", "vmcs_c"):
            region = _region(l1, name)
            assert l1.vmclear(region) == Succeed()
            assert l1.vmptrld(region) == Succeed()
            assert l1.vmptrst() == Succeed(region)
