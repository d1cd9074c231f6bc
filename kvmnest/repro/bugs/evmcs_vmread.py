"""VMREAD fails while an enlightened VMCS is in use."""

import pytest

from kvmnest.kvm import Cap, Kvm, Vcpu, Vm, ffi
from kvmnest.kvm.cpuid import entries
from kvmnest.l1 import L1
from kvmnest.repro import Bug
from kvmnest.vmx import Field
from kvmnest.vmx.outcome import Succeed

BUG = Bug(
    subject="KVM: nVMX: Allow VMREAD when Enlightened VMCS is in use",
    hash="6cbbaab60ff3",
    since="v4.20",
    since_by="source",
    fixed="v5.17",
    vulnerable="VMREAD fails with VMfailInvalid: Windows 11 in L1 dies of it",
    correct="VMREAD gives what the page holds",
    edit={
        "file": "arch/x86/kvm/vmx/nested.c",
        "function": "handle_vmread",
        "expression": "if (WARN_ON_ONCE(is_guest_mode(vcpu)))",
        "replacement": "if (1)",
    },
)

VP_ASSIST_PAGE = 0x40000073  # HV_X64_MSR_VP_ASSIST_PAGE
ENLIGHTEN, CURRENT_VMCS = 40, 48  # offsets in the assist page
GUEST_RIP = 0x330  # offset in the enlightened VMCS
#: Leaves of Hyper-V: its name, MSRs, enlightened VMCSs recommended, of version 1 only.
NAME = [int.from_bytes(b"Microsoft Hv"[at : at + 4], "little") for at in (0, 4, 8)]
LEAVES = (
    (0x40000000, (0x4000000A, *NAME)),
    (0x40000001, (int.from_bytes(b"Hv#1", "little"), 0, 0, 0)),
    (0x40000003, (0x70, 0, 0, 0)),
    (0x40000004, (1 << 14, 0, 0, 0)),
    (0x4000000A, (0x101, 0, 0, 0)),
)


class EnlightenedL1(L1):
    """An L1 that sees Hyper-V and may use enlightened VMCSs."""

    def create_vcpu(self, vm: Vm, index: int) -> Vcpu:
        """A vCPU with Hyper-V's leaves in place of KVM's."""
        vcpu = vm.create_vcpu(index)
        kept = [each for each in entries(self.kvm.supported_cpuid()) if each.function >> 24 != 0x40]
        cpuid = ffi.new("struct kvm_cpuid2 *", {"entries": len(kept) + len(LEAVES)})
        cpuid.nent = len(kept) + len(LEAVES)
        for number, each in enumerate(kept):
            cpuid.entries[number] = each
        for number, (function, (eax, ebx, ecx, edx)) in enumerate(LEAVES, len(kept)):
            made = cpuid.entries[number]
            made.function, made.eax, made.ebx, made.ecx, made.edx = function, eax, ebx, ecx, edx
        vcpu.set_cpuid(cpuid)
        versions = ffi.new("uint16_t *")
        vcpu.enable_cap(Cap.HYPERV_ENLIGHTENED_VMCS, int(ffi.cast("uintptr_t", versions)))
        return vcpu


@pytest.mark.sdm("VMREAD-Read Field from Virtual-Machine Control Structure")
@pytest.mark.needs(Cap.HYPERV_ENLIGHTENED_VMCS)
def test_vmread_of_an_enlightened_vmcs(kvm: Kvm) -> None:
    """VMLAUNCH takes the page into use, although its controls are no good."""
    with EnlightenedL1(kvm) as l1:
        assist, page = l1.alloc(), l1.alloc()
        l1.write_int(assist + ENLIGHTEN, 1, 1)
        l1.write_int(assist + CURRENT_VMCS, page)
        l1.write_int(page, 1, 4)  # the version
        l1.write_int(page + GUEST_RIP, 0x12345)
        l1.enter_vmx()
        l1.wrmsr(VP_ASSIST_PAGE, assist | 1)
        l1.vmlaunch()
        assert l1.vmread(Field.GUEST_RIP) == Succeed(value=0x12345)
