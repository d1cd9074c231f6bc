"""Capability MSRs of an ordinary processor with EPT, as KVM shows them to L1."""

from collections.abc import Mapping

from kvmnest.vmx import (
    AccessRights,
    Capabilities,
    CpuFeatures,
    Cr0,
    Cr4,
    Efer,
    EntryCtl,
    ExitCtl,
    Field,
    PinCtl,
    Proc2Ctl,
    ProcCtl,
    Rflags,
)

MSRS: dict[int, int] = {
    0x480: 0x00D8_1000_11E5_7ED0,
    0x481: 0x0000_00FF_0000_0016,
    0x482: 0xFFF9_FFFE_0401_E172,
    0x483: 0x003F_FFFF_0003_6DFF,
    0x484: 0x0000_F3FF_0000_11FF,
    0x485: 0x6004_0165,
    0x486: 0x8000_0021,
    0x487: 0xFFFF_FFFF,
    0x488: 0x2000,
    0x489: 0x0077_2FFF,
    0x48A: 0x2E,
    0x48B: 0x0217_7FFF_0000_0000,
    0x48C: 0x0F01_0673_4141,
    0x48D: 0x0000_00FF_0000_0016,
    0x48E: 0xFFF9_FFFE_0400_6172,
    0x48F: 0x007F_FFFF_0003_6DFB,
    0x490: 0x0000_F3FF_0000_11FB,
    0x491: 1,
}


def capabilities(
    set: Mapping[int, int] | None = None,
    clear: Mapping[int, int] | None = None,
    cpu: CpuFeatures | None = None,
) -> Capabilities:
    """The example's capabilities with some MSR bits set and cleared."""
    msrs = dict(MSRS)
    for index, bits in (set or {}).items():
        msrs[index] = msrs.get(index, 0) | bits
    for index, bits in (clear or {}).items():
        msrs[index] = msrs.get(index, 0) & ~bits
    return Capabilities.from_msrs(msrs, cpu)


def baseline(caps: Capabilities) -> dict[Field, int]:
    """A VMCS that VM entry accepts: 64-bit host, 64-bit guest, no EPT."""
    code, data = int(AccessRights(type=0xB, l=1, g=1)), int(AccessRights(type=3, db=1, g=1))
    cr0, cr4 = caps.clamp(Cr0.PE | Cr0.NE | Cr0.PG), caps.clamp(Cr4.PAE | Cr4.VMXE)
    vmcs: dict[Field, int] = {
        Field.PIN_BASED_VM_EXEC_CONTROL: caps.clamp(PinCtl(0)),
        Field.CPU_BASED_VM_EXEC_CONTROL: caps.clamp(ProcCtl.ACTIVATE_SECONDARY_CONTROLS),
        Field.SECONDARY_VM_EXEC_CONTROL: 0,
        Field.VM_EXIT_CONTROLS: caps.clamp(ExitCtl.HOST_ADDRESS_SPACE_SIZE | ExitCtl.LOAD_EFER),
        Field.VM_ENTRY_CONTROLS: caps.clamp(
            EntryCtl.IA32E_MODE_GUEST | EntryCtl.LOAD_EFER | EntryCtl.LOAD_DEBUG_CONTROLS
        ),
        Field.VMCS_LINK_POINTER: 2**64 - 1,
        Field.HOST_CR0: cr0,
        Field.GUEST_CR0: cr0,
        Field.HOST_CR4: cr4,
        Field.GUEST_CR4: cr4,
        Field.HOST_CR3: 0x1000,
        Field.GUEST_CR3: 0x1000,
        Field.HOST_IA32_EFER: Efer.LME | Efer.LMA,
        Field.GUEST_IA32_EFER: Efer.LME | Efer.LMA,
        Field.HOST_CS_SELECTOR: 8,
        Field.HOST_SS_SELECTOR: 0x10,
        Field.HOST_TR_SELECTOR: 0x18,
        Field.HOST_RIP: 0x10000,
        Field.GUEST_CS_SELECTOR: 8,
        Field.GUEST_CS_ACCESS_RIGHTS: code,
        Field.GUEST_CS_LIMIT: 0xFFFFFFFF,
        Field.GUEST_TR_ACCESS_RIGHTS: int(AccessRights(type=0xB, s=0)),
        Field.GUEST_TR_LIMIT: 0x67,
        Field.GUEST_TR_SELECTOR: 0x18,
        Field.GUEST_LDTR_ACCESS_RIGHTS: 1 << 16,
        Field.GUEST_RFLAGS: 2,
        Field.GUEST_DR7: 0x400,
        Field.GUEST_RIP: 0x20000,
    }
    for name in ("SS", "DS", "ES", "FS", "GS"):
        vmcs[Field[f"GUEST_{name}_ACCESS_RIGHTS"]] = data
        vmcs[Field[f"GUEST_{name}_LIMIT"]] = 0xFFFFFFFF
        vmcs[Field[f"GUEST_{name}_SELECTOR"]] = 0x10
    return {field: int(value) for field, value in vmcs.items()}


def legacy_guest(vmcs: dict[Field, int]) -> dict[Field, int]:
    """The baseline with a 32-bit paged guest."""
    code = int(AccessRights(type=0xB, db=1, g=1))
    return {
        **vmcs,
        Field.VM_ENTRY_CONTROLS: vmcs[Field.VM_ENTRY_CONTROLS] & ~EntryCtl.IA32E_MODE_GUEST.value,
        Field.GUEST_IA32_EFER: 0,
        Field.GUEST_CR4: vmcs[Field.GUEST_CR4] & ~Cr4.PAE.value,
        Field.GUEST_CS_ACCESS_RIGHTS: code,
    }


def v8086_guest(vmcs: dict[Field, int]) -> dict[Field, int]:
    """The baseline with a virtual-8086 guest."""
    vmcs = legacy_guest(vmcs)
    for name in ("CS", "SS", "DS", "ES", "FS", "GS"):
        vmcs[Field[f"GUEST_{name}_SELECTOR"]] = 0x100
        vmcs[Field[f"GUEST_{name}_BASE"]] = 0x1000
        vmcs[Field[f"GUEST_{name}_LIMIT"]] = 0xFFFF
        vmcs[Field[f"GUEST_{name}_ACCESS_RIGHTS"]] = 0xF3
    vmcs[Field.GUEST_RFLAGS] = int(Rflags.VM | Rflags.RESERVED1)
    return vmcs


def real_mode_guest(vmcs: dict[Field, int]) -> dict[Field, int]:
    """The baseline with an unrestricted guest in real mode."""
    vmcs = legacy_guest(vmcs)
    vmcs[Field.SECONDARY_VM_EXEC_CONTROL] = int(Proc2Ctl.ENABLE_EPT | Proc2Ctl.UNRESTRICTED_GUEST)
    vmcs[Field.EPT_POINTER] = 0x5000 | 3 << 3 | 6
    vmcs[Field.GUEST_CR0] &= ~int(Cr0.PE | Cr0.PG)
    for name in ("CS", "SS", "DS", "ES", "FS", "GS"):
        vmcs[Field[f"GUEST_{name}_SELECTOR"]] = 0x2000
        vmcs[Field[f"GUEST_{name}_BASE"]] = 0x20000
        vmcs[Field[f"GUEST_{name}_LIMIT"]] = 0xFFFF
        vmcs[Field[f"GUEST_{name}_ACCESS_RIGHTS"]] = 0x93
    vmcs[Field.GUEST_RIP] = 0
    return vmcs
