"""L2 that could not be restored at once runs without its APIC-access page."""

import pytest

from kvmnest.kvm import Cap, Memory, exits
from kvmnest.l1 import L1, code
from kvmnest.repro import Bug
from kvmnest.vmx import ExitReason, Field, Proc2Ctl, ProcCtl
from kvmnest.vmx.outcome import Exit

BUG = Bug(
    subject="KVM: x86: Re-pend GET_NESTED_STATE_PAGES if getting said pages fails",
    cve="CVE-2026-98863",
    fixed="v7.2, v6.12.117",
    vulnerable="L2's access to the APIC does not exit",
    correct="L2's access to the APIC exits",
    edit_since="7.2",
    edit={
        "file": "arch/x86/kvm/x86.c",
        "function": "vcpu_enter_guest",
        "expression": "kvm_make_request(KVM_REQ_GET_NESTED_STATE_PAGES, vcpu);",
        "replacement": "",
    },
)

APIC = 0x20000000  # guest-physical, above L1's RAM
LOAD = b"\x8b\x07"  # MOV EAX, [RDI]


@pytest.mark.sdm("Virtualizing Memory-Mapped APIC Accesses")
@pytest.mark.needs(Cap.NESTED_STATE, Proc2Ctl.VIRTUALIZE_APIC_ACCESSES)
def test_memory_comes_later(l1: L1) -> None:
    """The APIC-access page gets its memory slot after a first KVM_RUN of the restored L2."""
    vmcs = l1.launchable(l2=code.out8(0x80) + LOAD)
    vmcs.set_bits(Field.CPU_BASED_VM_EXEC_CONTROL, ProcCtl.ACTIVATE_SECONDARY_CONTROLS)
    vmcs.set_bits(Field.SECONDARY_VM_EXEC_CONTROL, Proc2Ctl.VIRTUALIZE_APIC_ACCESSES)
    vmcs[Field.APIC_ACCESS_ADDR] = APIC
    memory = Memory(4096)
    l1.vm.add_memory(7, APIC, memory)
    l1.vmlaunch(regs={"rdi": APIC})  # comes to userspace at the OUT, with L2 active
    l1.vcpu.run(immediate_exit=True)
    l1.vm.remove_memory(7)
    l1.vcpu.set_nested_state(l1.vcpu.get_nested_state())
    assert isinstance(l1.vcpu.run(), exits.InternalErrorExit)
    l1.vm.add_memory(7, APIC, memory)
    assert l1.resume() == Exit(ExitReason.APIC_ACCESS)
