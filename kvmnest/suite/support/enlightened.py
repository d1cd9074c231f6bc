"""An L1 under Hyper-V's enlightenments, whose VMCS is a page that it reads and writes itself.

Hypervisor Top Level Functional Specification, "Nested Virtualization": VM entry takes the
enlightened VMCS that the virtual-processor assist page names; there is no VMPTRLD. The fields are
those of the SDM, at offsets of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from kvmnest.errors import HarnessError
from kvmnest.kvm import Cap, Kvm, Vcpu, Vm, ffi
from kvmnest.kvm.cpuid import entries
from kvmnest.l1 import L1, L2Mode
from kvmnest.l1.baseline import cached_baseline
from kvmnest.l1.cpu import Cpu
from kvmnest.l1.vmcs import FieldValue, Vmcs, field_name
from kvmnest.vmx import Field

VERSION = 1
CLEAN_FIELDS = 0x338
#: Enlightenments of the entry: bit 1 says that the MSR bitmap is as the clean fields tell.
ENLIGHTENMENTS = 0x344
#: All groups of fields are as they were at the last entry.
ALL_CLEAN = 0xFFFF

_VP_ASSIST_PAGE = 0x40000073  # HV_X64_MSR_VP_ASSIST_PAGE
_ENABLE = 1
_ENLIGHTEN_VMENTRY, _CURRENT_NESTED_VMCS = 40, 48

_SEGMENTS = "ES CS SS DS FS GS LDTR TR"
# Offset of the first, size of each, names in their order.
_LAYOUT = (
    (0x08, 2, "HOST_{}_SELECTOR", "ES CS SS DS FS GS TR"),
    (0x18, 8, "HOST_{}", "IA32_PAT IA32_EFER CR0 CR3 CR4 IA32_SYSENTER_ESP IA32_SYSENTER_EIP RIP"),
    (0x58, 4, "{}", "HOST_IA32_SYSENTER_CS PIN_BASED_VM_EXEC_CONTROL VM_EXIT_CONTROLS"
                    " SECONDARY_VM_EXEC_CONTROL"),
    (0x68, 8, "{}", "IO_BITMAP_A IO_BITMAP_B MSR_BITMAP"),
    (0x80, 2, "GUEST_{}_SELECTOR", _SEGMENTS),
    (0x90, 4, "GUEST_{}_LIMIT", f"{_SEGMENTS} GDTR IDTR"),
    (0xB8, 4, "GUEST_{}_ACCESS_RIGHTS", _SEGMENTS),
    (0xD8, 8, "GUEST_{}_BASE", f"{_SEGMENTS} GDTR IDTR"),
    (0x140, 8, "{}", "VM_EXIT_MSR_STORE_ADDR VM_EXIT_MSR_LOAD_ADDR VM_ENTRY_MSR_LOAD_ADDR"
                     " CR3_TARGET_VALUE0 CR3_TARGET_VALUE1 CR3_TARGET_VALUE2 CR3_TARGET_VALUE3"),
    (0x178, 4, "{}", "PAGE_FAULT_ERROR_CODE_MASK PAGE_FAULT_ERROR_CODE_MATCH CR3_TARGET_COUNT"
                     " VM_EXIT_MSR_STORE_COUNT VM_EXIT_MSR_LOAD_COUNT VM_ENTRY_MSR_LOAD_COUNT"),
    (0x190, 8, "{}", "TSC_OFFSET VIRTUAL_APIC_PAGE_ADDR VMCS_LINK_POINTER GUEST_IA32_DEBUGCTL"
                     " GUEST_IA32_PAT GUEST_IA32_EFER GUEST_PDPTR0 GUEST_PDPTR1 GUEST_PDPTR2"
                     " GUEST_PDPTR3 GUEST_PENDING_DBG_EXCEPTIONS GUEST_SYSENTER_ESP"
                     " GUEST_SYSENTER_EIP"),
    (0x1F8, 4, "{}", "GUEST_ACTIVITY_STATE GUEST_SYSENTER_CS"),
    (0x200, 8, "{}", "CR0_GUEST_HOST_MASK CR4_GUEST_HOST_MASK CR0_READ_SHADOW CR4_READ_SHADOW"
                     " GUEST_CR0 GUEST_CR3 GUEST_CR4 GUEST_DR7 HOST_FS_BASE HOST_GS_BASE"
                     " HOST_TR_BASE HOST_GDTR_BASE HOST_IDTR_BASE HOST_RSP EPT_POINTER"),
    (0x278, 2, "{}", "VIRTUAL_PROCESSOR_ID"),
    (0x2A8, 8, "{}", "GUEST_PHYSICAL_ADDRESS"),
    (0x2B0, 4, "{}", "VM_INSTRUCTION_ERROR VM_EXIT_REASON VM_EXIT_INTR_INFO"
                     " VM_EXIT_INTR_ERROR_CODE IDT_VECTORING_INFO_FIELD IDT_VECTORING_ERROR_CODE"
                     " VM_EXIT_INSTRUCTION_LEN VMX_INSTRUCTION_INFO"),
    (0x2D0, 8, "{}", "EXIT_QUALIFICATION IO_RCX IO_RSI IO_RDI IO_RIP GUEST_LINEAR_ADDRESS"
                     " GUEST_RSP GUEST_RFLAGS"),
    (0x310, 4, "{}", "GUEST_INTERRUPTIBILITY_INFO CPU_BASED_VM_EXEC_CONTROL EXCEPTION_BITMAP"
                     " VM_ENTRY_CONTROLS VM_ENTRY_INTR_INFO_FIELD VM_ENTRY_EXCEPTION_ERROR_CODE"
                     " VM_ENTRY_INSTRUCTION_LEN TPR_THRESHOLD"),
    (0x330, 8, "{}", "GUEST_RIP"),
)  # fmt: skip


def _places() -> Iterator[tuple[Field, tuple[int, int]]]:
    for start, size, pattern, names in _LAYOUT:
        for number, name in enumerate(names.split()):
            yield Field[pattern.format(name)], (start + number * size, size)


#: Field -> (offset, size) of what an enlightened VMCS of version 1 holds and kvmnest sets or reads.
PLACES = dict(_places())


class EnlightenedVmcs(Vmcs):
    """The enlightened VMCS in the page at ``address``: fields are written into memory.

    ``clean`` is what the next entries say of the groups of fields that did not change.
    """

    clean = 0

    def __init__(self, l1: L1, address: int, baseline: Mapping[Field, int]) -> None:
        super().__init__(l1.cpu, address, baseline)
        self._l1 = l1

    def read(self, *fields: int) -> tuple[int, ...]:
        """Values in the page (pending changes are written first)."""
        self.flush()
        return tuple(FieldValue(field, self._l1.read_int(*self._place(field))) for field in fields)

    def flush(self, cpu: Cpu | None = None) -> None:
        """Write the changes into the page, and ``clean``."""
        for field, value in self._pending.items():
            if value or field in PLACES:
                where, size = self._place(field)
                self._l1.write_int(where, value & (1 << 8 * size) - 1, size)
        self._written.update(self._pending)
        self._pending.clear()
        self._l1.write_int(self.address + CLEAN_FIELDS, self.clean, 4)

    def _place(self, field: int) -> tuple[int, int]:
        if field not in PLACES:
            raise HarnessError(f"an enlightened VMCS has no {field_name(field)}")
        offset, size = PLACES[Field(field)]
        return self.address + offset, size


class EnlightenedL1(L1):
    """An L1 that sees Hyper-V, and whose VM entries take an ``EnlightenedVmcs``."""

    def __init__(self, kvm: Kvm, **kwargs: Any) -> None:
        super().__init__(kvm, **kwargs)
        self.assist_page = self.alloc()

    def reset(self) -> None:
        """Bring the machine back to the moment after creation; see L1."""
        super().reset()
        self.assist_page = self.alloc()

    def create_vcpu(self, vm: Vm, index: int) -> Vcpu:
        """Make a vCPU with Hyper-V's CPUID leaves and enlightened VMCSs."""
        vcpu = vm.create_vcpu(index)
        vcpu.set_cpuid(_with_hyperv(self.kvm.supported_cpuid()))
        versions = ffi.new("uint16_t *")
        vcpu.enable_cap(Cap.HYPERV_ENLIGHTENED_VMCS, int(ffi.cast("uintptr_t", versions)))
        return vcpu

    def load_vmcs(
        self,
        region: str | int = "vmcs_a",
        *,
        mode: L2Mode = L2Mode.LONG,
        ept: bool | None = None,
        l2: str | bytes | None = None,
        cpu: Cpu | None = None,
    ) -> Vmcs:
        """Give the baseline to an enlightened VMCS, and name it in the assist page."""
        cpu = cpu or self.cpu
        address = self.sym(region) if isinstance(region, str) else region
        self.write(address, bytes(4096))
        self.write_int(address, VERSION, 4)
        fields = cached_baseline(self.caps, self.payload, mode, ept, cpu.index)
        vmcs = EnlightenedVmcs(self, address, fields)
        self.vmcss[address] = vmcs
        self.name(address, cpu)
        if l2 is not None:
            self.set_l2(l2, vmcs)
        return vmcs

    def name(self, address: int, cpu: Cpu | None = None) -> None:
        """Let the next VM entry take the enlightened VMCS at ``address``."""
        cpu = cpu or self.cpu
        self.write_int(self.assist_page + _ENLIGHTEN_VMENTRY, 1, 1)
        self.write_int(self.assist_page + _CURRENT_NESTED_VMCS, address)
        self._expect(self.wrmsr(_VP_ASSIST_PAGE, self.assist_page | _ENABLE), "WRMSR")
        cpu.current = address

    def without_enlightenment(self) -> None:
        """Let the next VM entry take the VMCS that VMPTRLD made current."""
        self.write_int(self.assist_page + _ENLIGHTEN_VMENTRY, 0, 1)


