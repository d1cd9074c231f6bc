"""VMX capabilities: what the capability MSRs allow, as one immutable value.

Source: Intel SDM appendix "VMX Capability Reporting Facility".
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from kvmnest.vmx.capinfo import BasicInfo, CpuFeatures, MiscInfo
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
from kvmnest.vmx.fields import Field
from kvmnest.vmx.msrs import VMX_MSRS, Msr
from kvmnest.vmx.registers import Cr0, Cr4

FlagT = TypeVar("FlagT", bound=enum.IntFlag)

_TRUE: dict[type[enum.IntFlag], tuple[Msr, Msr]] = {
    PinCtl: (Msr.IA32_VMX_PINBASED_CTLS, Msr.IA32_VMX_TRUE_PINBASED_CTLS),
    ProcCtl: (Msr.IA32_VMX_PROCBASED_CTLS, Msr.IA32_VMX_TRUE_PROCBASED_CTLS),
    ExitCtl: (Msr.IA32_VMX_EXIT_CTLS, Msr.IA32_VMX_TRUE_EXIT_CTLS),
    EntryCtl: (Msr.IA32_VMX_ENTRY_CTLS, Msr.IA32_VMX_TRUE_ENTRY_CTLS),
}
"""Controls whose MSR has a TRUE variant."""

_ONE_MSR: dict[type[enum.IntFlag], Msr] = {
    Proc2Ctl: Msr.IA32_VMX_PROCBASED_CTLS2,
    Proc3Ctl: Msr.IA32_VMX_PROCBASED_CTLS3,
    Exit2Ctl: Msr.IA32_VMX_EXIT_CTLS2,
    VmFunc: Msr.IA32_VMX_VMFUNC,
    BasicCap: Msr.IA32_VMX_BASIC,
    Misc: Msr.IA32_VMX_MISC,
    EptVpidCap: Msr.IA32_VMX_EPT_VPID_CAP,
    Cr0: Msr.IA32_VMX_CR0_FIXED1,
    Cr4: Msr.IA32_VMX_CR4_FIXED1,
}

_SPLIT = (PinCtl, ProcCtl, Proc2Ctl, ExitCtl, EntryCtl)
"""Controls whose MSR holds the must-be-1 bits low and the may-be-1 bits high."""


@dataclass(frozen=True)
class Capabilities:
    """The VMX capability MSRs of one logical processor, plus what CPUID adds to them.

    ``msrs`` maps MSR index to value; an MSR that is absent counts as one that does not exist
    (no secondary controls, no EPT, ...). Build it with `from_msrs`.
    """

    msrs: Mapping[int, int]
    cpu: CpuFeatures = field(default_factory=CpuFeatures)

    def __repr__(self) -> str:
        return f"<Capabilities of {len(self.msrs)} MSRs>"

    @classmethod
    def from_msrs(cls, msrs: Mapping[int, int], cpu: CpuFeatures | None = None) -> Capabilities:
        """Take the VMX MSRs (480H to 493H) out of ``msrs``; other indices are ignored.

        Raises ValueError when IA32_VMX_BASIC is missing: the processor then has no VMX.
        """
        kept = {int(index): value for index, value in msrs.items() if index in VMX_MSRS}
        if not kept.get(Msr.IA32_VMX_BASIC.value):
            raise ValueError("IA32_VMX_BASIC (480H) is missing or 0: no VMX here")
        return cls(kept, cpu or CpuFeatures())

    def msr(self, index: Msr) -> int:
        """Value of a capability MSR, 0 when it does not exist."""
        return self.msrs.get(index.value, 0)

    @property
    def basic(self) -> BasicInfo:
        """IA32_VMX_BASIC."""
        return BasicInfo(self.msr(Msr.IA32_VMX_BASIC))

    @property
    def misc(self) -> MiscInfo:
        """IA32_VMX_MISC."""
        return MiscInfo(self.msr(Msr.IA32_VMX_MISC))

    @property
    def ept_vpid(self) -> EptVpidCap:
        """IA32_VMX_EPT_VPID_CAP, empty without EPT and VPID."""
        return EptVpidCap(self.msr(Msr.IA32_VMX_EPT_VPID_CAP))

    @property
    def vmfunc(self) -> VmFunc:
        """VM functions that VMFUNC can offer."""
        return VmFunc(self.msr(Msr.IA32_VMX_VMFUNC))

    @property
    def vmcs_enum_max_index(self) -> int:
        """Highest index (bits 9:1) of any VMCS field encoding."""
        return self.msr(Msr.IA32_VMX_VMCS_ENUM) >> 1 & 0x1FF

    @property
    def cr0_fixed0(self) -> int:
        """CR0 bits that must be 1 in VMX operation."""
        return self.msr(Msr.IA32_VMX_CR0_FIXED0)

    @property
    def cr0_fixed1(self) -> int:
        """CR0 bits that may be 1 in VMX operation."""
        return self.msr(Msr.IA32_VMX_CR0_FIXED1)

    @property
    def cr4_fixed0(self) -> int:
        """CR4 bits that must be 1 in VMX operation."""
        return self.msr(Msr.IA32_VMX_CR4_FIXED0)

    @property
    def cr4_fixed1(self) -> int:
        """CR4 bits that may be 1 in VMX operation."""
        return self.msr(Msr.IA32_VMX_CR4_FIXED1)

    def source(self, flagtype: type[enum.IntFlag]) -> Msr:
        """The MSR that decides over a kind of flags (the TRUE one when it exists).

        Raises TypeError for flags that no capability MSR reports.
        """
        pair = _TRUE.get(flagtype)
        if pair is not None:
            old, true = pair
            return true if self.basic.true_controls and true.value in self.msrs else old
        try:
            return _ONE_MSR[flagtype]
        except KeyError:
            raise TypeError(f"no VMX capability MSR reports {flagtype.__name__}") from None

    def must_be_one(self, flagtype: type[enum.IntFlag]) -> int:
        """Bits that VM entry (or VMXON, for CR0 and CR4) requires to be 1."""
        if flagtype is Cr0:
            return self.cr0_fixed0
        if flagtype is Cr4:
            return self.cr4_fixed0
        if flagtype in _SPLIT:
            return self.msr(self.source(flagtype)) & 0xFFFFFFFF
        self.source(flagtype)
        return 0

    def may_be_one(self, flagtype: type[enum.IntFlag]) -> int:
        """Bits that are supported, reserved ones included."""
        value = self.msr(self.source(flagtype))
        return value >> 32 if flagtype in _SPLIT else value

    def allowed0(self, flagtype: type[FlagT]) -> FlagT:
        """Bits whose 0-setting is not allowed (they must be 1), as the same flag type."""
        return flagtype(self.must_be_one(flagtype))

    def clamp(self, flags: FlagT) -> FlagT:
        """``flags`` with every must-be-1 bit set and every unsupported bit cleared."""
        kind = type(flags)
        return kind((flags.value | self.must_be_one(kind)) & self.may_be_one(kind))

    def supports(self, flags: enum.IntFlag) -> bool:
        """Whether every bit of ``flags`` can be 1."""
        return flags.value & ~self.may_be_one(type(flags)) == 0

    def missing(self, *flags: enum.IntFlag) -> list[str]:
        """One line for each bit of ``flags`` that is not supported; empty when all are."""
        lines = []
        for flag in flags:
            kind = type(flag)
            allowed = self.may_be_one(kind)
            lines += [
                f"{kind.__name__}.{bit.name}: {self.source(kind).name} allows only 0"
                for bit in kind
                if bit.value & flag.value & ~allowed
            ]
        return lines

    def field_exists(self, field: Field) -> bool:
        """Whether the SDM's conditions say that the processor has this VMCS field.

        A hypervisor below may lack more fields than the SDM allows (KVM has no executive-VMCS
        pointer, SMBASE or I/O registers, for example): that is a difference worth seeing.
        """
        from kvmnest.vmx.field_conditions import CONDITIONS

        if Field.CR3_TARGET_VALUE0 <= field <= Field.CR3_TARGET_VALUE3:
            return field.index - Field.CR3_TARGET_VALUE0.index < self.misc.cr3_targets
        flags = CONDITIONS.get(field)
        return flags is None or any(self.supports(flag) for flag in flags)
