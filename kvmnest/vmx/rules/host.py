"""Checks on the host-state area and on the address-space size."""

from __future__ import annotations

from collections.abc import Iterator

from kvmnest.vmx.controls import EntryCtl, ExitCtl
from kvmnest.vmx.fields import Field as F
from kvmnest.vmx.registers import Cr0, Cr4, Efer
from kvmnest.vmx.rules.model import Entry, Rule, Section, Stage, Violation, pat_valid
from kvmnest.vmx.rules.shared import cet_state, fixed_bits, reserved_cr3

_REGS = Section(Stage.HOST, "Checks on Host Control Registers, MSRs, and SSP")
_SEGS = Section(Stage.HOST, "Checks on Host Segment and Descriptor-Table Registers")
_SIZE = Section(Stage.HOST, "Checks Related to Address-Space Size")

_SELECTORS = (
    F.HOST_ES_SELECTOR,
    F.HOST_CS_SELECTOR,
    F.HOST_SS_SELECTOR,
    F.HOST_DS_SELECTOR,
    F.HOST_FS_SELECTOR,
    F.HOST_GS_SELECTOR,
    F.HOST_TR_SELECTOR,
)
_BASES = (
    F.HOST_FS_BASE,
    F.HOST_GS_BASE,
    F.HOST_TR_BASE,
    F.HOST_GDTR_BASE,
    F.HOST_IDTR_BASE,
)


def control_registers(e: Entry) -> Iterator[Violation]:
    """CR0, CR3 and CR4 that the VM exit will load."""
    cr0, cr4 = e[F.HOST_CR0], e[F.HOST_CR4]
    yield from fixed_bits(e, _REGS, F.HOST_CR0, Cr0, ignore=0)
    yield from fixed_bits(e, _REGS, F.HOST_CR4, Cr4, ignore=0)
    if cr4 & Cr4.CET.value and not cr0 & Cr0.WP.value:
        yield _REGS.broken("CR4.CET needs CR0.WP", F.HOST_CR4, F.HOST_CR0)
    yield from reserved_cr3(e, _REGS, F.HOST_CR3)


def msrs(e: Entry) -> Iterator[Violation]:
    """MSRs that the VM exit will load."""
    for field in (F.HOST_IA32_SYSENTER_ESP, F.HOST_IA32_SYSENTER_EIP):
        if not e.canonical(e[field]):
            yield _REGS.broken("the address must be canonical", field)
    if e.has(ExitCtl.LOAD_PERF_GLOBAL_CTRL) and (
        e[F.HOST_IA32_PERF_GLOBAL_CTRL] & ~e.caps.cpu.perf_global_ctrl_valid
    ):
        yield _REGS.broken(
            "IA32_PERF_GLOBAL_CTRL must not set reserved bits", F.HOST_IA32_PERF_GLOBAL_CTRL
        )
    if e.has(ExitCtl.LOAD_PAT) and not pat_valid(e[F.HOST_IA32_PAT]):
        yield _REGS.broken("each byte of IA32_PAT must be a memory type", F.HOST_IA32_PAT)
    if e.has(ExitCtl.LOAD_PKRS) and e[F.HOST_IA32_PKRS] >> 32:
        yield _REGS.broken("bits 63:32 of IA32_PKRS must be 0", F.HOST_IA32_PKRS)


def efer(e: Entry) -> Iterator[Violation]:
    """IA32_EFER agrees with the address-space size."""
    if not e.has(ExitCtl.LOAD_EFER):
        return
    value = e[F.HOST_IA32_EFER]
    size = e.has(ExitCtl.HOST_ADDRESS_SPACE_SIZE)
    if value & ~e.caps.cpu.efer_valid:
        yield _REGS.broken("IA32_EFER must not set reserved bits", F.HOST_IA32_EFER)
    for flag in (Efer.LMA, Efer.LME):
        if bool(value & flag.value) != size:
            yield _REGS.broken(
                f"IA32_EFER.{flag.name} must equal HOST_ADDRESS_SPACE_SIZE",
                F.HOST_IA32_EFER,
                F.VM_EXIT_CONTROLS,
            )


def shadow_stack(e: Entry) -> Iterator[Violation]:
    """CET state that the VM exit will load."""
    if e.has(ExitCtl.LOAD_CET_STATE):
        yield from cet_state(e, _REGS, F.HOST_S_CET, F.HOST_SSP, F.HOST_INTR_SSP_TABLE)


def segments(e: Entry) -> Iterator[Violation]:
    """Host selectors and bases."""
    for field in _SELECTORS:
        if e[field] & 7:
            yield _SEGS.broken("RPL and TI of the selector must be 0", field)
    for field in (F.HOST_CS_SELECTOR, F.HOST_TR_SELECTOR):
        if not e[field]:
            yield _SEGS.broken("the selector must not be 0", field)
    if not e.has(ExitCtl.HOST_ADDRESS_SPACE_SIZE) and not e[F.HOST_SS_SELECTOR]:
        yield _SEGS.broken("SS must not be 0 for a 32-bit host", F.HOST_SS_SELECTOR)
    for field in _BASES:
        if not e.canonical(e[field]):
            yield _SEGS.broken("the base must be canonical", field)


def address_space_size(e: Entry) -> Iterator[Violation]:
    """The mode of L1 now, the mode it returns to, and the mode of the guest."""
    size, guest = e.has(ExitCtl.HOST_ADDRESS_SPACE_SIZE), e.has(EntryCtl.IA32E_MODE_GUEST)
    cr4, rip = e[F.HOST_CR4], e[F.HOST_RIP]
    if size != e.context.long_mode:
        yield _SIZE.broken(
            "HOST_ADDRESS_SPACE_SIZE must equal IA32_EFER.LMA at VM entry", F.VM_EXIT_CONTROLS
        )
    if guest and not e.context.long_mode:
        yield _SIZE.broken(
            "IA32E_MODE_GUEST needs a VM entry from IA-32e mode", F.VM_ENTRY_CONTROLS
        )
    if size:
        if not cr4 & Cr4.PAE.value:
            yield _SIZE.broken("a 64-bit host needs CR4.PAE", F.HOST_CR4)
        if not e.canonical(rip):
            yield _SIZE.broken("RIP of a 64-bit host must be canonical", F.HOST_RIP)
        return
    if guest:
        yield _SIZE.broken(
            "IA32E_MODE_GUEST needs HOST_ADDRESS_SPACE_SIZE",
            F.VM_ENTRY_CONTROLS,
            F.VM_EXIT_CONTROLS,
        )
    if cr4 & Cr4.PCIDE.value:
        yield _SIZE.broken("CR4.PCIDE must be 0 for a 32-bit host", F.HOST_CR4)
    if rip >> 32:
        yield _SIZE.broken("bits 63:32 of RIP must be 0 for a 32-bit host", F.HOST_RIP)


RULES: tuple[Rule, ...] = (
    control_registers,
    msrs,
    efer,
    shadow_stack,
    segments,
    address_space_size,
)
