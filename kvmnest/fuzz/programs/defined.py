"""Which parts of what is seen the SDM defines: the others may hold anything.

SDM, "VM-Exit Information Fields" and "Information for VM Exits Due to Instruction Execution" of
the chapter on VM exits; "Guest Register State" for unusable segments.
"""

from __future__ import annotations

from collections.abc import Mapping

from kvmnest.vmx import ExitReason as R

_VALID = 1 << 31
_CODE_VALID = 1 << 11
#: Exits due to instructions, which have a length.
_INSTRUCTIONS = frozenset(
    (
        *(R.CPUID, R.GETSEC, R.HLT, R.INVD, R.INVLPG, R.RDPMC, R.RDTSC, R.RSM, R.VMCALL),
        *(R.VMCLEAR, R.VMLAUNCH, R.VMPTRLD, R.VMPTRST, R.VMREAD, R.VMRESUME, R.VMWRITE),
        *(R.VMXOFF, R.VMXON, R.CR_ACCESS, R.DR_ACCESS, R.IO_INSTRUCTION, R.RDMSR, R.WRMSR),
        *(R.MWAIT, R.MONITOR, R.PAUSE, R.GDTR_IDTR, R.LDTR_TR, R.INVEPT, R.RDTSCP),
        *(R.INVVPID, R.WBINVD, R.XSETBV, R.RDRAND, R.INVPCID, R.VMFUNC, R.RDSEED),
        *(R.XSAVES, R.XRSTORS, R.TASK_SWITCH),
    )
)
_MEMORY_ONLY = frozenset((R.VMCLEAR, R.VMPTRLD, R.VMPTRST, R.VMXON, R.XSAVES, R.XRSTORS))
_WITH_REGISTER = frozenset((R.INVEPT, R.INVVPID, R.INVPCID))
_REGISTER_OR_MEMORY = frozenset((R.VMREAD, R.VMWRITE))
_SOFTWARE_TYPES = (4, 5, 6)


def parts(reason: int, seen: Mapping[str, int]) -> dict[str, int]:
    """The parts of an exit that are defined; those that are absent from ``seen`` are 0."""
    found = {"qualification": seen.get("qualification", 0)}
    for name in ("intr", "idt"):
        info = seen.get(f"{name}_info", 0)
        found[f"{name}_info"] = info if info & _VALID else 0
        if info & _VALID and info & _CODE_VALID:
            found[f"{name}_error"] = seen.get(f"{name}_error", 0)
    if _has_length(reason, found):
        found["length"] = seen.get("length", 0)
    mask = _info_mask(reason, seen.get("info", 0), found["qualification"])
    if mask:
        found["info"] = seen.get("info", 0) & mask
    qualification = found["qualification"]
    memory_lmsw = reason == R.CR_ACCESS and qualification >> 4 & 3 == 3 and qualification >> 6 & 1
    string_io = reason == R.IO_INSTRUCTION and qualification >> 4 & 1
    if memory_lmsw or string_io or (reason == R.EPT_VIOLATION and qualification >> 7 & 1):
        found["linear"] = seen.get("linear", 0)
    if reason in (R.EPT_VIOLATION, R.EPT_MISCONFIG):
        found["physical"] = seen.get("physical", 0)
    return found


def _has_length(reason: int, found: Mapping[str, int]) -> bool:
    infos = (found["intr_info"] if reason == R.EXCEPTION_NMI else 0, found["idt_info"])
    software = any(info & _VALID and info >> 8 & 7 in _SOFTWARE_TYPES for info in infos)
    if reason == R.TASK_SWITCH:
        # Defined for a task switch by an instruction; through a gate by what is delivered.
        return software or found["qualification"] >> 30 & 3 != 3
    return reason in _INSTRUCTIONS or software


def _info_mask(reason: int, info: int, qualification: int) -> int:
    """Defined bits of the VM-exit instruction information."""
    if reason == R.IO_INSTRUCTION:
        # Of string instructions: the address size, and of OUTS the segment.
        return 0x380 | 0x38000 * (not qualification >> 3 & 1) if qualification >> 4 & 1 else 0
    memory = 0x38380 | (0x3 | 0xF << 18) * (not info >> 22 & 1) | 1 << 22
    memory |= 1 << 27 | (0xF << 23) * (not info >> 27 & 1)
    if reason in _MEMORY_ONLY:
        return memory
    if reason in _WITH_REGISTER:
        return memory | 0xF << 28
    if reason in _REGISTER_OR_MEMORY:
        register = 0x78 | 1 << 10
        return (register | 0xF << 28) if info >> 10 & 1 else memory | 1 << 10 | 0xF << 28
    if reason == R.GDTR_IDTR:
        return memory | 1 << 11 | 3 << 28
    if reason == R.LDTR_TR:
        return (0x78 if info >> 10 & 1 else memory) | 1 << 10 | 3 << 28
    if reason in (R.RDRAND, R.RDSEED):
        return 0x78 | 3 << 11
    return 0


def guest(state: Mapping[str, int]) -> dict[str, int]:
    """The guest-state fields that mean something: not base and limit of unusable segments."""
    found = dict(state)
    for name in ("ES", "CS", "SS", "DS", "FS", "GS", "LDTR"):
        rights = state.get(f"GUEST_{name}_ACCESS_RIGHTS", 0)
        if rights >> 16 & 1:
            found[f"GUEST_{name}_ACCESS_RIGHTS"] = 1 << 16
            found.pop(f"GUEST_{name}_LIMIT", None)
            if name not in ("FS", "GS"):
                # FS and GS have a base that code in 64-bit mode uses.
                found.pop(f"GUEST_{name}_BASE", None)
    return found
