"""Control, flag and debug registers, exception vectors, access rights, interruption info.

Bit names follow the Intel SDM chapters "System Architecture Overview" and "Interrupt and
Exception Handling"; the interruption-information layout is the one of the VM-entry, VM-exit
and IDT-vectoring information fields.
"""

from __future__ import annotations

import enum
from typing import NamedTuple


class Cr0(enum.IntFlag):
    """CR0."""

    PE = 1 << 0
    MP = 1 << 1
    EM = 1 << 2
    TS = 1 << 3
    ET = 1 << 4
    NE = 1 << 5
    WP = 1 << 16
    AM = 1 << 18
    NW = 1 << 29
    CD = 1 << 30
    PG = 1 << 31


class Cr4(enum.IntFlag):
    """CR4."""

    VME = 1 << 0
    PVI = 1 << 1
    TSD = 1 << 2
    DE = 1 << 3
    PSE = 1 << 4
    PAE = 1 << 5
    MCE = 1 << 6
    PGE = 1 << 7
    PCE = 1 << 8
    OSFXSR = 1 << 9
    OSXMMEXCPT = 1 << 10
    UMIP = 1 << 11
    LA57 = 1 << 12
    VMXE = 1 << 13
    SMXE = 1 << 14
    FSGSBASE = 1 << 16
    PCIDE = 1 << 17
    OSXSAVE = 1 << 18
    KL = 1 << 19
    SMEP = 1 << 20
    SMAP = 1 << 21
    PKE = 1 << 22
    CET = 1 << 23
    PKS = 1 << 24
    UINTR = 1 << 25
    LASS = 1 << 27
    LAM_SUP = 1 << 28
    FRED = 1 << 32


class Efer(enum.IntFlag):
    """IA32_EFER."""

    SCE = 1 << 0
    LME = 1 << 8
    LMA = 1 << 10
    NXE = 1 << 11


class Rflags(enum.IntFlag):
    """RFLAGS; RESERVED1 is the bit that is always 1."""

    CF = 1 << 0
    RESERVED1 = 1 << 1
    PF = 1 << 2
    AF = 1 << 4
    ZF = 1 << 6
    SF = 1 << 7
    TF = 1 << 8
    IF = 1 << 9
    DF = 1 << 10
    OF = 1 << 11
    IOPL = 3 << 12
    NT = 1 << 14
    RF = 1 << 16
    VM = 1 << 17
    AC = 1 << 18
    VIF = 1 << 19
    VIP = 1 << 20
    ID = 1 << 21


#: CF, PF, AF, ZF, SF and OF, which each VMX instruction sets or clears (SDM, "Conventions"). A
#: plain integer: flag enumerations are slow, and every command looks at it.
STATUS_FLAGS = 0x8D5

#: Reset value of IA32_PAT (SDM, "Page Attribute Table (PAT)").
PAT_RESET = 0x0007040600070406


class Dr6(enum.IntFlag):
    """DR6; RESERVED1 are the bits that read as 1. BLD and RTM are 0 when they report."""

    B0 = 1 << 0
    B1 = 1 << 1
    B2 = 1 << 2
    B3 = 1 << 3
    BLD = 1 << 11
    BD = 1 << 13
    BS = 1 << 14
    BT = 1 << 15
    RTM = 1 << 16
    RESERVED1 = 0xFFFE07F0


class Dr7(enum.IntFlag):
    """DR7; RESERVED1 is the bit that is always 1 (RW and LEN fields are plain numbers)."""

    L0 = 1 << 0
    G0 = 1 << 1
    L1 = 1 << 2
    G1 = 1 << 3
    L2 = 1 << 4
    G2 = 1 << 5
    L3 = 1 << 6
    G3 = 1 << 7
    LE = 1 << 8
    GE = 1 << 9
    RESERVED1 = 1 << 10
    RTM = 1 << 11
    GD = 1 << 13


class DebugCtl(enum.IntFlag):
    """IA32_DEBUGCTL."""

    LBR = 1 << 0
    BTF = 1 << 1
    BLD = 1 << 2
    TR = 1 << 6
    BTS = 1 << 7
    BTINT = 1 << 8
    BTS_OFF_OS = 1 << 9
    BTS_OFF_USR = 1 << 10
    FREEZE_LBRS_ON_PMI = 1 << 11
    FREEZE_PERFMON_ON_PMI = 1 << 12
    ENABLE_UNCORE_PMI = 1 << 13
    FREEZE_WHILE_SMM = 1 << 14
    RTM_DEBUG = 1 << 15


class FeatureControl(enum.IntFlag):
    """IA32_FEATURE_CONTROL."""

    LOCKED = 1 << 0
    VMX_IN_SMX = 1 << 1
    VMX_OUTSIDE_SMX = 1 << 2
    SGX_LAUNCH_CONTROL = 1 << 17
    SGX_GLOBAL = 1 << 18
    LMCE = 1 << 20


