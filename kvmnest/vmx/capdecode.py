"""The capability MSRs bit by bit, for people."""

from __future__ import annotations

import enum

from kvmnest.vmx.caps import Capabilities
from kvmnest.vmx.controls import (
    BasicCap,
    EntryCtl,
    EptVpidCap,
    Exit2Ctl,
    ExitCtl,
    Misc,
    PinCtl,
    Proc2Ctl,
    Proc3Ctl,
    ProcCtl,
    VmFunc,
)
from kvmnest.vmx.msrs import Msr
from kvmnest.vmx.registers import Cr0, Cr4

_SPLIT: tuple[tuple[Msr, type[enum.IntFlag]], ...] = (
    (Msr.IA32_VMX_PINBASED_CTLS, PinCtl),
    (Msr.IA32_VMX_TRUE_PINBASED_CTLS, PinCtl),
    (Msr.IA32_VMX_PROCBASED_CTLS, ProcCtl),
    (Msr.IA32_VMX_TRUE_PROCBASED_CTLS, ProcCtl),
    (Msr.IA32_VMX_PROCBASED_CTLS2, Proc2Ctl),
    (Msr.IA32_VMX_EXIT_CTLS, ExitCtl),
    (Msr.IA32_VMX_TRUE_EXIT_CTLS, ExitCtl),
    (Msr.IA32_VMX_ENTRY_CTLS, EntryCtl),
    (Msr.IA32_VMX_TRUE_ENTRY_CTLS, EntryCtl),
)

_PLAIN: tuple[tuple[Msr, type[enum.IntFlag]], ...] = (
    (Msr.IA32_VMX_PROCBASED_CTLS3, Proc3Ctl),
    (Msr.IA32_VMX_EXIT_CTLS2, Exit2Ctl),
    (Msr.IA32_VMX_EPT_VPID_CAP, EptVpidCap),
    (Msr.IA32_VMX_VMFUNC, VmFunc),
)

_MEMORY_TYPES = {0: "uncacheable (0)", 6: "write-back (6)"}


def _names(kind: type[enum.IntFlag], extra: int) -> list[tuple[int, str]]:
    """(mask, name) of each defined bit, then of each other bit set in ``extra``, by position."""
    known = {flag.value: flag.name or "" for flag in kind}
    rest = extra & ~sum(known)
    known |= {1 << i: f"bit {i}" for i in range(rest.bit_length()) if rest >> i & 1}
    return sorted(known.items())


def _split_lines(msr: Msr, kind: type[enum.IntFlag], value: int) -> list[tuple[Msr, str, str]]:
    must, may = value & 0xFFFFFFFF, value >> 32
    lines = []
    for mask, name in _names(kind, must | may):
        if must & mask and may & mask:
            text = "must be 1"
        elif may & mask:
            text = "0 or 1"
        elif must & mask:
            text = "inconsistent: must be 1 and must be 0"
        else:
            text = "must be 0"
        lines.append((msr, name, text))
    return lines


def _fixed_lines(caps: Capabilities) -> list[tuple[Msr, str, str]]:
    lines = []
    for low, high, kind in (
        (Msr.IA32_VMX_CR0_FIXED0, Msr.IA32_VMX_CR0_FIXED1, Cr0),
        (Msr.IA32_VMX_CR4_FIXED0, Msr.IA32_VMX_CR4_FIXED1, Cr4),
    ):
        fixed0, fixed1 = caps.msr(low), caps.msr(high)
        # Upper CR0 and CR4 bits without a name and the reserved ones say nothing to a reader.
        for mask, name in _names(kind, 0):
            text = "must be 1" if fixed0 & mask else "0 or 1" if fixed1 & mask else "must be 0"
            lines.append((low if fixed0 & mask else high, name, text))
    return lines


def decode(caps: Capabilities) -> list[tuple[Msr, str, str]]:
    """Lines of (msr, bit or number, value) for every capability MSR that exists."""
    basic, misc = caps.basic, caps.misc
    lines: list[tuple[Msr, str, str]] = [
        (Msr.IA32_VMX_BASIC, "revision identifier", f"{basic.revision_id:#x}"),
        (Msr.IA32_VMX_BASIC, "region size", f"{basic.region_size} bytes"),
        (
            Msr.IA32_VMX_BASIC,
            "memory type",
            _MEMORY_TYPES.get(basic.memory_type, f"reserved ({basic.memory_type})"),
        ),
    ]
    lines += [
        (Msr.IA32_VMX_BASIC, name, str(int(bool(basic & mask))))
        for mask, name in _names(BasicCap, 0)
    ]
    for msr, kind in _SPLIT:
        if msr.value in caps.msrs:
            lines += _split_lines(msr, kind, caps.msr(msr))
    lines += [
        (Msr.IA32_VMX_MISC, "preemption timer rate", f"TSC bit {misc.preemption_timer_rate}"),
        (Msr.IA32_VMX_MISC, "CR3-target values", str(misc.cr3_targets)),
        (Msr.IA32_VMX_MISC, "MSR list entries", str(misc.msr_list_max)),
        (Msr.IA32_VMX_MISC, "MSEG revision identifier", f"{misc.mseg_revision_id:#x}"),
    ]
    lines += [
        (Msr.IA32_VMX_MISC, name, str(int(bool(misc & mask)))) for mask, name in _names(Misc, 0)
    ]
    lines += _fixed_lines(caps)
    lines.append((Msr.IA32_VMX_VMCS_ENUM, "highest index", str(caps.vmcs_enum_max_index)))
    for msr, kind in _PLAIN:
        if msr.value in caps.msrs:
            value = caps.msr(msr)
            lines += [
                (msr, name, str(int(bool(value & mask)))) for mask, name in _names(kind, value)
            ]
    if Msr.IA32_VMX_EPT_VPID_CAP.value in caps.msrs:
        # Bits 53:48: the largest HLAT prefix size, a number among the flags.
        hlat = caps.msr(Msr.IA32_VMX_EPT_VPID_CAP) >> 48 & 0x3F
        lines.append((Msr.IA32_VMX_EPT_VPID_CAP, "largest HLAT prefix", str(hlat)))
    return lines