def _with_hyperv(cpuid: Any) -> Any:
    """CPUID with the leaves by which a guest finds Hyper-V ("Feature Discovery")."""
    vendor = [int.from_bytes(b"Microsoft Hv"[at : at + 4], "little") for at in (0, 4, 8)]
    leaves: Mapping[int, tuple[int, ...]] = {
        0x40000000: (0x4000000A, *vendor),
        0x40000001: (int.from_bytes(b"Hv#1", "little"), 0, 0, 0),
        0x40000003: (0x70, 0, 0, 0),  # MSRs of the hypercall page, the VP index, the APIC
        0x40000004: (1 << 14, 0, 0, 0),  # enlightened VMCSs are recommended
        0x4000000A: (VERSION << 8 | VERSION, 0, 0, 0),  # highest and lowest version
    }
    kept = [each for each in entries(cpuid) if each.function >> 24 != 0x40]
    made = ffi.new("struct kvm_cpuid2 *", {"entries": len(kept) + len(leaves)})
    made.nent = len(kept) + len(leaves)
    for number, each in enumerate(kept):
        made.entries[number] = each
    for number, (function, registers) in enumerate(leaves.items(), len(kept)):
        made.entries[number].function = function
        for name, value in zip(("eax", "ebx", "ecx", "edx"), registers, strict=True):
            setattr(made.entries[number], name, value)
    return made
