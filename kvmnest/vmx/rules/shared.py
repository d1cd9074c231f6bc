"""Checks that the host-state and the guest-state area have in common."""

from __future__ import annotations

from collections.abc import Iterator

from kvmnest.vmx.fields import Field
from kvmnest.vmx.registers import Cr0, Cr4
from kvmnest.vmx.rules.model import Entry, Section, Violation

_S_CET_RESERVED = 0x3C0
"""Bits 9:6 of IA32_S_CET."""

_NW_CD = Cr0.NW.value | Cr0.CD.value


def fixed_bits(
    e: Entry, section: Section, field: Field, kind: type[Cr0] | type[Cr4], ignore: int
) -> Iterator[Violation]:
    """CR0 or CR4 against the bits that VMX operation fixes.

    ``ignore`` lists must-be-1 bits that the rule leaves free (PE and PG of an unrestricted
    guest). CR0.NW and CR0.CD are never checked: VM entry and VM exit do not load them.
    """
    value = e[field]
    zero = e.caps.must_be_one(kind) & ~value & ~ignore
    one = value & ~e.caps.may_be_one(kind)
    if kind is Cr0:
        zero, one = zero & ~_NW_CD, one & ~_NW_CD
    if zero or one:
        from kvmnest.vmx.explain import flag_names

        name = kind.__name__.upper()
        if zero:
            yield section.broken(f"{name}: {flag_names(kind, zero)} must be 1", field)
        if one:
            yield section.broken(f"{name}: {flag_names(kind, one)} must be 0", field)


def reserved_cr3(e: Entry, section: Section, field: Field) -> Iterator[Violation]:
    """CR3 sets no bit beyond the physical-address width (LAM's bits 62:61 excepted)."""
    value = e[field]
    if e.caps.cpu.lam:
        value &= ~(3 << 61)
    if value >> e.caps.cpu.physical_bits:
        yield section.broken("CR3 must not exceed the physical-address width", field)


def cet_state(
    e: Entry, section: Section, s_cet: Field, ssp: Field, table: Field
) -> Iterator[Violation]:
    """IA32_S_CET, SSP and IA32_INTERRUPT_SSP_TABLE_ADDR."""
    value = e[s_cet]
    if value & _S_CET_RESERVED:
        yield section.broken("bits 9:6 of IA32_S_CET must be 0", s_cet)
    if value >> 10 & 3 == 3:
        yield section.broken("bits 11:10 of IA32_S_CET must not both be 1", s_cet)
    for field in (s_cet, ssp, table):
        if not e.canonical(e[field]):
            yield section.broken("the address must be canonical", field)
    if e[ssp] & 3:
        yield section.broken("bits 1:0 of SSP must be 0", ssp)
