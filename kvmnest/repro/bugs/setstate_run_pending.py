"""A refused KVM_SET_NESTED_STATE leaves an entry pending."""

import pytest

from kvmnest.kvm import Cap, KvmError
from kvmnest.l1 import L1, code
from kvmnest.repro import Bug
from kvmnest.vmx import Field, ProcCtl

BUG = Bug(
    subject="KVM: nVMX: Clear nested_run_pending if setting nested state fails",
    since="v4.19",
    since_by="source",
    fixed="v5.2",
    vulnerable="KVM_RUN fails with EIO: the VM is dead",
    correct="L1 runs on",
    edit={
        "file": "arch/x86/kvm/vmx/nested.c",
        "function": "vmx_set_nested_state",
        "expression": "error_guest_mode: vmx->nested.nested_run_pending = 0;",
        "replacement": "error_guest_mode:",
    },
    newer=(
        {
            "since": "7.2",
            "expression": "error_guest_mode: vcpu->arch.nested_run_pending = 0;",
        },
    ),
)

RUN_PENDING = 2  # KVM_STATE_NESTED_RUN_PENDING, in the first 2 bytes of the state


@pytest.mark.sdm("Software Use of Virtual-Machine Control Structures")
@pytest.mark.needs(Cap.NESTED_STATE, ProcCtl.USE_IO_BITMAPS)
def test_l1_after_a_refused_state(l1: L1) -> None:
    """A state that KVM_SET_NESTED_STATE refuses leaves nothing behind."""
    vmcs = l1.launchable(l2=code.out8(0x80))
    vmcs.set_bits(Field.CPU_BASED_VM_EXEC_CONTROL, ProcCtl.USE_IO_BITMAPS)
    vmcs[Field.IO_BITMAP_A], vmcs[Field.IO_BITMAP_B] = bitmap, _ = l1.alloc(), l1.alloc()
    l1.vmlaunch()  # comes to userspace at the OUT
    state = bytearray(l1.vcpu.get_nested_state())
    state[0] |= RUN_PENDING
    state[state.index(bitmap.to_bytes(8, "little"))] |= 1  # a bitmap that is not aligned
    with pytest.raises(KvmError):
        l1.vcpu.set_nested_state(bytes(state))
    try:
        l1.resume()
    except KvmError as error:
        pytest.fail(str(error))
