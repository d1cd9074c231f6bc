"""IDT-vectoring information is valid after a triple fault."""

import pytest

from kvmnest.kvm import Cap
from kvmnest.l1 import L1, code
from kvmnest.repro import Bug
from kvmnest.vmx import ExitReason, Vector

BUG = Bug(
    subject="KVM: nVMX: Clear IDT vectoring on nested VM-Exit for double/triple fault",
    hash="9bd1f0efa859",
    since="4704d0befb07 (v3.1)",
    since_by="Fixes",
    fixed="v5.19-rc1",
    vulnerable="the IDT-vectoring information of a triple-fault exit is valid",
    correct="the IDT-vectoring information of a triple-fault exit is not valid",
    edit={
        "file": "arch/x86/kvm/vmx/nested.c",
        "function": "vmcs12_save_pending_event",
        "expression": (
            "if ((u16)vm_exit_reason == EXIT_REASON_TRIPLE_FAULT || ((u16)vm_exit_reason == "
            "EXIT_REASON_EXCEPTION_NMI && is_double_fault(exit_intr_info))) {"
        ),
        "replacement": "if (0) {",
    },
)

TRIPLE_FAULT_VALID = 0x20  # KVM_VCPUEVENT_VALID_TRIPLE_FAULT


@pytest.mark.sdm("Information for VM Exits That Occur During Event Delivery")
@pytest.mark.needs(Cap.X86_TRIPLE_FAULT_EVENT)
def test_triple_fault_ends_an_event(l1: L1) -> None:
    """A triple fault does not count as an exit during the delivery of an event."""
    l1.enable_cap(Cap.X86_TRIPLE_FAULT_EVENT)
    l1.launchable(l2=code.out8(0x80))
    l1.vmlaunch()  # comes to userspace at the OUT, which the next KVM_RUN ends
    l1.vcpu.run(immediate_exit=True)
    events = l1.vcpu.get_vcpu_events()
    events.exception.injected, events.exception.nr = 1, Vector.UD
    events.triple_fault.pending = 1
    events.flags |= TRIPLE_FAULT_VALID
    l1.vcpu.set_vcpu_events(events)
    seen = l1.resume()
    assert (seen.reason, seen.idt_info >> 31) == (ExitReason.TRIPLE_FAULT, 0)
