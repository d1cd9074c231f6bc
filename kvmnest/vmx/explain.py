"""Human text for exits, errors and field values; nothing here is needed to run a case."""

from __future__ import annotations

import enum

from kvmnest.vmx.control_fields import FIELD_OF
from kvmnest.vmx.errors import VmxError
from kvmnest.vmx.exitinfo import (
    GPR_NAMES,
    ApicAccess,
    CrAccess,
    CrAccessType,
    DescriptorTableOp,
    DrAccess,
    EptQualification,
    InstructionInfo,
    IntrInfo,
    IoQualification,
    SystemSegmentOp,
    TaskSwitch,
)
from kvmnest.vmx.fields import Field, Width
from kvmnest.vmx.msrs import Msr
from kvmnest.vmx.reasons import (
    EXIT_REASON_BUS_LOCK,
    EXIT_REASON_BUSY_SHADOW_STACK,
    EXIT_REASON_ENCLAVE_MODE,
    EXIT_REASON_ENTRY_FAILURE,
    EXIT_REASON_FROM_VMX_ROOT,
    EXIT_REASON_PENDING_MTF,
    ExitReason,
)
from kvmnest.vmx.registers import (
    AccessRights,
    ActivityState,
    Cr0,
    Cr4,
    DebugCtl,
    Dr6,
    Dr7,
    Efer,
    Interruptibility,
    IntrType,
    PendingDebug,
    Rflags,
    Vector,
)

_REASON_FLAGS = (
    (EXIT_REASON_ENTRY_FAILURE, "VM entry failed"),
    (EXIT_REASON_FROM_VMX_ROOT, "from VMX root operation"),
    (EXIT_REASON_PENDING_MTF, "pending MTF"),
    (EXIT_REASON_ENCLAVE_MODE, "in enclave mode"),
    (EXIT_REASON_BUS_LOCK, "bus lock asserted"),
    (EXIT_REASON_BUSY_SHADOW_STACK, "shadow stack prematurely busy"),
)

_ENTRY_FAILURE = {
    0: "a guest-state check",
    2: "loading the PDPTEs",
    3: "NMI injection under blocking by STI",
    4: "the VMCS link pointer",
}
"""Exit qualification of exit reason 33."""

_MEMORY_OPERAND = frozenset(
    {
        ExitReason.INVEPT,
        ExitReason.INVVPID,
        ExitReason.INVPCID,
        ExitReason.VMCLEAR,
        ExitReason.VMPTRLD,
        ExitReason.VMPTRST,
        ExitReason.VMXON,
        ExitReason.VMREAD,
        ExitReason.VMWRITE,
        ExitReason.XSAVES,
        ExitReason.XRSTORS,
    }
)

_FLAG_FIELDS: dict[Field, type[enum.IntFlag]] = {
    **{field: kind for kind, field in FIELD_OF.items()},
    Field.GUEST_CR0: Cr0,
    Field.HOST_CR0: Cr0,
    Field.CR0_READ_SHADOW: Cr0,
    Field.CR0_GUEST_HOST_MASK: Cr0,
    Field.GUEST_CR4: Cr4,
    Field.HOST_CR4: Cr4,
    Field.CR4_READ_SHADOW: Cr4,
    Field.CR4_GUEST_HOST_MASK: Cr4,
    Field.GUEST_IA32_EFER: Efer,
    Field.HOST_IA32_EFER: Efer,
    Field.GUEST_RFLAGS: Rflags,
    Field.GUEST_DR7: Dr7,
    Field.GUEST_IA32_DEBUGCTL: DebugCtl,
    Field.GUEST_INTERRUPTIBILITY_INFO: Interruptibility,
    Field.GUEST_PENDING_DBG_EXCEPTIONS: PendingDebug,
}

_INTR_FIELDS = frozenset(
    {
        Field.VM_ENTRY_INTR_INFO_FIELD,
        Field.VM_EXIT_INTR_INFO,
        Field.IDT_VECTORING_INFO_FIELD,
    }
)


def flag_names(kind: type[enum.IntFlag], value: int) -> str:
    """Names of the set bits joined by ``|``; bits without a name as one hexadecimal number."""
    names = []
    rest = value
    for flag in kind.__members__.values():
        if flag.value & value == flag.value and flag.value.bit_count() == 1:
            names.append(flag.name or "")
            rest &= ~flag.value
    if rest:
        names.append(f"{rest:#x}")
    return "|".join(names) or "0"


