"""KVM_SET_NESTED_STATE succeeds with a state of L2 that KVM refuses late."""

import pytest

from kvmnest.kvm import Cap, KvmError
from kvmnest.l1 import L1, code
from kvmnest.repro import Bug
from kvmnest.vmx import Field

BUG = Bug(
    vulnerable="the ioctl returns a positive number, and L2 is not active",
    correct="the ioctl says EINVAL",
    fix=(
        {
            "file": "arch/x86/kvm/vmx/nested.c",
            "function": "vmx_set_nested_state",
            "expression": """
                ret = nested_vmx_enter_non_root_mode(vcpu, false);
                if (ret)
                    goto error_guest_mode;""",
            "replacement": """
                if (nested_vmx_enter_non_root_mode(vcpu, false)) {
                    ret = -EINVAL;
                    goto error_guest_mode;
                }""",
        },
    ),
)


@pytest.mark.sdm("Checks on Guest Control Registers, Debug Registers, and MSRs")
@pytest.mark.needs(Cap.NESTED_STATE)
def test_bad_cr3_of_l2(l1: L1) -> None:
    """L2's CR3, in which a reserved bit is set, is checked after the vCPU was switched to L2."""
    vmcs = l1.launchable(l2=code.out8(0x80))
    table = l1.alloc()
    l1.write(table, l1.read(l1.sym("l2_pml4"), 4096))
    vmcs[Field.GUEST_CR3] = table  # a value that the state has once
    l1.vmlaunch()  # comes to userspace at the OUT, with L2 active
    good = table.to_bytes(8, "little")
    state = l1.vcpu.get_nested_state().replace(good, good[:7] + b"\x10")
    with pytest.raises(KvmError):
        l1.vcpu.set_nested_state(state)
