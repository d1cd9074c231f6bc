"""Userspace cannot raise a capability MSR again that it lowered."""

import pytest

from kvmnest.kvm import Kvm, KvmMsrError
from kvmnest.repro import Bug
from kvmnest.vmx import Msr, PinCtl

BUG = Bug(
    subject="KVM: nVMX: Let userspace set nVMX MSR to any _host_ supported value",
    hash="f8ae08f9789a",
    since="62cc6b9dc61e (v4.10)",
    since_by="Fixes",
    fixed="v6.0-rc1",
    vulnerable="KVM_SET_MSRS refuses the value that KVM itself reported",
    correct="KVM_SET_MSRS takes the value back",
    edit={
        "file": "arch/x86/kvm/vmx/nested.c",
        "function": "vmx_restore_control_msr",
        "expression": "vmx_get_control_msr(&vmcs_config.nested, msr_index, &lowp, &highp);",
        "replacement": "vmx_get_control_msr(&vmx->nested.msrs, msr_index, &lowp, &highp);",
    },
)


@pytest.mark.sdm("VMX Capability Reporting Facility")
def test_taken_away_and_given_back(kvm: Kvm) -> None:
    """Userspace may set what the host supports, whatever it set before (no vCPU has run yet)."""
    msr = Msr.IA32_VMX_TRUE_PINBASED_CTLS
    with kvm.create_vm() as vm, vm.create_vcpu() as vcpu:
        vcpu.set_cpuid(kvm.supported_cpuid())
        full = vcpu.get_msrs([msr])[msr]
        vcpu.set_msrs({msr: full & ~(PinCtl.NMI_EXITING << 32)})
        try:
            vcpu.set_msrs({msr: full})
        except KvmMsrError as error:
            pytest.fail(str(error))
