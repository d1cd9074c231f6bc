"""Checks on the VM-execution control fields (SDM "VM-Execution Control Fields")."""

from __future__ import annotations

from collections.abc import Iterator

from kvmnest.vmx.controls import (
    EntryCtl,
    EptVpidCap,
    ExitCtl,
    PinCtl,
    Proc2Ctl,
    Proc3Ctl,
    ProcCtl,
    VmFunc,
)
from kvmnest.vmx.fields import Field as F
from kvmnest.vmx.rules.model import (
    Entry,
    Rule,
    Section,
    Stage,
    Violation,
    address,
    reserved_controls,
)

_S = Section(Stage.CONTROL, "VM-Execution Control Fields")

_PIN, _PROC = F.PIN_BASED_VM_EXEC_CONTROL, F.CPU_BASED_VM_EXEC_CONTROL
_PROC2, _PROC3 = F.SECONDARY_VM_EXEC_CONTROL, F.TERTIARY_VM_EXEC_CONTROL


def control_words(e: Entry) -> Iterator[Violation]:
    """Every control word in effect against its capability MSR."""
    yield from reserved_controls(e, _S, _PIN, PinCtl)
    yield from reserved_controls(e, _S, _PROC, ProcCtl)
    if e.has(ProcCtl.ACTIVATE_SECONDARY_CONTROLS):
        yield from reserved_controls(e, _S, _PROC2, Proc2Ctl)
    if e.has(ProcCtl.ACTIVATE_TERTIARY_CONTROLS):
        yield from reserved_controls(e, _S, _PROC3, Proc3Ctl)


def cr3_targets(e: Entry) -> Iterator[Violation]:
    """The CR3-target count."""
    limit = e.caps.misc.cr3_targets
    if e[F.CR3_TARGET_COUNT] > limit:
        yield _S.broken(f"the CR3-target count must not exceed {limit}", F.CR3_TARGET_COUNT)


def bitmaps(e: Entry) -> Iterator[Violation]:
    """Addresses of the I/O and MSR bitmaps."""
    if e.has(ProcCtl.USE_IO_BITMAPS):
        yield from address(e, _S, F.IO_BITMAP_A, 4096, "address of I/O bitmap A")
        yield from address(e, _S, F.IO_BITMAP_B, 4096, "address of I/O bitmap B")
    if e.has(ProcCtl.USE_MSR_BITMAPS):
        yield from address(e, _S, F.MSR_BITMAP, 4096, "MSR-bitmap address")


def tpr_shadow(e: Entry) -> Iterator[Violation]:
    """The virtual-APIC page, the TPR threshold and the controls that need the TPR shadow."""
    if not e.has(ProcCtl.USE_TPR_SHADOW):
        for flag in (
            Proc2Ctl.VIRTUALIZE_X2APIC_MODE,
            Proc2Ctl.APIC_REGISTER_VIRTUALIZATION,
            Proc2Ctl.VIRTUAL_INTERRUPT_DELIVERY,
        ):
            if e.has(flag):
                yield _S.broken(f"{flag.name} needs USE_TPR_SHADOW", _PROC, _PROC2)
        if e.has(Proc3Ctl.IPI_VIRTUALIZATION):
            yield _S.broken("IPI_VIRTUALIZATION needs USE_TPR_SHADOW", _PROC, _PROC3)
        return
    page = e[F.VIRTUAL_APIC_PAGE_ADDR]
    yield from address(e, _S, F.VIRTUAL_APIC_PAGE_ADDR, 4096, "virtual-APIC address")
    if e.has(Proc2Ctl.VIRTUAL_INTERRUPT_DELIVERY):
        return
    threshold = e[F.TPR_THRESHOLD]
    if threshold >> 4:
        yield _S.broken("bits 31:4 of the TPR threshold must be 0", F.TPR_THRESHOLD)
    if e.memory and not e.has(Proc2Ctl.VIRTUALIZE_APIC_ACCESSES):
        vtpr = e.memory(page + 0x80, 1)
        if vtpr is not None and threshold & 0xF > vtpr[0] >> 4:
            yield _S.broken(
                "the TPR threshold must not exceed bits 7:4 of VTPR",
                F.TPR_THRESHOLD,
                F.VIRTUAL_APIC_PAGE_ADDR,
            )


def nmi(e: Entry) -> Iterator[Violation]:
    """Virtual NMIs need NMI exiting, NMI-window exiting needs virtual NMIs."""
    virtual = e.has(PinCtl.VIRTUAL_NMIS)
    if virtual and not e.has(PinCtl.NMI_EXITING):
        yield _S.broken("VIRTUAL_NMIS needs NMI_EXITING", _PIN)
    if e.has(ProcCtl.NMI_WINDOW_EXITING) and not virtual:
        yield _S.broken("NMI_WINDOW_EXITING needs VIRTUAL_NMIS", _PIN, _PROC)


