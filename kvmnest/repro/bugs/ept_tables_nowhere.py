"""EPT tables where there is no memory end the whole VM."""

import pytest

from kvmnest.l1 import L1
from kvmnest.repro import Bug
from kvmnest.vmx import ExitReason, Field, Proc2Ctl
from kvmnest.vmx.outcome import Exit

BUG = Bug(
    subject="KVM: x86/mmu: Use dummy root, backed by zero page, for !visible guest roots",
    fixed="v6.7",
    vulnerable="KVM_RUN fails, and the VM is dead",
    correct="L2's first access violates EPT",
    death="KvmError: KVM_RUN",
    edit_since="6.7",
    edit={
        "file": "arch/x86/kvm/mmu/mmu.c",
        "function": "mmu_alloc_shadow_roots",
        "expression": """
            if (!kvm_vcpu_is_visible_gfn(vcpu, root_gfn)) {
                mmu->root.hpa = kvm_mmu_get_dummy_root();
                return 0;
            }""",
        "replacement": """
            if (!kvm_vcpu_is_visible_gfn(vcpu, root_gfn)) {
                kvm_vm_dead(vcpu->kvm);
                return -EIO;
            }""",
    },
)

NOWHERE = 0x10000000  # guest-physical, without memory


@pytest.mark.sdm("The Extended Page Table Mechanism (EPT)")
@pytest.mark.needs(Proc2Ctl.ENABLE_EPT)
def test_ept_pointer_to_nothing(l1: L1) -> None:
    """What is read there is not defined; the host takes it for zeros, and L1 lives on."""
    vmcs = l1.launchable(ept=True)
    vmcs[Field.EPT_POINTER] = NOWHERE | vmcs[Field.EPT_POINTER] & 0xFFF
    assert l1.vmlaunch() == Exit(ExitReason.EPT_VIOLATION)
