"""A vCPU that is restored in SMM is in VMX operation there, if no VMCS is current."""

import pytest

from kvmnest.kvm import Cap
from kvmnest.l1 import L1
from kvmnest.repro import Bug

BUG = Bug(
    vulnerable="the restored state says that VMX operation does not wait for RSM",
    correct="the restored state says, as the saved one, that VMX operation waits for RSM",
    fix=(
        {
            "file": "arch/x86/kvm/vmx/nested.c",
            "function": "vmx_set_nested_state",
            "expression": """
                (kvm_state->hdr.vmx.vmcs12_pa != INVALID_GPA))
                    return -EINVAL;
                else
                    return 0;""",
            "replacement": """
                (kvm_state->hdr.vmx.vmcs12_pa != INVALID_GPA))
                    return -EINVAL;
                if (kvm_state->hdr.vmx.smm.flags & KVM_STATE_NESTED_SMM_VMXON) {
                    vmx->nested.smm.vmxon = true;
                    vmx->nested.vmxon = false;
                }
                return 0;""",
        },
    ),
)

HANDLER = 0x38000  # where SMM starts after a reset
IN_AND_RSM = b"\xe4\x77\x0f\xaa"  # IN AL, 77H; RSM
SMM_FLAGS = slice(24, 26)  # in kvm_nested_state


@pytest.mark.sdm("Default Treatment of SMI Delivery")
@pytest.mark.needs(Cap.X86_SMM, Cap.MULTI_ADDRESS_SPACE, Cap.NESTED_STATE)
def test_flags_of_smm(l1: L1) -> None:
    """An SMI takes the processor out of VMX operation, which RSM brings back."""
    l1.enable_smm()
    l1.write(HANDLER, IN_AND_RSM)
    l1.enter_vmx()
    l1.vcpu.smi()
    l1.cpuid(0)  # comes to userspace at the IN
    l1.vcpu.run(immediate_exit=True)  # which completes it
    before = l1.vcpu.get_nested_state()[SMM_FLAGS]
    l1.round_trip()
    assert l1.vcpu.get_nested_state()[SMM_FLAGS] == before
