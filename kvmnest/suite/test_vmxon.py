"""VMXON and VMXOFF: entering and leaving VMX operation."""

import pytest

from kvmnest.l1 import L1, Mode
from kvmnest.vmx import Cr0, Cr4, Vector, VmxError
from kvmnest.vmx.outcome import Fault, Succeed, VMfailInvalid, VMfailValid

pytestmark = [
    pytest.mark.series(3),
    pytest.mark.sdm("VMXON - Enter VMX Operation"),
]


def test_vmxon_enters_vmx_operation(l1: L1) -> None:
    """VMXON with a good region succeeds, and VMPTRST then shows that no VMCS is current."""
    assert l1.vmxon() == Succeed()
    assert l1.vmptrst() == Succeed(0xFFFFFFFFFFFFFFFF)


def test_vmxon_in_compatibility_mode(l1: L1) -> None:
    """VMXON is invalid in compatibility mode: #UD."""
    assert l1.vmxon(mode=Mode.COMPAT) == Fault(Vector.UD, error_code=0, rip=0)


def test_vmxon_without_cr4_vmxe(l1: L1) -> None:
    """CR4.VMXE clear: #UD."""
    cr4 = l1.read_cr(4).value
    assert l1.write_cr(4, cr4 & ~Cr4.VMXE) == Succeed()
    assert l1.vmxon() == Fault(Vector.UD, error_code=0, rip=0)


def test_vmxon_without_cr4_vmxe_at_cpl_3(l1: L1) -> None:
    """The #UD for CR4.VMXE comes before the privilege check."""
    cr4 = l1.read_cr(4).value
    assert l1.write_cr(4, cr4 & ~Cr4.VMXE) == Succeed()
    assert l1.vmxon(cpl=3) == Fault(Vector.UD, error_code=0, rip=0)


def test_vmxon_at_cpl_3(l1: L1) -> None:
    """CPL 3 outside VMX operation: #GP(0)."""
    assert l1.vmxon(cpl=3) == Fault(Vector.GP, error_code=0, rip=0)


def test_vmxon_at_cpl_3_in_vmx_root(l1: L1) -> None:
    """CPL 3 in VMX root operation: #GP(0), not VMfail."""
    l1.enter_vmx()
    assert l1.vmxon(cpl=3) == Fault(Vector.GP, error_code=0, rip=0)


@pytest.mark.sdm("Restrictions on VMX Operation")
def test_vmxon_without_cr0_ne(l1: L1) -> None:
    """CR0 must have the bits that IA32_VMX_CR0_FIXED0 fixes to 1, NE among them: #GP(0)."""
    assert l1.caps.cr0_fixed0 & Cr0.NE
    cr0 = l1.read_cr(0).value
    assert l1.write_cr(0, cr0 & ~Cr0.NE) == Succeed()
    assert l1.vmxon() == Fault(Vector.GP, error_code=0, rip=0)
    assert l1.write_cr(0, cr0) == Succeed()
    assert l1.vmxon() == Succeed()


@pytest.mark.parametrize("offset", [1, 8, 0x10, 0x800, 0xFFF], ids=hex)
def test_vmxon_region_not_aligned(l1: L1, offset: int) -> None:
    """Bits 11:0 of the pointer must be 0: VMfailInvalid."""
    region = l1.prepare_region(l1.sym("vmxon_region"))
    assert l1.vmxon(region + offset) == VMfailInvalid()
    assert l1.vmxoff() == Fault(Vector.UD)


def test_vmxon_region_beyond_physical_address_width(l1: L1) -> None:
    """The pointer must not set a bit beyond the physical-address width: VMfailInvalid."""
    width = l1.cpuid(0x80000008).value[0] & 0xFF
    for bit in sorted({width, 51, 52, 63}):
        assert l1.vmxon(l1.sym("vmxon_region") | 1 << bit) == VMfailInvalid()
    assert l1.vmxon() == Succeed()


@pytest.mark.sdm("VMXON Region")
@pytest.mark.parametrize("change", [1, 0x100, 0x40000000], ids=hex)
def test_vmxon_region_with_other_revision(l1: L1, change: int) -> None:
    """The region must begin with the VMCS revision identifier: VMfailInvalid."""
    revision = l1.caps.basic.revision_id
    region = l1.prepare_region(l1.sym("vmxon_region"), revision ^ change)
    assert l1.vmxon(region) == VMfailInvalid()


