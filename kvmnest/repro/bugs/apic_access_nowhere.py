"""L2 runs without its APIC-access page if that is no memory."""

import pytest

from kvmnest.l1 import L1, VmLost
from kvmnest.repro import Bug
from kvmnest.vmx import Field, Proc2Ctl, ProcCtl

BUG = Bug(
    subject="KVM: nVMX: Don't leak L1 MMIO regions to L2",
    hash="671ddc700fd0",
    since="v3.1",
    since_by="source",
    fixed="v5.5",
    vulnerable="L2 runs with its APIC accesses not virtualized",
    correct="KVM_RUN ends with an internal error: KVM cannot do this",
    edit={
        "file": "arch/x86/kvm/vmx/nested.c",
        "function": "nested_get_vmcs12_pages",
        "expression": (
            "vcpu->run->exit_reason = KVM_EXIT_INTERNAL_ERROR; vcpu->run->internal.suberror = "
            "KVM_INTERNAL_ERROR_EMULATION; vcpu->run->internal.ndata = 0; return false; } } "
            "if (nested_cpu_has(vmcs12, CPU_BASED_TPR_SHADOW)) {"
        ),
        "replacement": (
            "secondary_exec_controls_clearbit(vmx, SECONDARY_EXEC_VIRTUALIZE_APIC_ACCESSES); } } "
            "if (nested_cpu_has(vmcs12, CPU_BASED_TPR_SHADOW)) {"
        ),
    },
    newer=(
        {
            "since": "7.2",
            "expression": (
                'no backing for APIC-access address in vmcs12\\n", __func__); return false;'
            ),
            "replacement": (
                'no backing for APIC-access address in vmcs12\\n", __func__); '
                "secondary_exec_controls_clearbit(vmx, SECONDARY_EXEC_VIRTUALIZE_APIC_ACCESSES);"
            ),
        },
    ),
)

NOWHERE = 0x40000000  # guest-physical, above all memory of L1


@pytest.mark.sdm("Virtualizing Memory-Mapped APIC Accesses")
@pytest.mark.needs(Proc2Ctl.VIRTUALIZE_APIC_ACCESSES)
def test_apic_access_page_is_no_memory(l1: L1) -> None:
    """The APIC-access address is one where L1 has neither memory nor device."""
    vmcs = l1.launchable()
    vmcs.set_bits(Field.CPU_BASED_VM_EXEC_CONTROL, ProcCtl.ACTIVATE_SECONDARY_CONTROLS)
    vmcs.set_bits(Field.SECONDARY_VM_EXEC_CONTROL, Proc2Ctl.VIRTUALIZE_APIC_ACCESSES)
    vmcs[Field.APIC_ACCESS_ADDR] = NOWHERE
    try:
        seen = repr(l1.vmlaunch())
    except VmLost as lost:
        seen = str(lost)
    assert "internal error" in seen
