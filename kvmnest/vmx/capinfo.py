"""Views of IA32_VMX_BASIC and IA32_VMX_MISC, and the CPUID facts that VM entry depends on.

Layouts: Intel SDM appendix "VMX Capability Reporting Facility".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kvmnest.vmx.controls import BasicCap, Misc
from kvmnest.vmx.registers import ActivityState, DebugCtl, Efer


class BasicInfo(int):
    """IA32_VMX_BASIC: the register's value with its parts as properties."""

    @property
    def revision_id(self) -> int:
        """VMCS revision identifier, 31 bits."""
        return self & 0x7FFFFFFF

    @property
    def region_size(self) -> int:
        """Bytes to allocate for the VMXON region and for each VMCS (1 to 4096)."""
        return self >> 32 & 0x1FFF

    @property
    def memory_type(self) -> int:
        """Memory type to use for VMX structures: 6 is write-back, 0 uncacheable."""
        return self >> 50 & 0xF

    @property
    def physical_32bit(self) -> bool:
        """Addresses of VMX structures are limited to 32 bits."""
        return bool(self & BasicCap.PHYSICAL_32BIT.value)

    @property
    def dual_monitor(self) -> bool:
        """Dual-monitor treatment of SMIs and SMM is supported."""
        return bool(self & BasicCap.DUAL_MONITOR.value)

    @property
    def ins_outs_info(self) -> bool:
        """VM exits due to INS and OUTS report VM-exit instruction information."""
        return bool(self & BasicCap.INS_OUTS_INFO.value)

    @property
    def true_controls(self) -> bool:
        """The IA32_VMX_TRUE_*_CTLS MSRs exist."""
        return bool(self & BasicCap.TRUE_CONTROLS.value)

    @property
    def error_code_optional(self) -> bool:
        """A hardware exception may be injected with or without error code, whatever it is."""
        return bool(self & BasicCap.ERROR_CODE_OPTIONAL.value)


class MiscInfo(int):
    """IA32_VMX_MISC: the register's value with its parts as properties."""

    @property
    def preemption_timer_rate(self) -> int:
        """The timer counts down by 1 each time this bit of the TSC changes."""
        return self & 0x1F

    @property
    def save_efer_lma(self) -> bool:
        """VM exits store IA32_EFER.LMA into the "IA-32e mode guest" VM-entry control."""
        return bool(self & Misc.SAVE_EFER_LMA.value)

    @property
    def activity_states(self) -> frozenset[ActivityState]:
        """Activity states that VM entry accepts; active is always one of them."""
        return frozenset(
            state
            for state in ActivityState
            if state is ActivityState.ACTIVE or self >> (5 + state.value) & 1
        )

    @property
    def cr3_targets(self) -> int:
        """Number of CR3-target values."""
        return self >> 16 & 0x1FF

    @property
    def msr_list_max(self) -> int:
        """Recommended maximum of entries in each MSR area: 512 * (N + 1)."""
        return 512 * ((self >> 25 & 7) + 1)

    @property
    def vmwrite_any_field(self) -> bool:
        """VMWRITE may write the read-only (exit information) fields."""
        return bool(self & Misc.VMWRITE_ANY_FIELD.value)

    @property
    def zero_length_injection(self) -> bool:
        """Software events may be injected with an instruction length of 0."""
        return bool(self & Misc.ZERO_LENGTH_INJECTION.value)

    @property
    def mseg_revision_id(self) -> int:
        """MSEG revision identifier for the SMM-transfer monitor."""
        return self >> 32


_DEBUGCTL_BASE = 0x1FC3  # LBR, BTF, TR, BTS, BTINT, BTS_OFF_*, FREEZE_*: bits 0, 1, 6-12


@dataclass(frozen=True)
class CpuFeatures:
    """What the checks of VM entry need to know beyond the VMX MSRs.

    ``physical_bits`` and ``linear_bits`` are address widths. The ``*_valid`` masks are the bits
    of an MSR that the processor defines. The defaults are those of the broadest ordinary
    processor with 4-level paging; `from_cpuid` narrows them.
    """

    physical_bits: int = 52
    linear_bits: int = 48
    efer_valid: int = int(Efer.SCE | Efer.LME | Efer.LMA | Efer.NXE)
    debugctl_valid: int = 0xFFC3
    perf_global_ctrl_valid: int = 0x0001_FFFF_FFFF_FFFF
    rtm: bool = True
    bus_lock_trap: bool = True
    sgx: bool = False
    cet: bool = False
    lam: bool = False

    @classmethod
    def from_cpuid(cls, leaves: Mapping[tuple[int, int], tuple[int, int, int, int]]) -> CpuFeatures:
        """Derive it from CPUID: (leaf, subleaf) -> (eax, ebx, ecx, edx).

        A leaf that is absent counts as zero. Source: CPUID reference of the Intel SDM.
        """
        zero = (0, 0, 0, 0)
        _, ebx7, ecx7, edx7 = leaves.get((7, 0), zero)
        leaf1 = leaves.get((1, 0), zero)
        perf = leaves.get((0xA, 0), zero)
        ext1 = leaves.get((0x80000001, 0), zero)
        size = leaves.get((0x80000008, 0), zero)[0]
        rtm = bool(ebx7 >> 11 & 1)
        bus_lock = bool(ecx7 >> 24 & 1)
        efer = 0
        if ext1[3] >> 11 & 1:
            efer |= Efer.SCE.value
        if ext1[3] >> 29 & 1:
            efer |= Efer.LME.value | Efer.LMA.value
        if ext1[3] >> 20 & 1:
            efer |= Efer.NXE.value
        debugctl = _DEBUGCTL_BASE
        if bus_lock:
            debugctl |= DebugCtl.BLD.value
        if rtm:
            debugctl |= DebugCtl.RTM_DEBUG.value
        if leaf1[2] >> 15 & 1:  # PDCM: IA32_PERF_CAPABILITIES exists
            debugctl |= DebugCtl.FREEZE_WHILE_SMM.value
        general = perf[0] >> 8 & 0xFF
        fixed = perf[3] & 0x1F if perf[0] & 0xFF > 1 else 0
        return cls(
            physical_bits=size & 0xFF or 36,
            linear_bits=57 if ecx7 >> 16 & 1 else size >> 8 & 0xFF or 48,
            efer_valid=efer,
            debugctl_valid=debugctl,
            perf_global_ctrl_valid=(1 << general) - 1 | ((1 << fixed) - 1) << 32,
            rtm=rtm,
            bus_lock_trap=bus_lock,
            sgx=bool(ebx7 >> 2 & 1),
            cet=bool(ecx7 >> 7 & 1 or edx7 >> 20 & 1),
            lam=bool(leaves.get((7, 1), zero)[0] >> 26 & 1),
        )