def apic_virtualization(e: Entry) -> Iterator[Violation]:
    """APIC-access page, x2APIC mode, virtual-interrupt delivery."""
    if e.has(Proc2Ctl.VIRTUALIZE_APIC_ACCESSES):
        yield from address(e, _S, F.APIC_ACCESS_ADDR, 4096, "APIC-access address")
        if e.has(Proc2Ctl.VIRTUALIZE_X2APIC_MODE):
            yield _S.broken(
                "VIRTUALIZE_X2APIC_MODE and VIRTUALIZE_APIC_ACCESSES exclude each other", _PROC2
            )
    if e.has(Proc2Ctl.VIRTUAL_INTERRUPT_DELIVERY) and not e.has(PinCtl.EXTERNAL_INTERRUPT_EXITING):
        yield _S.broken("VIRTUAL_INTERRUPT_DELIVERY needs EXTERNAL_INTERRUPT_EXITING", _PIN, _PROC2)


def posted_interrupts(e: Entry) -> Iterator[Violation]:
    """Everything that posted-interrupt processing needs."""
    if not e.has(PinCtl.PROCESS_POSTED_INTERRUPTS):
        return
    if not e.has(Proc2Ctl.VIRTUAL_INTERRUPT_DELIVERY):
        yield _S.broken("PROCESS_POSTED_INTERRUPTS needs VIRTUAL_INTERRUPT_DELIVERY", _PIN, _PROC2)
    if not e.has(ExitCtl.ACKNOWLEDGE_INTERRUPT_ON_EXIT):
        yield _S.broken(
            "PROCESS_POSTED_INTERRUPTS needs ACKNOWLEDGE_INTERRUPT_ON_EXIT",
            _PIN,
            F.VM_EXIT_CONTROLS,
        )
    if e[F.POSTED_INTR_NV] > 0xFF:
        yield _S.broken(
            "the posted-interrupt notification vector must be at most 255", F.POSTED_INTR_NV
        )
    yield from address(
        e, _S, F.POSTED_INTR_DESC_ADDR, 64, "address of the posted-interrupt descriptor"
    )


def vpid(e: Entry) -> Iterator[Violation]:
    """VPID 0 belongs to VMX root operation."""
    if e.has(Proc2Ctl.ENABLE_VPID) and not e[F.VIRTUAL_PROCESSOR_ID]:
        yield _S.broken(
            "the VPID must not be 0 when VPIDs are enabled", F.VIRTUAL_PROCESSOR_ID, _PROC2
        )


def ept_pointer(e: Entry) -> Iterator[Violation]:
    """The EPT pointer: memory type, page-walk length, A/D flag, reserved bits."""
    if e.has(Proc2Ctl.ENABLE_EPT):
        yield from check_eptp(e, e[F.EPT_POINTER])


def check_eptp(e: Entry, eptp: int) -> Iterator[Violation]:
    """One EPT pointer value (the rules also hold for an entry of the EPTP list)."""
    cap = e.caps.ept_vpid.value
    types = {0: EptVpidCap.MEMORY_TYPE_UC, 6: EptVpidCap.MEMORY_TYPE_WB}
    memory_type = eptp & 7
    if memory_type not in types or not cap & types[memory_type].value:
        yield _S.broken(f"EPTP: memory type {memory_type} is not supported", F.EPT_POINTER)
    walks = {3: EptVpidCap.PAGE_WALK_4, 4: EptVpidCap.PAGE_WALK_5}
    walk = eptp >> 3 & 7
    if walk not in walks or not cap & walks[walk].value:
        yield _S.broken(f"EPTP: page-walk length {walk + 1} is not supported", F.EPT_POINTER)
    if eptp & 1 << 6 and not cap & EptVpidCap.ACCESSED_DIRTY.value:
        yield _S.broken("EPTP: accessed and dirty flags are not supported", F.EPT_POINTER)
    if eptp & 1 << 7 and not cap & EptVpidCap.SUPERVISOR_SHADOW_STACK.value:
        yield _S.broken("EPTP: supervisor shadow-stack control is not supported", F.EPT_POINTER)
    if eptp & 0xF00:
        yield _S.broken("EPTP: bits 11:8 must be 0", F.EPT_POINTER)
    if eptp >> e.caps.cpu.physical_bits:
        yield _S.broken("EPTP: the address must not exceed the physical width", F.EPT_POINTER)


def needs_ept(e: Entry) -> Iterator[Violation]:
    """Controls that make sense with EPT only, and the addresses that come with them."""
    if e.has(Proc2Ctl.ENABLE_PML):
        yield from address(e, _S, F.PML_ADDRESS, 4096, "PML address")
    if e.has(Proc2Ctl.SUB_PAGE_WRITE_PERMISSIONS):
        yield from address(e, _S, F.SPP_TABLE_POINTER, 4096, "sub-page-permission-table pointer")
    if e.has(Proc2Ctl.ENABLE_EPT):
        return
    for flag in (
        Proc2Ctl.UNRESTRICTED_GUEST,
        Proc2Ctl.ENABLE_PML,
        Proc2Ctl.MODE_BASED_EXECUTE,
        Proc2Ctl.SUB_PAGE_WRITE_PERMISSIONS,
        Proc2Ctl.PT_USES_GUEST_PHYSICAL,
    ):
        if e.has(flag):
            yield _S.broken(f"{flag.name} needs ENABLE_EPT", _PROC2)
    for flag3 in (
        Proc3Ctl.ENABLE_HLAT,
        Proc3Ctl.EPT_PAGING_WRITE,
        Proc3Ctl.GUEST_PAGING_VERIFICATION,
    ):
        if e.has(flag3):
            yield _S.broken(f"{flag3.name} needs ENABLE_EPT", _PROC2, _PROC3)


