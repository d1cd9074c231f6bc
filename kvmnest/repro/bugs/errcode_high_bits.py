"""An error code of more than 16 bits makes VM entry fail."""

import pytest

from kvmnest.l1 import L1, code
from kvmnest.repro import Bug
from kvmnest.vmx import ExitReason
from kvmnest.vmx.outcome import Exit

BUG = Bug(
    subject="KVM: VMX: Drop bits 31:16 when shoving exception error code into VMCS",
    fixed="v6.1",
    vulnerable="KVM's own VM entry fails",
    correct="L2's handler gets the low 16 bits",
    death="VmLost: ",
    edit={
        "file": "arch/x86/kvm/vmx/vmx.c",
        "function": "vmx_inject_exception",
        "expression": "(u16)ex->error_code",
        "replacement": "ex->error_code",
    },
)


@pytest.mark.sdm("VM-Entry Controls for Event Injection")
def test_error_code(l1: L1) -> None:
    """Userspace injects #GP with error code 12340028h into L2: 28h is on its stack."""
    l1.launchable(l2=code.out8(0x80) + code.NOP)
    l1.vmlaunch()  # comes to userspace at the OUT
    l1.vcpu.run(immediate_exit=True)
    events = l1.vcpu.get_vcpu_events()
    events.exception.injected, events.exception.nr = 1, 13
    events.exception.has_error_code, events.exception.error_code = 1, 0x12340028
    l1.vcpu.set_vcpu_events(events)
    seen = l1.resume()
    assert seen == Exit(ExitReason.VMCALL)
    assert l1.l2_frame(3)[:2] == [13, 0x28]
