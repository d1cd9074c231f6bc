"""CR4 bits that KVM refuses are accepted in a VMCS."""

import pytest

from kvmnest.kvm import Kvm
from kvmnest.l1 import L1
from kvmnest.repro import Bug
from kvmnest.vmx import Cr4, Field, VmxError
from kvmnest.vmx.outcome import Succeed, VMfailValid

BUG = Bug(
    subject="KVM: nVMX: Account for KVM reserved CR4 bits in consistency checks",
    hash="ca58f3aa53d1",
    since="3899152ccbf4 (v4.10)",
    since_by="Fixes",
    fixed="v6.0-rc1",
    vulnerable="the exit loads CR4.SMXE, and KVM_RUN ends with a failed entry",
    correct="VM entry fails with error 8, an invalid host-state field",
    death="VmLost: failed entry",
    edit={
        "file": "arch/x86/kvm/vmx/nested.h",
        "function": "nested_cr4_valid",
        "expression": (
            "return fixed_bits_valid(val, fixed0, fixed1) && __kvm_is_valid_cr4(vcpu, val);"
        ),
        "replacement": "return fixed_bits_valid(val, fixed0, fixed1);",
    },
)

SMX = 1 << 6  # in ECX of CPUID leaf 1


@pytest.mark.sdm("Checks on Host Control Registers, MSRs, and SSP")
def test_smxe_in_host_cr4(kvm: Kvm) -> None:
    """CPUID promises SMX, which KVM has not: L1 can set CR4.SMXE by no means, an exit included."""
    cpuid = kvm.supported_cpuid()
    for leaf in cpuid.entries[0 : cpuid.nent]:
        leaf.ecx |= SMX if leaf.function == 1 else 0
    with L1(kvm) as l1:
        l1.vcpu.set_cpuid(cpuid)
        if l1.write_cr(4, l1.read_cr(4).value | Cr4.SMXE) == Succeed():
            pytest.skip("needs a KVM that does not support CR4.SMXE")
        vmcs = l1.launchable()
        vmcs.set_bits(Field.HOST_CR4, Cr4.SMXE)
        assert l1.vmlaunch() == VMfailValid(VmxError.ENTRY_INVALID_HOST_STATE_FIELD)
