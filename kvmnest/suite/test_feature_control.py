"""CPUID.VMX and IA32_FEATURE_CONTROL: when VMXON is allowed."""

from __future__ import annotations

import pytest

from kvmnest.kvm import Kvm, KvmMsrError
from kvmnest.kvm.cpuid import CPUID_1_ECX_VMX
from kvmnest.l1 import L1
from kvmnest.vmx import Cr4, ExitReason, FeatureControl, Msr, Vector
from kvmnest.vmx.outcome import Exit, Fault, Succeed

pytestmark = [
    pytest.mark.series(2),
    pytest.mark.sdm("Enabling and Entering VMX Operation"),
]

CONTROL = Msr.IA32_FEATURE_CONTROL
LOCKED, IN_SMX, OUTSIDE = (
    FeatureControl.LOCKED,
    FeatureControl.VMX_IN_SMX,
    FeatureControl.VMX_OUTSIDE_SMX,
)
GP = Fault(Vector.GP, error_code=0, rip=0)
UD = Fault(Vector.UD, error_code=0, rip=0)


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(FeatureControl(0), id="reset-value"),
        pytest.param(OUTSIDE, id="unlocked"),
        pytest.param(LOCKED, id="locked-off"),
    ],
)
def test_vmxon_not_allowed(kvm: Kvm, value: FeatureControl) -> None:
    """VMXON gives #GP(0) unless the MSR is locked with "VMX outside SMX"; CPUID.VMX stays."""
    with L1(kvm, feature_control=value) as l1:
        assert l1.rdmsr(CONTROL) == Succeed(value)
        assert l1.cpuid(1).value[2] & CPUID_1_ECX_VMX
        assert l1.vmxon() == GP
        assert l1.vmxon(cpl=3) == GP
        # Still outside VMX operation.
        assert l1.vmxoff() == UD
        assert l1.vmptrst() == UD


def test_not_allowed_before_the_region_is_read(kvm: Kvm) -> None:
    """The #GP(0) comes before anything about the operand: not mapped, not aligned."""
    with L1(kvm, feature_control=0) as l1:
        assert l1.vmxon(at=0x40000000) == GP
        assert l1.vmxon(0x123) == GP


def test_undefined_comes_before_not_allowed(kvm: Kvm) -> None:
    """Without CR4.VMXE VMXON is #UD, whatever the MSR holds."""
    with L1(kvm, feature_control=0, vmxe=False) as l1:
        assert l1.vmxon() == UD
        # CR4.VMXE does not depend on the MSR.
        assert l1.write_cr(4, l1.read_cr(4).value | Cr4.VMXE) == Succeed()
        assert l1.vmxon() == GP


def test_l1_enables_vmx_itself(kvm: Kvm) -> None:
    """Firmware in L1 sets the bits and locks the MSR; from then on VMXON works."""
    with L1(kvm, feature_control=0) as l1:
        assert l1.wrmsr(CONTROL, OUTSIDE) == Succeed()
        assert l1.rdmsr(CONTROL) == Succeed(OUTSIDE)
        assert l1.vmxon() == GP
        assert l1.wrmsr(CONTROL, LOCKED | OUTSIDE) == Succeed()
        assert l1.rdmsr(CONTROL) == Succeed(LOCKED | OUTSIDE)
        l1.launchable()
        assert l1.vmlaunch() == Exit(ExitReason.VMCALL)


def test_unlocked_bits_can_change(kvm: Kvm) -> None:
    """Until the lock is set every value can be written and read back."""
    with L1(kvm, feature_control=0) as l1:
        for value in (OUTSIDE, FeatureControl(0), OUTSIDE, FeatureControl(0)):
            assert l1.wrmsr(CONTROL, value) == Succeed()
            assert l1.rdmsr(CONTROL) == Succeed(value)


@pytest.mark.parametrize("value", [LOCKED, LOCKED | OUTSIDE], ids=["off", "on"])
def test_locked(kvm: Kvm, value: FeatureControl) -> None:
    """Once locked the MSR cannot be written by L1, not even with the same value: #GP(0)."""
    with L1(kvm, feature_control=value) as l1:
        for written in (0, OUTSIDE, LOCKED, LOCKED | OUTSIDE, value):
            assert l1.wrmsr(CONTROL, written) == GP, hex(written)
            assert l1.rdmsr(CONTROL) == Succeed(value)
        allowed = bool(value & OUTSIDE)
        assert l1.vmxon() == (Succeed() if allowed else GP)
        assert l1.wrmsr(CONTROL, value) == GP


