"""A software exception that L1 injects is injected again as a hardware exception."""

import pytest

from kvmnest.l1 import L1
from kvmnest.repro import Bug
from kvmnest.vmx import ExitReason, Field, IntrType, Proc2Ctl, intr_info
from kvmnest.vmx.outcome import Exit

BUG = Bug(
    vulnerable="VMLAUNCH ends in VMfailValid(7)",
    correct="L2 takes the exception when its stack is mapped",
    fix=(
        {
            "file": "arch/x86/kvm/vmx/vmx.c",
            "function": "__vmx_complete_interrupts",
            "expression": "case INTR_TYPE_SOFT_EXCEPTION:",
            "replacement": """
                case INTR_TYPE_SOFT_EXCEPTION:
                    if (!kvm_exception_is_soft(vector)) {
                        vcpu->arch.event_exit_inst_len = vmcs_read32(instr_len_field);
                        kvm_queue_interrupt(vcpu, vector, true);
                        break;
                    }""",
        },
    ),
)


@pytest.mark.sdm("Information for VM Exits That Occur During Event Delivery")
@pytest.mark.needs(Proc2Ctl.ENABLE_EPT)
def test_software_exception_over_a_page_of_the_host(l1: L1) -> None:
    """What KVM does for its own sake, here mapping L2's stack, L1 and L2 do not see."""
    vmcs = l1.launchable(ept=True)
    start = vmcs[Field.GUEST_RIP]
    vmcs[Field.VM_ENTRY_INTR_INFO_FIELD] = intr_info(0x40, IntrType.SOFTWARE_EXCEPTION)
    vmcs[Field.VM_ENTRY_INSTRUCTION_LEN] = 1
    vmcs[Field.GUEST_RSP] = l1.alloc() + 0x800  # not used yet
    # Both L2 and its handler for vector 0x40 end in VMCALL.
    seen = l1.vmlaunch()
    assert seen == Exit(ExitReason.VMCALL)
    assert seen.rip != start
