"""HOST_IA32_PAT is not checked."""

import pytest

from kvmnest.l1 import L1
from kvmnest.repro import Bug
from kvmnest.vmx import ExitCtl, Field, VmxError
from kvmnest.vmx.outcome import VMfailValid

BUG = Bug(
    subject='kvm: nVMX: Check "load IA32_PAT" VM-exit control on vmentry',
    since="c0dfee582ef2 (v3.12)",
    since_by="message",
    fixed="v5.2-rc1",
    vulnerable="the exit loads a PAT that does not exist, and KVM_RUN ends with a failed entry",
    correct="VM entry fails with error 8, an invalid host-state field",
    death="VmLost: failed entry",
    edit={
        "file": "arch/x86/kvm/vmx/nested.c",
        "function": "nested_vmx_check_host_state",
        "expression": "CC(!kvm_pat_valid(vmcs12->host_ia32_pat)))",
        "replacement": "0)",
    },
)


@pytest.mark.sdm("Checks on Host Control Registers, MSRs, and SSP")
@pytest.mark.needs(ExitCtl.LOAD_PAT)
def test_host_pat(l1: L1) -> None:
    """Each byte of a PAT that the exit loads must be a memory type; 2 is none."""
    vmcs = l1.launchable()
    vmcs.set_bits(Field.VM_EXIT_CONTROLS, ExitCtl.LOAD_PAT)
    vmcs[Field.HOST_IA32_PAT] = 2
    assert l1.vmlaunch() == VMfailValid(VmxError.ENTRY_INVALID_HOST_STATE_FIELD)