def explain_error(number: int) -> str:
    """A VM-instruction error with its number: ``5: VMRESUME of a VMCS that was not launched``."""
    try:
        return f"{number}: {VmxError(number).text}"
    except ValueError:
        return f"{number}: not a defined VM-instruction error"


def explain_intr_info(value: int) -> str:
    """An interruption-information field in words: ``hardware exception #GP with error code``."""
    info = IntrInfo.decode(value)
    if not info.valid:
        return f"not valid ({value:#x})"
    if info.type == 1:
        text = f"reserved type 1, vector {info.vector}"
    else:
        text = IntrType(info.type).name.replace("_", " ").lower()
        if info.type in (IntrType.HARDWARE_EXCEPTION, IntrType.SOFTWARE_EXCEPTION):
            known = info.vector in Vector.__members__.values()
            text += f" #{Vector(info.vector).name}" if known else f" vector {info.vector}"
        elif info.type == IntrType.OTHER_EVENT and info.vector == 0:
            text += " (pending MTF)"
        elif info.type != IntrType.NMI or info.vector != Vector.NMI:
            text += f" vector {info.vector:#x}"
    if info.error_code:
        text += " with error code"
    if info.nmi_unblocking:
        text += ", NMI unblocking due to IRET"
    return text


def explain_reason(value: int) -> str:
    """The 32-bit exit-reason field: name, number and the flags above bit 15."""
    basic = value & 0xFFFF
    try:
        text = f"{ExitReason(basic).name} ({basic})"
    except ValueError:
        text = f"undefined exit reason {basic}"
    rest = value & ~0xFFFF
    for mask, name in _REASON_FLAGS:
        if rest & mask:
            text += f", {name}"
            rest &= ~mask
    return text + (f", undefined bits {rest:#x}" if rest else "")


def _cr_access(qualification: int) -> str:
    access = CrAccess.decode(qualification)
    if access.type is CrAccessType.CLTS:
        return "CLTS"
    if access.type is CrAccessType.LMSW:
        kind = "memory" if access.lmsw_memory else "register"
        return f"LMSW {access.lmsw_source:#x} ({kind} operand)"
    register = GPR_NAMES[access.register]
    if access.type is CrAccessType.MOV_TO_CR:
        return f"MOV {register} to CR{access.cr}"
    return f"MOV CR{access.cr} to {register}"


def _dr_access(qualification: int) -> str:
    access = DrAccess.decode(qualification)
    register = GPR_NAMES[access.register]
    if access.read:
        return f"MOV DR{access.dr} to {register}"
    return f"MOV {register} to DR{access.dr}"


def _io(qualification: int) -> str:
    access = IoQualification.decode(qualification)
    text = ("REP " if access.rep else "") + ("IN" if access.input else "OUT")
    text += "S" if access.string else ""
    form = "immediate" if access.immediate else "DX"
    return f"{text} of {access.size} byte(s), port {access.port:#x} ({form})"


def _ept(qualification: int) -> str:
    access = EptQualification.decode(qualification)
    did = [name for name in ("read", "write", "fetch") if getattr(access, name)]
    may = "".join(
        letter if getattr(access, name) else "-"
        for letter, name in (("r", "readable"), ("w", "writable"), ("x", "executable"))
    )
    text = f"{'+'.join(did) or 'no access'}, EPT permission {may}"
    if access.linear_valid:
        text += ", linear address valid"
        text += " (final translation)" if access.translated else " (paging-structure access)"
    if access.nmi_unblocking:
        text += ", NMI unblocking due to IRET"
    return text


def _apic(qualification: int) -> str:
    access = ApicAccess.decode(qualification)
    kind = getattr(access.type, "name", f"type {int(access.type)}")
    return f"{kind.replace('_', ' ').lower()} at APIC offset {access.offset:#x}"


def _task_switch(qualification: int) -> str:
    switch = TaskSwitch.decode(qualification)
    return f"{switch.source.name} to TSS selector {switch.selector:#x}"


_QUALIFIERS = {
    ExitReason.CR_ACCESS: _cr_access,
    ExitReason.DR_ACCESS: _dr_access,
    ExitReason.IO_INSTRUCTION: _io,
    ExitReason.EPT_VIOLATION: _ept,
    ExitReason.APIC_ACCESS: _apic,
    ExitReason.TASK_SWITCH: _task_switch,
}


