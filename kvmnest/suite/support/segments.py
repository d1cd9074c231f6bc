"""Segment registers of L2 as changes of VMCS fields."""

from __future__ import annotations

from kvmnest.l1 import L1
from kvmnest.vmx import Field, Rflags

SIX = ("CS", "SS", "DS", "ES", "FS", "GS")
EIGHT = (*SIX, "LDTR", "TR")

#: Access rights: 64-bit code, 32-bit code, data and stack; DPL is added in bits 6:5.
CODE64, CODE32, DATA = 0xA09B, 0xC09B, 0xC093
UNUSABLE = 0x10000


def selector(name: str) -> Field:
    """Selector field of a segment register."""
    return Field[f"GUEST_{name}_SELECTOR"]


def base(name: str) -> Field:
    """Base field of a segment register."""
    return Field[f"GUEST_{name}_BASE"]


def limit(name: str) -> Field:
    """Limit field of a segment register."""
    return Field[f"GUEST_{name}_LIMIT"]


def rights(name: str) -> Field:
    """Access-rights field of a segment register."""
    return Field[f"GUEST_{name}_ACCESS_RIGHTS"]


def ldt(l1: L1) -> dict[Field, int]:
    """Return a usable LDTR."""
    return {
        selector("LDTR"): l1.sym("SEL_LDT"),
        base("LDTR"): l1.sym("l1_gdt"),
        limit("LDTR"): 7,
        rights("LDTR"): 0x82,
    }


def user_mode(l1: L1) -> dict[Field, int]:
    """Return CS and SS of 64-bit code at CPL 3."""
    return {
        selector("CS"): l1.sym("SEL_USER_CODE64"),
        rights("CS"): CODE64 | 3 << 5,
        selector("SS"): l1.sym("SEL_USER_DATA"),
        rights("SS"): DATA | 3 << 5,
    }


def v8086(code: int) -> dict[Field, int]:
    """Return registers of virtual-8086 mode at linear address ``code`` (below 1 MiB)."""
    changes = {Field.GUEST_RFLAGS: 2 | Rflags.VM, Field.GUEST_RIP: code & 0xF}
    for name in SIX:
        changes[selector(name)] = code >> 4
        changes[base(name)] = code & ~0xF
        changes[limit(name)] = 0xFFFF
        changes[rights(name)] = 0xF3
    return changes
