"""RSM enters an L2 whose VMCS became invalid in SMM."""

import pytest

from kvmnest.kvm import Cap
from kvmnest.l1 import L1, VmLost, code
from kvmnest.repro import Bug
from kvmnest.vmx import Field, ProcCtl

BUG = Bug(
    subject="KVM: VMX: check validity of VMCS controls when returning from SMM",
    fixed="v7.0",
    vulnerable="L2 goes on with VM-execution controls that no VM entry would take",
    correct="the vCPU is shut down",
    edit_since="7.0",
    edit={
        "file": "arch/x86/kvm/vmx/vmx.c",
        "function": "vmx_leave_smm",
        "expression": "if (nested_vmx_check_restored_vmcs12(vcpu) < 0)",
        "replacement": "if (0)",
    },
)

SMM_CODE = 0x38000  # where SMM starts after a reset
HANDLER = b"\xe4\x77\x0f\xaa"  # IN AL, 77h: stops in userspace; RSM


@pytest.mark.sdm("Default Treatment of RSM")
@pytest.mark.needs(Cap.X86_SMM, Cap.MULTI_ADDRESS_SPACE, Cap.NESTED_STATE, ProcCtl.USE_IO_BITMAPS)
def test_rsm_to_invalid_controls(l1: L1) -> None:
    """An I/O bitmap that is not aligned is refused by RSM as by VM entry."""
    l1.enable_smm()
    l1.write(SMM_CODE, HANDLER)
    vmcs = l1.launchable(l2=code.out8(0x80) + code.NOP)
    vmcs.set_bits(Field.CPU_BASED_VM_EXEC_CONTROL, ProcCtl.USE_IO_BITMAPS)
    vmcs[Field.IO_BITMAP_A], vmcs[Field.IO_BITMAP_B] = bitmap, _ = l1.alloc(), l1.alloc()
    l1.vmlaunch()  # comes to userspace at the OUT
    l1.vcpu.smi()
    l1.resume()  # comes to userspace at the IN of the handler
    l1.vcpu.run(immediate_exit=True)
    state = bytearray(l1.vcpu.get_nested_state())
    state[state.index(bitmap.to_bytes(8, "little"))] |= 1
    l1.vcpu.set_nested_state(bytes(state))
    with pytest.raises(VmLost, match="SHUTDOWN"):
        l1.resume()
