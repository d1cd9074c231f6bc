"""Checks on guest control registers, debug registers, MSRs, RIP and RFLAGS."""

from __future__ import annotations

from collections.abc import Iterator

from kvmnest.vmx.controls import EntryCtl
from kvmnest.vmx.fields import Field as F
from kvmnest.vmx.registers import (
    INTR_INFO_VALID,
    AccessRights,
    Cr0,
    Cr4,
    Efer,
    IntrType,
    Rflags,
)
from kvmnest.vmx.rules.model import Entry, Rule, Section, Stage, Violation, pat_valid
from kvmnest.vmx.rules.shared import cet_state, fixed_bits, reserved_cr3

_REGS = Section(Stage.GUEST, "Checks on Guest Control Registers, Debug Registers, and MSRs")
_TABLES = Section(Stage.GUEST, "Checks on Guest Descriptor-Table Registers")
_RIP = Section(Stage.GUEST, "Checks on Guest RIP, RFLAGS, and SSP")

_RFLAGS_RESERVED = ~0x3FFFFF & 0xFFFFFFFFFFFFFFFF | 1 << 15 | 1 << 5 | 1 << 3


def control_registers(e: Entry) -> Iterator[Violation]:
    """CR0, CR3 and CR4, with what IA-32e mode and CET need."""
    cr0, cr4 = e[F.GUEST_CR0], e[F.GUEST_CR4]
    paging = Cr0.PE.value | Cr0.PG.value
    yield from fixed_bits(e, _REGS, F.GUEST_CR0, Cr0, ignore=paging if e.unrestricted else 0)
    if cr0 & Cr0.PG.value and not cr0 & Cr0.PE.value:
        yield _REGS.broken("CR0.PG needs CR0.PE", F.GUEST_CR0)
    yield from fixed_bits(e, _REGS, F.GUEST_CR4, Cr4, ignore=0)
    if cr4 & Cr4.CET.value and not cr0 & Cr0.WP.value:
        yield _REGS.broken("CR4.CET needs CR0.WP", F.GUEST_CR4, F.GUEST_CR0)
    if e.ia32e:
        if not cr0 & Cr0.PG.value:
            yield _REGS.broken("IA-32e mode needs CR0.PG", F.GUEST_CR0, F.VM_ENTRY_CONTROLS)
        if not cr4 & Cr4.PAE.value:
            yield _REGS.broken("IA-32e mode needs CR4.PAE", F.GUEST_CR4, F.VM_ENTRY_CONTROLS)
    elif cr4 & Cr4.PCIDE.value:
        yield _REGS.broken("CR4.PCIDE needs IA-32e mode", F.GUEST_CR4, F.VM_ENTRY_CONTROLS)
    yield from reserved_cr3(e, _REGS, F.GUEST_CR3)


def debug_state(e: Entry) -> Iterator[Violation]:
    """IA32_DEBUGCTL and DR7, which are loaded together."""
    if not e.has(EntryCtl.LOAD_DEBUG_CONTROLS):
        return
    if e[F.GUEST_IA32_DEBUGCTL] & ~e.caps.cpu.debugctl_valid:
        yield _REGS.broken("IA32_DEBUGCTL must not set reserved bits", F.GUEST_IA32_DEBUGCTL)
    if e[F.GUEST_DR7] >> 32:
        yield _REGS.broken("bits 63:32 of DR7 must be 0", F.GUEST_DR7)


def efer(e: Entry) -> Iterator[Violation]:
    """IA32_EFER agrees with the mode of the guest."""
    if not e.has(EntryCtl.LOAD_EFER):
        return
    value = e[F.GUEST_IA32_EFER]
    lma, lme = bool(value & Efer.LMA.value), bool(value & Efer.LME.value)
    if value & ~e.caps.cpu.efer_valid:
        yield _REGS.broken("IA32_EFER must not set reserved bits", F.GUEST_IA32_EFER)
    if lma != e.ia32e:
        yield _REGS.broken(
            "IA32_EFER.LMA must equal IA32E_MODE_GUEST", F.GUEST_IA32_EFER, F.VM_ENTRY_CONTROLS
        )
    if e[F.GUEST_CR0] & Cr0.PG.value and lma != lme:
        yield _REGS.broken(
            "IA32_EFER.LMA must equal LME with CR0.PG", F.GUEST_IA32_EFER, F.GUEST_CR0
        )


