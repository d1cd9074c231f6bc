"""L2 in a state that VMX cannot run is emulated instead of ended.

The commit has no Fixes: tag, and older sources were not read: since when is not known.
"""

import pytest

from kvmnest.l1 import L1, code
from kvmnest.repro import Bug
from kvmnest.vmx import ExitReason
from kvmnest.vmx.outcome import Exit

BUG = Bug(
    subject="KVM: nVMX: Synthesize TRIPLE_FAULT for L2 if emulation is required",
    fixed="v5.16",
    vulnerable="KVM emulates L2, or the VM dies",
    correct="L2 ends in a triple fault",
    death="VmLost: ",
    edit={
        "file": "arch/x86/kvm/vmx/vmx.c",
        "function": "__vmx_handle_exit",
        "expression": "nested_vmx_vmexit(vcpu, EXIT_REASON_TRIPLE_FAULT, 0, 0); return 1;",
        "replacement": "return handle_invalid_guest_state(vcpu);",
    },
)


@pytest.mark.sdm("Checks on Guest Segment Registers")
def test_code_segment_that_holds_data(l1: L1) -> None:
    """Userspace gives L2, which is no unrestricted guest, a CS that no VM entry would take."""
    l1.launchable(l2=code.out8(0x80) + code.NOP)
    l1.vmlaunch()  # comes to userspace at the OUT, with L2 active
    l1.vcpu.run(immediate_exit=True)
    sregs = l1.vcpu.get_sregs()
    sregs.cs.type = 2
    l1.vcpu.set_sregs(sregs)
    assert l1.resume() == Exit(ExitReason.TRIPLE_FAULT)
