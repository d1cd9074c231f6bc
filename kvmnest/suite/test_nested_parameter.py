"""The module parameter "nested", and VMX offered to L1 or hidden from it by CPUID."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvmnest.kvm import Cap, Kvm, KvmError
from kvmnest.kvm.cpuid import CPUID_1_ECX_VMX, leaf
from kvmnest.l1 import L1
from kvmnest.suite.support.cpuid import ClaimsVmx, WithoutVmx
from kvmnest.vmx import Cr4, ExitReason, FeatureControl, Msr, Vector
from kvmnest.vmx.msrs import VMX_MSRS
from kvmnest.vmx.outcome import Exit, Fault, Succeed

pytestmark = [
    pytest.mark.series(1),
    pytest.mark.sdm("Discovering Support for VMX"),
]

nested_on = pytest.mark.kvm_param(nested=True)
nested_off = pytest.mark.kvm_param(nested=False)
UD = Fault(Vector.UD, error_code=0, rip=0)
GP = Fault(Vector.GP, error_code=0, rip=0)
#: A VMX instruction each, with a good or no operand.
_NAMES = ("vmxoff", "vmlaunch", "vmresume", "vmfunc")


@pytest.fixture
def hidden(kvm: Kvm) -> Iterator[L1]:
    """An L1 that is not told of VMX."""
    with WithoutVmx(kvm) as l1:
        yield l1


def _ecx(kvm: Kvm) -> int:
    return int(leaf(kvm.supported_cpuid(), 1).ecx)


def expect_undefined(l1: L1) -> None:
    """Assert that each VMX instruction is undefined."""
    region = l1.prepare_region(l1.sym("vmcs_a"))
    for cpl in (0, 3):
        assert l1.vmxon(region, cpl=cpl) == UD
        assert l1.vmclear(region, cpl=cpl) == UD
        assert l1.vmptrld(region, cpl=cpl) == UD
        assert l1.vmptrst(cpl=cpl) == UD
        assert l1.vmread(0x681E, cpl=cpl) == UD
        assert l1.vmwrite(0x681E, 0, cpl=cpl) == UD
        assert l1.invept(2, cpl=cpl) == UD
        assert l1.invvpid(2, cpl=cpl) == UD
        for name in _NAMES:
            assert l1.execute(name, {}, cpl=cpl) == UD, name


# --- nested=1 ---


@nested_on
def test_kvm_offers_vmx(kvm: Kvm) -> None:
    """KVM_GET_SUPPORTED_CPUID has VMX, nested state has a size, the VMX MSRs can be asked for."""
    assert _ecx(kvm) & CPUID_1_ECX_VMX
    assert kvm.check_extension(Cap.NESTED_STATE) >= 128
    features = set(kvm.msr_feature_index_list())
    assert set(range(Msr.IA32_VMX_BASIC, Msr.IA32_VMX_VMCS_ENUM + 1)) <= features
    values = kvm.feature_msrs([Msr.IA32_VMX_BASIC, Msr.IA32_VMX_CR4_FIXED0])
    assert values[Msr.IA32_VMX_BASIC]
    assert values[Msr.IA32_VMX_CR4_FIXED0] & Cr4.VMXE


@nested_on
def test_l1_finds_vmx(l1: L1) -> None:
    """L1 sees CPUID.VMX whatever CR4.VMXE is, and can set and clear CR4.VMXE."""
    cr4 = l1.read_cr(4).value
    for value in (cr4 & ~Cr4.VMXE, cr4 | Cr4.VMXE):
        assert l1.write_cr(4, value) == Succeed()
        assert l1.read_cr(4) == Succeed(value)
        assert l1.cpuid(1).value[2] & CPUID_1_ECX_VMX
    l1.enter_vmx()
    assert l1.cpuid(1).value[2] & CPUID_1_ECX_VMX


@nested_on
@pytest.mark.sdm("Enabling and Entering VMX Operation")
def test_instructions_before_vmxon(l1: L1) -> None:
    """With CR4.VMXE, before VMXON: all but VMXON are undefined; VMXON then enables them."""
    region = l1.prepare_region(l1.sym("vmcs_a"))
    for name in _NAMES:
        assert l1.execute(name, {}) == UD, name
    assert l1.vmclear(region) == UD
    l1.launchable()
    assert l1.vmlaunch() == Exit(ExitReason.VMCALL)


@nested_on
@pytest.mark.sdm("Enabling and Entering VMX Operation")
def test_instructions_without_vmxe(l1: L1) -> None:
    """Without CR4.VMXE every VMX instruction is undefined at any CPL."""
    assert l1.write_cr(4, l1.read_cr(4).value & ~Cr4.VMXE) == Succeed()
    expect_undefined(l1)


@nested_on
def test_header_only_state(l1: L1) -> None:
    """Outside VMX operation the nested state is a header without pointers; inside it has them."""
    state = l1.vcpu.get_nested_state()
    assert len(state) == 128
    pointers = [int.from_bytes(state[n : n + 8], "little") for n in (8, 16)]
    assert pointers == [(1 << 64) - 1] * 2
    l1.enter_vmx()
    state = l1.vcpu.get_nested_state()
    assert int.from_bytes(state[8:16], "little") == l1.sym("vmxon_region")


# --- VMX hidden by CPUID ---


@nested_on
@pytest.mark.sdm("Enabling and Entering VMX Operation")
def test_hidden_vmxe(hidden: L1) -> None:
    """Without CPUID.VMX setting CR4.VMXE gives #GP(0), and nothing changes."""
    assert hidden.cpuid(1).value[2] & CPUID_1_ECX_VMX == 0
    cr4 = hidden.read_cr(4).value
    assert not cr4 & Cr4.VMXE
    assert hidden.write_cr(4, cr4 | Cr4.VMXE) == GP
    assert hidden.read_cr(4) == Succeed(cr4)


