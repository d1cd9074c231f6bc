"""L1s whose CPUID says about VMX something else than KVM does."""

from __future__ import annotations

from kvmnest.kvm import Kvm, Vcpu, Vm
from kvmnest.kvm.cpuid import CPUID_1_ECX_VMX, leaf
from kvmnest.l1 import L1


class WithoutVmx(L1):
    """An L1 from which KVM_SET_CPUID2 hides VMX."""

    claimed = False

    def __init__(self, kvm: Kvm) -> None:
        super().__init__(kvm, vmxe=False, feature_control=None)
        self.has_vmx = self.claimed

    def create_vcpu(self, vm: Vm, index: int) -> Vcpu:
        """Make a vCPU with or without VMX in CPUID."""
        vcpu = vm.create_vcpu(index)
        cpuid = self.kvm.supported_cpuid()
        entry = leaf(cpuid, 1)
        entry.ecx = entry.ecx | CPUID_1_ECX_VMX if self.claimed else entry.ecx & ~CPUID_1_ECX_VMX
        vcpu.set_cpuid(cpuid)
        return vcpu


class ClaimsVmx(WithoutVmx):
    """An L1 whose CPUID has VMX even where KVM does not offer it."""

    claimed = True
