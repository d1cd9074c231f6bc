"""CR4.VMXE, and the bits of CR0 and CR4 that VMX operation fixes."""

import pytest

from kvmnest.l1 import L1
from kvmnest.vmx import Cr0, Cr4, Vector
from kvmnest.vmx.outcome import Fault, Succeed

pytestmark = [pytest.mark.series(4), pytest.mark.sdm("Restrictions on VMX Operation")]

GP = Fault(Vector.GP, error_code=0, rip=0)


@pytest.mark.sdm("Enabling and Entering VMX Operation")
def test_vmxe_can_be_set_and_cleared_outside_vmx_operation(l1: L1) -> None:
    """Outside VMX operation CR4.VMXE is an ordinary bit."""
    cr4 = l1.read_cr(4).value
    assert cr4 & Cr4.VMXE
    assert l1.write_cr(4, cr4 & ~Cr4.VMXE) == Succeed()
    assert l1.read_cr(4) == Succeed(cr4 & ~Cr4.VMXE)
    assert l1.write_cr(4, cr4) == Succeed()
    assert l1.read_cr(4) == Succeed(cr4)


def test_vmxe_cannot_be_cleared_in_vmx_operation(l1: L1) -> None:
    """In VMX operation clearing CR4.VMXE gives #GP(0); after VMXOFF it is possible again."""
    l1.enter_vmx()
    cr4 = l1.read_cr(4).value
    assert l1.write_cr(4, cr4 & ~Cr4.VMXE) == GP
    assert l1.read_cr(4) == Succeed(cr4)
    assert l1.vmxoff() == Succeed()
    assert l1.write_cr(4, cr4 & ~Cr4.VMXE) == Succeed()


@pytest.mark.parametrize("bit", [Cr0.PE, Cr0.NE, Cr0.PG], ids=lambda bit: bit.name)
def test_fixed_cr0_bits_cannot_be_cleared_in_vmx_operation(l1: L1, bit: Cr0) -> None:
    """A CR0 bit that IA32_VMX_CR0_FIXED0 has set cannot be cleared: #GP(0)."""
    assert l1.caps.cr0_fixed0 & bit
    l1.enter_vmx()
    cr0 = l1.read_cr(0).value
    assert l1.write_cr(0, cr0 & ~bit) == GP
    assert l1.read_cr(0) == Succeed(cr0)


def test_cr0_ne_can_be_cleared_outside_vmx_operation(l1: L1) -> None:
    """Outside VMX operation CR0.NE is not fixed."""
    cr0 = l1.read_cr(0).value
    assert l1.write_cr(0, cr0 & ~Cr0.NE) == Succeed()
    assert l1.read_cr(0) == Succeed(cr0 & ~Cr0.NE)


@pytest.mark.parametrize("bit", [Cr0.WP, Cr0.MP, Cr0.TS], ids=lambda bit: bit.name)
def test_other_cr0_bits_stay_free_in_vmx_operation(l1: L1, bit: Cr0) -> None:
    """A CR0 bit that is not fixed can be changed in VMX operation."""
    l1.enter_vmx()
    cr0 = l1.read_cr(0).value
    assert l1.write_cr(0, cr0 ^ bit) == Succeed()
    assert l1.read_cr(0) == Succeed(cr0 ^ bit)


def test_cr4_bits_outside_fixed1_give_gp(l1: L1) -> None:
    """A CR4 bit that IA32_VMX_CR4_FIXED1 has clear cannot be set in VMX operation: #GP(0)."""
    l1.enter_vmx()
    cr4 = l1.read_cr(4).value
    forbidden = [bit for bit in range(64) if not l1.caps.cr4_fixed1 >> bit & 1]
    assert forbidden
    for bit in forbidden:
        assert l1.write_cr(4, cr4 | 1 << bit) == GP, f"bit {bit}"
    assert l1.read_cr(4) == Succeed(cr4)