@nested_on
@pytest.mark.sdm("VMX Capability Reporting Facility")
def test_hidden_capability_msrs(hidden: L1) -> None:
    """Without CPUID.VMX the VMX capability MSRs do not exist: #GP(0) for RDMSR and WRMSR."""
    for msr in VMX_MSRS:
        assert hidden.rdmsr(msr) == GP, hex(msr)
        assert hidden.wrmsr(msr, 0) == GP, hex(msr)


@nested_on
def test_hidden_instructions(hidden: L1) -> None:
    """Without CPUID.VMX every VMX instruction is undefined at any CPL."""
    expect_undefined(hidden)


@nested_on
@pytest.mark.sdm("Enabling and Entering VMX Operation")
def test_hidden_feature_control(hidden: L1) -> None:
    """Without CPUID.VMX L1 cannot enable VMX in IA32_FEATURE_CONTROL, locked or not.

    Whether KVM_SET_MSRS lets the host do so depends on the kernel: newer ones do not mind the
    guest's CPUID ("KVM: VMX: Allow userspace to set all supported FEATURE_CONTROL bits").
    """
    enabled = FeatureControl.LOCKED | FeatureControl.VMX_OUTSIDE_SMX
    assert hidden.wrmsr(Msr.IA32_FEATURE_CONTROL, enabled) == GP
    assert hidden.wrmsr(Msr.IA32_FEATURE_CONTROL, FeatureControl.VMX_OUTSIDE_SMX) == GP


@nested_on
def test_hidden_vmxe_by_the_host(hidden: L1) -> None:
    """KVM_SET_SREGS refuses CR4.VMXE for a vCPU without CPUID.VMX."""
    sregs = hidden.vcpu.get_sregs()
    sregs.cr4 |= Cr4.VMXE
    with pytest.raises(KvmError):
        hidden.vcpu.set_sregs(sregs)
    assert not hidden.vcpu.get_sregs().cr4 & Cr4.VMXE


# --- nested=0 ---


@nested_off
def test_off_kvm_offers_no_vmx(kvm: Kvm) -> None:
    """With nested=0 KVM offers neither CPUID.VMX nor VMX MSRs."""
    assert _ecx(kvm) & CPUID_1_ECX_VMX == 0
    assert not set(VMX_MSRS) & set(kvm.msr_feature_index_list())


@nested_off
@pytest.mark.sdm("Enabling and Entering VMX Operation")
def test_off_vmxe(l1: L1) -> None:
    """With nested=0 CPUID.VMX is 0 and CR4.VMXE cannot be set: #GP(0)."""
    assert l1.cpuid(1).value[2] & CPUID_1_ECX_VMX == 0
    cr4 = l1.read_cr(4).value
    assert l1.write_cr(4, cr4 | Cr4.VMXE) == GP
    assert l1.read_cr(4) == Succeed(cr4)


@nested_off
def test_off_instructions(l1: L1) -> None:
    """With nested=0 every VMX instruction is undefined."""
    expect_undefined(l1)


@nested_off
@pytest.mark.sdm("VMX Capability Reporting Facility")
def test_off_capability_msrs(l1: L1) -> None:
    """With nested=0 the VMX capability MSRs do not exist: #GP(0)."""
    for msr in VMX_MSRS:
        assert l1.rdmsr(msr) == GP, hex(msr)


@nested_off
@pytest.mark.sdm("Enabling and Entering VMX Operation")
def test_off_even_if_cpuid_claims_it(kvm: Kvm) -> None:
    """With nested=0 a CPUID that claims VMX all the same does not bring it back."""
    with ClaimsVmx(kvm) as l1:
        cr4 = l1.read_cr(4).value
        assert l1.write_cr(4, cr4 | Cr4.VMXE) == GP
        assert l1.vmxon(l1.sym("vmxon_region")) == UD
        assert l1.rdmsr(Msr.IA32_VMX_BASIC) == GP