def test_reserved_bits(kvm: Kvm) -> None:
    """Reserved bits give #GP(0), and the value stays."""
    with L1(kvm, feature_control=0) as l1:
        # 1 and 15:8 belong to SMX, 17 and 18 to SGX, 20 to local machine checks.
        for bit in (3, 4, 5, 6, 7, 16, 19, *range(21, 64)):
            assert l1.wrmsr(CONTROL, OUTSIDE | 1 << bit) == GP, bit
            assert l1.rdmsr(CONTROL) == Succeed(0)


def test_at_cpl_3(l1: L1) -> None:
    """RDMSR and WRMSR are privileged."""
    assert l1.rdmsr(CONTROL, cpl=3) == GP
    assert l1.wrmsr(CONTROL, LOCKED | OUTSIDE, cpl=3) == GP


def test_in_vmx_operation(l1: L1) -> None:
    """VMX operation goes on and the MSR stays as it is; VMXOFF and VMXON work again."""
    l1.launchable()
    before = l1.rdmsr(CONTROL).value
    assert before & (LOCKED | OUTSIDE) == LOCKED | OUTSIDE
    assert l1.vmlaunch() == Exit(ExitReason.VMCALL)
    assert l1.rdmsr(CONTROL) == Succeed(before)
    assert l1.vmxoff() == Succeed()
    assert l1.vmxon() == Succeed()


def test_host_can_unlock(kvm: Kvm) -> None:
    """For the host, which emulates reset, the lock does not count; reserved bits do."""
    with L1(kvm) as l1:
        assert l1.vcpu.set_msrs({CONTROL: LOCKED}) == 1
        assert l1.vmxon() == GP
        assert l1.vcpu.set_msrs({CONTROL: LOCKED | OUTSIDE}) == 1
        assert l1.vmxon() == Succeed()
        with pytest.raises(KvmMsrError):
            l1.vcpu.set_msrs({CONTROL: LOCKED | OUTSIDE | 1 << 3})
        assert l1.rdmsr(CONTROL) == Succeed(LOCKED | OUTSIDE)


@pytest.mark.sdm("Discovering Support for VMX")
def test_cpuid_in_every_state(l1: L1) -> None:
    """CPUID.VMX is the same outside VMX operation, inside it, and at CPL 3."""
    assert l1.cpuid(1).value[2] & CPUID_1_ECX_VMX
    l1.enter_vmx()
    assert l1.cpuid(1).value[2] & CPUID_1_ECX_VMX
    assert l1.cpuid(1, cpl=3).value[2] & CPUID_1_ECX_VMX
    assert l1.vmxoff() == Succeed()
    assert l1.cpuid(1).value[2] & CPUID_1_ECX_VMX


#: Bits of other features than VMX: name, bits.
_OF_FEATURES = {
    "VMX-in-SMX": (1,),
    "SENTER": (8, 15),
    "SGX-launch-control": (17,),
    "SGX": (18,),
}


def _features(l1: L1) -> dict[str, bool]:
    """Which of them L1's CPUID has."""
    smx = bool(l1.cpuid(1).value[2] >> 6 & 1)
    ebx, ecx = l1.cpuid(7).value[1:3]
    sgx, launch = bool(ebx >> 2 & 1), bool(ecx >> 30 & 1)
    return {"VMX-in-SMX": smx, "SENTER": smx, "SGX-launch-control": sgx and launch, "SGX": sgx}


@pytest.mark.parametrize("feature", _OF_FEATURES)
def test_bits_of_features(kvm: Kvm, feature: str) -> None:
    """A bit that enables another feature can be set only where CPUID has it, else #GP(0)."""
    with L1(kvm, feature_control=0) as l1:
        for bit in _OF_FEATURES[feature]:
            for value in (1 << bit, OUTSIDE | 1 << bit):
                expected = Succeed() if _features(l1)[feature] else GP
                assert l1.wrmsr(CONTROL, value) == expected, bit
                assert l1.rdmsr(CONTROL) == Succeed(value if expected == Succeed() else 0)
                assert l1.wrmsr(CONTROL, 0) == Succeed()


@pytest.mark.sdm("Local Machine Check")
@pytest.mark.parametrize("offered", [False, True], ids=["absent", "offered"])
def test_bit_of_local_machine_checks(kvm: Kvm, offered: bool) -> None:
    """LMCE can be enabled only where IA32_MCG_CAP has LMCE_P (bit 27)."""
    lmce = 1 << 27
    if offered and not kvm.mce_capabilities() & lmce:
        pytest.skip("needs local machine checks: KVM_X86_GET_MCE_CAP_SUPPORTED lacks bit 27")
    with L1(kvm, feature_control=0) as l1:
        l1.vcpu.setup_mce(kvm.mce_capabilities() & ~lmce | (lmce if offered else 0) | 10)
        value = FeatureControl.LMCE
        assert l1.wrmsr(CONTROL, value) == (Succeed() if offered else GP)
        assert l1.rdmsr(CONTROL) == Succeed(int(value) if offered else 0)