@pytest.mark.sdm("VMXON Region")
def test_vmxon_region_with_shadow_indicator(l1: L1) -> None:
    """Bit 31 of the region's first 4 bytes must be 0: VMfailInvalid."""
    revision = l1.caps.basic.revision_id
    region = l1.prepare_region(l1.sym("vmxon_region"), revision | 1 << 31)
    assert l1.vmxon(region) == VMfailInvalid()


def test_vmxon_in_root_without_current_vmcs(l1: L1) -> None:
    """VMXON in VMX root operation without a current VMCS: VMfailInvalid."""
    l1.enter_vmx()
    assert l1.vmxon() == VMfailInvalid()


def test_vmxon_in_root_with_current_vmcs(l1: L1) -> None:
    """VMXON in VMX root operation with a current VMCS: error 15."""
    l1.launchable()
    assert l1.vmxon() == VMfailValid(VmxError.VMXON_IN_ROOT)


def test_vmxon_in_root_does_not_read_its_operand_region(l1: L1) -> None:
    """In VMX root operation the region's content is not looked at before error 15."""
    l1.launchable()
    assert l1.vmxon(0x123) == VMfailValid(VmxError.VMXON_IN_ROOT)


@pytest.mark.parametrize(
    ("at", "vector"),
    [
        pytest.param(0x40000000, Vector.PF, id="not-mapped"),
        pytest.param(0x8000000000000000, Vector.GP, id="not-canonical"),
    ],
)
def test_vmxon_operand_fault(l1: L1, at: int, vector: Vector) -> None:
    """The operand is a memory read with its usual faults."""
    seen = l1.vmxon(at=at)
    assert seen == Fault(vector, error_code=0, rip=0)
    if vector == Vector.PF:
        assert seen == Fault(vector, cr2=at)


def test_vmxon_operand_through_ss_not_canonical(l1: L1) -> None:
    """A non-canonical address through SS: #SS(0)."""
    assert l1.vmxon(at=0x8000000000000000, via_ss=True) == Fault(Vector.SS, error_code=0, rip=0)


# --- VMXOFF ---


@pytest.mark.sdm("VMXOFF - Leave VMX Operation")
def test_vmxoff_leaves_vmx_operation(l1: L1) -> None:
    """After VMXOFF the VMX instructions give #UD, and VMXON works again."""
    l1.enter_vmx()
    assert l1.vmxoff() == Succeed()
    assert l1.vmptrst() == Fault(Vector.UD)
    assert l1.vmxon() == Succeed()


@pytest.mark.sdm("VMXOFF - Leave VMX Operation")
def test_vmxoff_outside_vmx_operation(l1: L1) -> None:
    """VMXOFF outside VMX operation: #UD, at CPL 3 too."""
    assert l1.vmxoff() == Fault(Vector.UD, error_code=0, rip=0)
    assert l1.vmxoff(cpl=3) == Fault(Vector.UD, error_code=0, rip=0)


@pytest.mark.sdm("VMXOFF - Leave VMX Operation")
def test_vmxoff_at_cpl_3(l1: L1) -> None:
    """VMXOFF at CPL 3: #GP(0), and VMX operation goes on."""
    l1.enter_vmx()
    assert l1.vmxoff(cpl=3) == Fault(Vector.GP, error_code=0, rip=0)
    assert l1.vmptrst() == Succeed(0xFFFFFFFFFFFFFFFF)


@pytest.mark.sdm("VMXOFF - Leave VMX Operation")
def test_vmxoff_in_compatibility_mode(l1: L1) -> None:
    """VMXOFF is invalid in compatibility mode: #UD."""
    l1.enter_vmx()
    assert l1.vmxoff(mode=Mode.COMPAT) == Fault(Vector.UD, error_code=0, rip=0)


@pytest.mark.sdm("VMXOFF - Leave VMX Operation")
def test_vmxoff_forgets_the_current_vmcs(l1: L1) -> None:
    """The current-VMCS pointer is invalid after VMXOFF and VMXON."""
    l1.launchable()
    assert l1.vmxoff() == Succeed()
    assert l1.vmxon() == Succeed()
    assert l1.vmptrst() == Succeed(0xFFFFFFFFFFFFFFFF)
    assert l1.vmlaunch() == VMfailInvalid()
