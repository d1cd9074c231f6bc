"""The host writes capability MSRs bit by bit: what KVM_SET_MSRS takes, and what it keeps out."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvmnest.kvm import Kvm, Vcpu
from kvmnest.l1 import L1
from kvmnest.suite.test_capability_writes import CONTROLS, LOW, check_refused, check_taken
from kvmnest.vmx import BasicCap, Msr
from kvmnest.vmx.outcome import Succeed

pytestmark = [
    pytest.mark.series(6),
    pytest.mark.sdm("VMX Capability Reporting Facility"),
]


@pytest.fixture
def unstarted(kvm: Kvm) -> Iterator[Vcpu]:
    """A vCPU that has never run: after the first KVM_RUN newer kernels refuse every change."""
    with kvm.create_vm() as vm, vm.create_vcpu() as vcpu:
        vcpu.set_cpuid(kvm.supported_cpuid())
        yield vcpu


def test_every_control_can_be_mandatory(unstarted: Vcpu) -> None:
    """Each control that may be 1 can be made one that must be 1, and optional again."""
    for msr in CONTROLS.values():
        full = unstarted.get_msrs([msr])[msr]
        optional = [bit for bit in range(32) if full >> 32 & ~full & LOW & 1 << bit]
        assert optional
        for bit in optional:
            check_taken(unstarted, msr, full | 1 << bit, f"{msr.name}, bit {bit}")


def test_every_bit_of_basic(unstarted: Vcpu) -> None:
    """Of IA32_VMX_BASIC the host can take features away, and nothing else but a larger region."""
    msr = Msr.IA32_VMX_BASIC
    full = unstarted.get_msrs([msr])[msr]
    features = BasicCap.DUAL_MONITOR | BasicCap.INS_OUTS_INFO | BasicCap.TRUE_CONTROLS
    features |= BasicCap.ERROR_CODE_OPTIONAL
    # 44:32 are the size of the region, 53:50 its memory type.
    for bit in (*range(32), *range(45, 50), *range(54, 64)):
        flag = 1 << bit
        if full & flag and flag & features:
            check_taken(unstarted, msr, full & ~flag, f"bit {bit}")
        else:
            check_refused(unstarted, msr, full ^ flag, f"bit {bit}")


@pytest.mark.parametrize("value", [0, (1 << 64) - 1], ids=["zero", "ones"])
def test_highest_index(l1: L1, unstarted: Vcpu, value: int) -> None:
    """IA32_VMX_VMCS_ENUM is only information: the host may give L1 any value."""
    msr = Msr.IA32_VMX_VMCS_ENUM
    check_taken(unstarted, msr, value)
    l1.set_feature_msrs({msr: value})
    assert l1.rdmsr(msr) == Succeed(value)
