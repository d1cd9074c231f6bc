"""A posted interrupt of L2 is lost when L2 is saved between its notification and the next entry."""

import pytest

from kvmnest.kvm import Cap
from kvmnest.l1 import L1, code
from kvmnest.repro import Bug
from kvmnest.vmx import ExitCtl, ExitReason, Field, Msr, PinCtl, Proc2Ctl, ProcCtl, Rflags
from kvmnest.vmx.outcome import Exit, Succeed

BUG = Bug(
    vulnerable="L2 does not get the interrupt",
    correct="L2 gets the interrupt",
    fix=(
        {
            "file": "arch/x86/kvm/vmx/nested.c",
            "function": "vmx_get_nested_state_pages",
            "expression": """
                if (is_guest_mode(vcpu) && !nested_get_vmcs12_pages(vcpu))
                    return false;""",
            # To process a request before its notification comes is what a faster sender gets.
            "replacement": """
                if (is_guest_mode(vcpu)) {
                    if (!nested_get_vmcs12_pages(vcpu))
                        return false;
                    if (nested_cpu_has_posted_intr(get_vmcs12(vcpu)) &&
                        to_vmx(vcpu)->nested.pi_desc &&
                        pi_test_on(to_vmx(vcpu)->nested.pi_desc)) {
                        to_vmx(vcpu)->nested.pi_pending = true;
                        kvm_make_request(KVM_REQ_EVENT, vcpu);
                    }
                }""",
        },
    ),
)

NOTIFICATION, VECTOR, OUTSTANDING = 0xF2, 0x51, 1 << 256
PIN = PinCtl.EXTERNAL_INTERRUPT_EXITING | PinCtl.PROCESS_POSTED_INTERRUPTS
PROC = ProcCtl.USE_TPR_SHADOW | ProcCtl.ACTIVATE_SECONDARY_CONTROLS
PROC2 = Proc2Ctl.APIC_REGISTER_VIRTUALIZATION | Proc2Ctl.VIRTUAL_INTERRUPT_DELIVERY


@pytest.mark.sdm("Posted-Interrupt Processing")
@pytest.mark.needs(Cap.NESTED_STATE, Cap.SIGNAL_MSI)
@pytest.mark.needs(*PIN, *PROC, *PROC2, ExitCtl.ACKNOWLEDGE_INTERRUPT_ON_EXIT)
def test_notification_before_the_move(l1: L1) -> None:
    """The notification comes while L2 is in the hands of userspace, which then moves the VM."""
    base = l1.rdmsr(Msr.APIC_BASE)
    assert isinstance(base, Succeed)
    l1.wrmsr(Msr.APIC_BASE, base.value | 0xC00)  # x2APIC mode
    l1.wrmsr(Msr.X2APIC_SIVR, 0x1FF)  # enabled by software
    vmcs = l1.launchable(l2=code.out8(0x80) + code.NOP)
    vmcs.set_bits(Field.PIN_BASED_VM_EXEC_CONTROL, PIN)
    vmcs.set_bits(Field.CPU_BASED_VM_EXEC_CONTROL, PROC)
    vmcs.set_bits(Field.SECONDARY_VM_EXEC_CONTROL, PROC2)
    vmcs.set_bits(Field.VM_EXIT_CONTROLS, ExitCtl.ACKNOWLEDGE_INTERRUPT_ON_EXIT)
    vmcs[Field.VIRTUAL_APIC_PAGE_ADDR] = l1.alloc()
    vmcs[Field.TPR_THRESHOLD] = vmcs[Field.GUEST_INTR_STATUS] = 0
    vmcs[Field.POSTED_INTR_DESC_ADDR] = descriptor = l1.alloc()
    vmcs[Field.POSTED_INTR_NV] = NOTIFICATION
    vmcs[Field.GUEST_RFLAGS] = 0x2 | Rflags.IF
    start = vmcs[Field.GUEST_RIP]
    l1.write_int(descriptor, 1 << VECTOR | OUTSTANDING, 64)
    l1.vmlaunch()  # comes to userspace at the OUT
    l1.vm.signal_msi(0xFEE00000, NOTIFICATION)
    l1.round_trip()
    # Both L2 and its handlers end in VMCALL: L2's own is behind OUT and NOP.
    seen = l1.resume()
    assert seen == Exit(ExitReason.VMCALL)
    assert seen.rip != start + 3