class Vector(enum.IntEnum):
    """Exception vectors."""

    DE = 0
    DB = 1
    NMI = 2
    BP = 3
    OF = 4
    BR = 5
    UD = 6
    NM = 7
    DF = 8
    TS = 10
    NP = 11
    SS = 12
    GP = 13
    PF = 14
    MF = 16
    AC = 17
    MC = 18
    XM = 19
    VE = 20
    CP = 21


ERROR_CODE_VECTORS = frozenset({8, 10, 11, 12, 13, 14, 17})
"""Exceptions that VM entry may inject with an error code (SDM: checks on the VM-entry
interruption-information field). #CP (21) joins them where the processor supports CET."""


class PfErr(enum.IntFlag):
    """Page-fault error code."""

    PRESENT = 1 << 0
    WRITE = 1 << 1
    USER = 1 << 2
    RESERVED = 1 << 3
    FETCH = 1 << 4
    PROTECTION_KEY = 1 << 5
    SHADOW_STACK = 1 << 6
    HLAT = 1 << 7
    SGX = 1 << 15


class IntrType(enum.IntEnum):
    """Bits 10:8 of an interruption-information field."""

    EXTERNAL_INTERRUPT = 0
    NMI = 2
    HARDWARE_EXCEPTION = 3
    SOFTWARE_INTERRUPT = 4
    PRIVILEGED_SOFTWARE_EXCEPTION = 5
    SOFTWARE_EXCEPTION = 6
    OTHER_EVENT = 7


INTR_INFO_VALID = 1 << 31
INTR_INFO_ERROR_CODE = 1 << 11
INTR_INFO_NMI_UNBLOCKING = 1 << 12


def intr_info(
    vector: int, type: IntrType | int, error_code: bool = False, valid: bool = True
) -> int:
    """Build an interruption-information value (32 bits).

    ``type`` may also be the reserved number 1, which a test wants to write.
    """
    return vector & 0xFF | (type & 7) << 8 | error_code << 11 | valid << 31


class Interruptibility(enum.IntFlag):
    """Guest interruptibility state."""

    STI = 1 << 0
    MOV_SS = 1 << 1
    SMI = 1 << 2
    NMI = 1 << 3
    ENCLAVE = 1 << 4


class ActivityState(enum.IntEnum):
    """Guest activity state."""

    ACTIVE = 0
    HLT = 1
    SHUTDOWN = 2
    WAIT_FOR_SIPI = 3


class PendingDebug(enum.IntFlag):
    """Guest pending debug exceptions."""

    B0 = 1 << 0
    B1 = 1 << 1
    B2 = 1 << 2
    B3 = 1 << 3
    BLD = 1 << 11
    ENABLED_BREAKPOINT = 1 << 12
    BS = 1 << 14
    RTM = 1 << 16


class AccessRights(NamedTuple):
    """A segment's access rights as the VMCS holds them (SDM "Guest Register State").

    ``type`` is the 4-bit descriptor type, ``s`` is 1 for code and data, ``l`` is 64-bit code,
    ``db`` default operand size, ``g`` granularity.
    """

    type: int = 0
    s: int = 1
    dpl: int = 0
    p: int = 1
    avl: int = 0
    l: int = 0  # noqa: E741 - the SDM's name of the bit
    db: int = 0
    g: int = 0
    unusable: int = 0

    def __int__(self) -> int:
        """The 32-bit value of the access-rights field."""
        return (
            self.type & 0xF
            | (self.s & 1) << 4
            | (self.dpl & 3) << 5
            | (self.p & 1) << 7
            | (self.avl & 1) << 12
            | (self.l & 1) << 13
            | (self.db & 1) << 14
            | (self.g & 1) << 15
            | (self.unusable & 1) << 16
        )

    @classmethod
    def decode(cls, value: int) -> AccessRights:
        """Take an access-rights field apart; reserved bits are dropped."""
        return cls(
            type=value & 0xF,
            s=value >> 4 & 1,
            dpl=value >> 5 & 3,
            p=value >> 7 & 1,
            avl=value >> 12 & 1,
            l=value >> 13 & 1,
            db=value >> 14 & 1,
            g=value >> 15 & 1,
            unusable=value >> 16 & 1,
        )

    def __str__(self) -> str:
        """Short form for messages: ``type=0xb s=1 dpl=0 p=1 l=1``."""
        parts = [f"type={self.type:#x}", f"s={self.s}", f"dpl={self.dpl}", f"p={self.p}"]
        parts += [
            f"{name}=1" for name in ("avl", "l", "db", "g", "unusable") if getattr(self, name)
        ]
        return " ".join(parts)
