"""Host address-space size is not compared with L1's mode."""

import pytest

from kvmnest.l1 import L1, L2Mode
from kvmnest.repro import Bug
from kvmnest.vmx import ExitCtl, Field, VmxError
from kvmnest.vmx.outcome import VMfailValid

BUG = Bug(
    subject="KVM: nVMX: Check Host Address Space Size on vmentry of nested guests",
    since="v3.1",
    since_by="source",
    fixed="v5.4-rc1",
    vulnerable="L1 goes on in 32-bit mode after the exit, and triple-faults",
    correct="VM entry fails with error 8, an invalid host-state field",
    death="VmLost: triple fault",
    edit={
        "file": "arch/x86/kvm/vmx/nested.c",
        "function": "nested_vmx_check_address_space_size",
        "expression": "return -EINVAL;",
        "replacement": "return 0;",
    },
)


@pytest.mark.sdm("Checks Related to Address-Space Size")
def test_32_bit_host_from_64_bit_mode(l1: L1) -> None:
    """An L1 in IA-32e mode must set the VM-exit control "host address-space size"."""
    vmcs = l1.launchable(mode=L2Mode.PROTECTED)
    vmcs.clear_bits(Field.VM_EXIT_CONTROLS, ExitCtl.HOST_ADDRESS_SPACE_SIZE)
    assert l1.vmlaunch() == VMfailValid(VmxError.ENTRY_INVALID_HOST_STATE_FIELD)