def msrs(e: Entry) -> Iterator[Violation]:
    """The other MSRs that VM entry loads."""
    for field in (F.GUEST_SYSENTER_ESP, F.GUEST_SYSENTER_EIP):
        if not e.canonical(e[field]):
            yield _REGS.broken("the address must be canonical", field)
    if e.has(EntryCtl.LOAD_PERF_GLOBAL_CTRL) and (
        e[F.GUEST_IA32_PERF_GLOBAL_CTRL] & ~e.caps.cpu.perf_global_ctrl_valid
    ):
        yield _REGS.broken(
            "IA32_PERF_GLOBAL_CTRL must not set reserved bits", F.GUEST_IA32_PERF_GLOBAL_CTRL
        )
    if e.has(EntryCtl.LOAD_PAT) and not pat_valid(e[F.GUEST_IA32_PAT]):
        yield _REGS.broken("each byte of IA32_PAT must be a memory type", F.GUEST_IA32_PAT)
    if e.has(EntryCtl.LOAD_BNDCFGS):
        bounds = e[F.GUEST_BNDCFGS]
        if bounds & 0xFFC:
            yield _REGS.broken("bits 11:2 of IA32_BNDCFGS must be 0", F.GUEST_BNDCFGS)
        if not e.canonical(bounds & ~0xFFF):
            yield _REGS.broken("the address in IA32_BNDCFGS must be canonical", F.GUEST_BNDCFGS)
    if e.has(EntryCtl.LOAD_PKRS) and e[F.GUEST_IA32_PKRS] >> 32:
        yield _REGS.broken("bits 63:32 of IA32_PKRS must be 0", F.GUEST_IA32_PKRS)
    if e.has(EntryCtl.LOAD_UINV) and e[F.GUEST_UINV] >> 8:
        yield _REGS.broken("bits 15:8 of UINV must be 0", F.GUEST_UINV)


def shadow_stack(e: Entry) -> Iterator[Violation]:
    """CET state; outside 64-bit mode SSP has 32 bits."""
    if not e.has(EntryCtl.LOAD_CET_STATE):
        return
    yield from cet_state(e, _REGS, F.GUEST_S_CET, F.GUEST_SSP, F.GUEST_INTR_SSP_TABLE)
    if e[F.GUEST_SSP] >> 32 and not _code64(e):
        yield _RIP.broken("bits 63:32 of SSP must be 0 outside 64-bit mode", F.GUEST_SSP)


def descriptor_tables(e: Entry) -> Iterator[Violation]:
    """GDTR and IDTR."""
    for base in (F.GUEST_GDTR_BASE, F.GUEST_IDTR_BASE):
        if not e.canonical(e[base]):
            yield _TABLES.broken("the base must be canonical", base)
    for limit in (F.GUEST_GDTR_LIMIT, F.GUEST_IDTR_LIMIT):
        if e[limit] >> 16:
            yield _TABLES.broken("bits 31:16 of the limit must be 0", limit)


def _code64(e: Entry) -> bool:
    return e.ia32e and bool(AccessRights.decode(e[F.GUEST_CS_ACCESS_RIGHTS]).l)


def rip(e: Entry) -> Iterator[Violation]:
    """RIP; in 64-bit mode only the bits above the linear-address width must be equal.

    So the lowest address that is not canonical (bit 47 alone, with 48 bits) passes this check.
    """
    value = e[F.GUEST_RIP]
    if not _code64(e):
        if value >> 32:
            yield _RIP.broken(
                "bits 63:32 of RIP must be 0 outside 64-bit mode",
                F.GUEST_RIP,
                F.GUEST_CS_ACCESS_RIGHTS,
            )
        return
    bits = e.caps.cpu.linear_bits
    if value >> bits not in (0, (1 << (64 - bits)) - 1):
        yield _RIP.broken(f"bits 63:{bits} of RIP must be equal", F.GUEST_RIP)


def rflags(e: Entry) -> Iterator[Violation]:
    """RFLAGS: reserved bits, VM, and IF for an injected external interrupt."""
    value = e[F.GUEST_RFLAGS]
    if value & _RFLAGS_RESERVED:
        yield _RIP.broken("bits 63:22, 15, 5 and 3 of RFLAGS must be 0", F.GUEST_RFLAGS)
    if not value & Rflags.RESERVED1.value:
        yield _RIP.broken("bit 1 of RFLAGS must be 1", F.GUEST_RFLAGS)
    if value & Rflags.VM.value:
        if e.ia32e:
            yield _RIP.broken(
                "RFLAGS.VM must be 0 in IA-32e mode", F.GUEST_RFLAGS, F.VM_ENTRY_CONTROLS
            )
        if not e.protected:
            yield _RIP.broken("RFLAGS.VM needs CR0.PE", F.GUEST_RFLAGS, F.GUEST_CR0)
    event = e[F.VM_ENTRY_INTR_INFO_FIELD]
    if (
        event & INTR_INFO_VALID
        and event >> 8 & 7 == IntrType.EXTERNAL_INTERRUPT
        and not value & Rflags.IF.value
    ):
        yield _RIP.broken(
            "injecting an external interrupt needs RFLAGS.IF",
            F.GUEST_RFLAGS,
            F.VM_ENTRY_INTR_INFO_FIELD,
        )


RULES: tuple[Rule, ...] = (
    control_registers,
    debug_state,
    efer,
    msrs,
    shadow_stack,
    descriptor_tables,
    rip,
    rflags,
)