def explain_qualification(reason: int, qualification: int) -> str:
    """The exit qualification in words; empty when it means nothing for this exit reason."""
    basic = reason & 0xFFFF
    if basic in _QUALIFIERS:
        return _QUALIFIERS[ExitReason(basic)](qualification)
    if basic == ExitReason.INVALID_GUEST_STATE and reason & EXIT_REASON_ENTRY_FAILURE:
        return _ENTRY_FAILURE.get(qualification, f"undefined qualification {qualification}")
    if basic == ExitReason.MSR_LOAD_FAIL and reason & EXIT_REASON_ENTRY_FAILURE:
        return f"entry {qualification} of the VM-entry MSR-load area"
    if basic in (ExitReason.INVLPG, *_MEMORY_OPERAND):
        return f"{qualification:#x}"
    if basic == ExitReason.SIPI_SIGNAL:
        return f"vector {qualification & 0xFF:#x}"
    if basic in (ExitReason.VIRTUALIZED_EOI, ExitReason.APIC_WRITE):
        return f"{qualification & 0xFFF:#x}"
    return ""


def explain_instruction(reason: int, info: int) -> str:
    """VM-exit instruction information in words; empty where it is undefined."""
    basic = reason & 0xFFFF
    names: type[DescriptorTableOp] | type[SystemSegmentOp] | None = None
    if basic == ExitReason.GDTR_IDTR:
        names = DescriptorTableOp
    elif basic == ExitReason.LDTR_TR:
        names = SystemSegmentOp
    elif basic not in _MEMORY_OPERAND:
        return ""
    try:
        decoded = InstructionInfo.decode(info)
    except ValueError as error:
        return str(error)
    text = decoded.operand()
    if names is not None:
        return f"{names(decoded.identity).name} {text}"
    if basic in (ExitReason.VMREAD, ExitReason.VMWRITE):
        return f"{text}, encoding in {GPR_NAMES[decoded.reg2]}"
    if basic in (ExitReason.INVEPT, ExitReason.INVVPID, ExitReason.INVPCID):
        return f"{text}, type in {GPR_NAMES[decoded.reg2]}"
    return text


def explain_exit(
    reason: int,
    qualification: int = 0,
    intr_info: int = 0,
    instruction_info: int | None = None,
    idt_vectoring: int = 0,
) -> str:
    """One line about a VM exit from its exit-information fields.

    ``reason`` is the whole 32-bit exit-reason field. ``instruction_info`` None leaves the
    instruction out.
    """
    parts = [explain_reason(reason)]
    basic = reason & 0xFFFF
    if basic in (ExitReason.EXCEPTION_NMI, ExitReason.EXTERNAL_INTERRUPT):
        parts.append(explain_intr_info(intr_info))
        event = IntrInfo.decode(intr_info)
        if event.valid and event.type == IntrType.HARDWARE_EXCEPTION:
            if event.vector == Vector.PF:
                parts.append(f"address {qualification:#x}")
            elif event.vector == Vector.DB:
                parts.append(f"DR6 bits {flag_names(Dr6, qualification)}")
    elif text := explain_qualification(reason, qualification):
        parts.append(text)
    if instruction_info is not None and (text := explain_instruction(reason, instruction_info)):
        parts.append(text)
    if idt_vectoring >> 31 & 1:
        parts.append(f"while delivering {explain_intr_info(idt_vectoring)}")
    return "; ".join(parts)


def explain_field_value(field: Field, value: int) -> str:
    """A field's value with its meaning: ``0x10002 (VM|0x2)`` for GUEST_RFLAGS, for example."""
    text = f"{value:#x}"
    if field in _FLAG_FIELDS:
        return f"{text} ({flag_names(_FLAG_FIELDS[field], value)})" if value else text
    if field in _INTR_FIELDS:
        return f"{text} ({explain_intr_info(value)})"
    if field.name.endswith("_ACCESS_RIGHTS"):
        return f"{text} ({AccessRights.decode(value)})"
    if field is Field.VM_EXIT_REASON:
        return f"{text} ({explain_reason(value)})"
    if field is Field.VM_INSTRUCTION_ERROR:
        return explain_error(value)
    if field is Field.GUEST_ACTIVITY_STATE and value in ActivityState.__members__.values():
        return f"{text} ({ActivityState(value).name})"
    if field is Field.EXCEPTION_BITMAP and value:
        names = [vector.name for vector in Vector if value >> vector & 1]
        return f"{text} ({'|'.join(names)})" if names else text
    if field.width in (Width.BITS32, Width.BITS16) and value >> field.width.bits:
        return f"{text} (wider than the {field.width.bits}-bit field)"
    return text


def explain_msr(index: int) -> str:
    """Name of an MSR, or its number where it has none here."""
    try:
        return Msr(index).name
    except ValueError:
        return f"MSR {index:#x}"