def vm_functions(e: Entry) -> Iterator[Violation]:
    """VM-function controls and EPTP switching."""
    if not e.has(Proc2Ctl.ENABLE_VM_FUNCTIONS):
        return
    functions = e[F.VM_FUNCTION_CONTROL]
    unsupported = functions & ~e.caps.vmfunc.value
    if unsupported:
        yield _S.broken(
            f"IA32_VMX_VMFUNC requires 0 for VM functions {unsupported:#x}", F.VM_FUNCTION_CONTROL
        )
    if functions & VmFunc.EPTP_SWITCHING.value:
        if not e.has(Proc2Ctl.ENABLE_EPT):
            yield _S.broken("EPTP switching needs ENABLE_EPT", F.VM_FUNCTION_CONTROL, _PROC2)
        yield from address(e, _S, F.EPTP_LIST_ADDRESS, 4096, "EPTP-list address")


def shadowing_and_ve(e: Entry) -> Iterator[Violation]:
    """Pages of VMCS shadowing and of virtualization exceptions."""
    if e.has(Proc2Ctl.VMCS_SHADOWING):
        yield from address(e, _S, F.VMREAD_BITMAP, 4096, "VMREAD-bitmap address")
        yield from address(e, _S, F.VMWRITE_BITMAP, 4096, "VMWRITE-bitmap address")
    if e.has(Proc2Ctl.EPT_VIOLATION_VE):
        yield from address(
            e, _S, F.VE_INFORMATION_ADDRESS, 4096, "virtualization-exception information address"
        )


def tracing_and_tsc(e: Entry) -> Iterator[Violation]:
    """Intel PT with guest-physical addresses, and the TSC multiplier."""
    if e.has(Proc2Ctl.PT_USES_GUEST_PHYSICAL):
        if not e.has(ExitCtl.CLEAR_RTIT_CTL):
            yield _S.broken(
                "PT_USES_GUEST_PHYSICAL needs CLEAR_RTIT_CTL", _PROC2, F.VM_EXIT_CONTROLS
            )
        if not e.has(EntryCtl.LOAD_RTIT_CTL):
            yield _S.broken(
                "PT_USES_GUEST_PHYSICAL needs LOAD_RTIT_CTL", _PROC2, F.VM_ENTRY_CONTROLS
            )
    if e.has(Proc2Ctl.USE_TSC_SCALING) and not e[F.TSC_MULTIPLIER]:
        yield _S.broken("the TSC multiplier must not be 0", F.TSC_MULTIPLIER, _PROC2)


def tertiary(e: Entry) -> Iterator[Violation]:
    """HLAT, IPI virtualization and PASID translation."""
    if e.has(Proc3Ctl.ENABLE_HLAT):
        if e[F.HLAT_PREFIX_SIZE] > 52:
            yield _S.broken("the HLAT prefix size must be at most 52", F.HLAT_PREFIX_SIZE)
        pointer = e[F.HLAT_POINTER]
        if pointer & 0xFE7 or e.beyond_width(pointer):
            yield _S.broken("the HLAT pointer must not set reserved bits", F.HLAT_POINTER)
    if e.has(Proc3Ctl.IPI_VIRTUALIZATION):
        yield from address(e, _S, F.PID_POINTER_TABLE, 8, "PID-pointer table address")
        last = e[F.PID_POINTER_TABLE] + 8 * e[F.LAST_PID_POINTER_INDEX]
        if e.beyond_width(last):
            yield _S.broken(
                "the last PID pointer must not exceed the physical-address width",
                F.PID_POINTER_TABLE,
                F.LAST_PID_POINTER_INDEX,
            )
    if e.has(Proc2Ctl.PASID_TRANSLATION):
        yield from address(e, _S, F.LOW_PASID_DIRECTORY_ADDRESS, 4096, "low PASID directory")
        yield from address(e, _S, F.HIGH_PASID_DIRECTORY_ADDRESS, 4096, "high PASID directory")


RULES: tuple[Rule, ...] = (
    control_words,
    cr3_targets,
    bitmaps,
    tpr_shadow,
    nmi,
    apic_virtualization,
    posted_interrupts,
    vpid,
    ept_pointer,
    needs_ept,
    vm_functions,
    shadowing_and_ve,
    tracing_and_tsc,
    tertiary,
)
