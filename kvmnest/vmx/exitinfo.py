"""Exit qualifications and instruction information, decoded and encoded.

Layouts: Intel SDM section "Information for VM Exits" (basic VM-exit information, VM exits due
to vectored events, VM exits due to instruction execution). ``decode`` drops bits that the SDM
leaves undefined; ``encode`` gives the value with those bits 0.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from kvmnest.vmx.registers import IntrType

GPR_NAMES = (
    *("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi"),
    *(f"r{i}" for i in range(8, 16)),
)
"""General-purpose registers in the order of their 4-bit encodings."""

SEGMENT_NAMES = ("es", "cs", "ss", "ds", "fs", "gs")
"""Segment registers in the order of their 3-bit encodings."""


def _bit(value: int, position: int) -> bool:
    return bool(value >> position & 1)


class CrAccessType(enum.IntEnum):
    """Bits 5:4 of the qualification of a control-register access."""

    MOV_TO_CR = 0
    MOV_FROM_CR = 1
    CLTS = 2
    LMSW = 3


@dataclass(frozen=True)
class CrAccess:
    """Exit qualification for control-register accesses (exit reason 28).

    ``register`` is the general-purpose register of a MOV; the ``lmsw_*`` members matter for
    LMSW only (``lmsw_source`` is the 16-bit source operand).
    """

    cr: int
    type: CrAccessType
    register: int = 0
    lmsw_memory: bool = False
    lmsw_source: int = 0

    @classmethod
    def decode(cls, value: int) -> CrAccess:
        """Take an exit qualification apart."""
        return cls(
            cr=value & 0xF,
            type=CrAccessType(value >> 4 & 3),
            register=value >> 8 & 0xF,
            lmsw_memory=_bit(value, 6),
            lmsw_source=value >> 16 & 0xFFFF,
        )

    def encode(self) -> int:
        """The exit qualification."""
        return (
            self.cr
            | self.type << 4
            | self.lmsw_memory << 6
            | self.register << 8
            | self.lmsw_source << 16
        )


@dataclass(frozen=True)
class DrAccess:
    """Exit qualification for MOV DR (exit reason 29)."""

    dr: int
    read: bool
    register: int

    @classmethod
    def decode(cls, value: int) -> DrAccess:
        """Take an exit qualification apart."""
        return cls(dr=value & 7, read=_bit(value, 4), register=value >> 8 & 0xF)

    def encode(self) -> int:
        """The exit qualification."""
        return self.dr | self.read << 4 | self.register << 8


@dataclass(frozen=True)
class IoQualification:
    """Exit qualification for I/O instructions (exit reason 30); ``size`` is 1, 2 or 4 bytes."""

    size: int
    input: bool
    port: int
    string: bool = False
    rep: bool = False
    immediate: bool = False

    @classmethod
    def decode(cls, value: int) -> IoQualification:
        """Take an exit qualification apart."""
        return cls(
            size=(value & 7) + 1,
            input=_bit(value, 3),
            string=_bit(value, 4),
            rep=_bit(value, 5),
            immediate=_bit(value, 6),
            port=value >> 16 & 0xFFFF,
        )

    def encode(self) -> int:
        """The exit qualification."""
        return (
            self.size - 1
            | self.input << 3
            | self.string << 4
            | self.rep << 5
            | self.immediate << 6
            | self.port << 16
        )


_EPT_BITS = (
    "read",
    "write",
    "fetch",
    "readable",
    "writable",
    "executable",
    "user_executable",
    "linear_valid",
    "translated",
    "linear_user",
    "linear_writable",
    "linear_execute_disable",
    "nmi_unblocking",
    "shadow_stack",
    "supervisor_shadow_stack",
    "paging_verification",
    "asynchronous",
)
"""Members of EptQualification in the order of their bits, from bit 0."""


@dataclass(frozen=True)
class EptQualification:
    """Exit qualification for EPT violations (exit reason 48).

    ``read``/``write``/``fetch`` say what the access was, ``readable``/``writable``/
    ``executable`` the AND of the permissions met on the way. ``translated`` is False when the
    access was to a paging-structure entry; the ``linear_*`` members need advanced information.
    """

    read: bool = False
    write: bool = False
    fetch: bool = False
    readable: bool = False
    writable: bool = False
    executable: bool = False
    user_executable: bool = False
    linear_valid: bool = False
    translated: bool = False
    linear_user: bool = False
    linear_writable: bool = False
    linear_execute_disable: bool = False
    nmi_unblocking: bool = False
    shadow_stack: bool = False
    supervisor_shadow_stack: bool = False
    paging_verification: bool = False
    asynchronous: bool = False

    @classmethod
    def decode(cls, value: int) -> EptQualification:
        """Take an exit qualification apart."""
        return cls(*(_bit(value, i) for i in range(len(_EPT_BITS))))

    def encode(self) -> int:
        """The exit qualification."""
        return sum(bool(getattr(self, name)) << i for i, name in enumerate(_EPT_BITS))


class ApicAccessType(enum.IntEnum):
    """Bits 15:12 of the qualification of an APIC access."""

    LINEAR_READ = 0
    LINEAR_WRITE = 1
    LINEAR_FETCH = 2
    LINEAR_EVENT_DELIVERY = 3
    LINEAR_MONITOR = 4
    PHYSICAL_EVENT_DELIVERY = 10
    PHYSICAL_MONITOR = 11
    PHYSICAL_INSTRUCTION = 15


@dataclass(frozen=True)
class ApicAccess:
    """Exit qualification for APIC accesses (exit reason 44).

    ``type`` is a plain number when it is none of the defined ones. ``offset`` (bytes into the
    APIC page) is meaningful for linear accesses.
    """

    offset: int
    type: ApicAccessType | int
    asynchronous: bool = False

    @classmethod
    def decode(cls, value: int) -> ApicAccess:
        """Take an exit qualification apart."""
        number = value >> 12 & 0xF
        known = number in ApicAccessType.__members__.values()
        return cls(value & 0xFFF, ApicAccessType(number) if known else number, _bit(value, 16))

    def encode(self) -> int:
        """The exit qualification."""
        return self.offset | self.type << 12 | self.asynchronous << 16


class TaskSwitchSource(enum.IntEnum):
    """Bits 31:30 of the qualification of a task switch."""

    CALL = 0
    IRET = 1
    JMP = 2
    TASK_GATE = 3


@dataclass(frozen=True)
class TaskSwitch:
    """Exit qualification for task switches (exit reason 9): selector of the new TSS, cause."""

    selector: int
    source: TaskSwitchSource

    @classmethod
    def decode(cls, value: int) -> TaskSwitch:
        """Take an exit qualification apart."""
        return cls(value & 0xFFFF, TaskSwitchSource(value >> 30 & 3))

    def encode(self) -> int:
        """The exit qualification."""
        return self.selector | self.source << 30


@dataclass(frozen=True)
class IntrInfo:
    """An interruption-information field (VM entry, VM exit or IDT vectoring).

    ``type`` is a plain number for the reserved type 1. ``nmi_unblocking`` is bit 12 of the
    VM-exit field: the faulting instruction was an IRET that unblocked NMIs.
    """

    vector: int
    type: IntrType | int
    error_code: bool = False
    nmi_unblocking: bool = False
    valid: bool = True

    @classmethod
    def decode(cls, value: int) -> IntrInfo:
        """Take a 32-bit interruption-information field apart."""
        number = value >> 8 & 7
        return cls(
            vector=value & 0xFF,
            type=number if number == 1 else IntrType(number),
            error_code=_bit(value, 11),
            nmi_unblocking=_bit(value, 12),
            valid=_bit(value, 31),
        )

    def encode(self) -> int:
        """The 32-bit field."""
        return (
            self.vector
            | self.type << 8
            | self.error_code << 11
            | self.nmi_unblocking << 12
            | self.valid << 31
        )


class DescriptorTableOp(enum.IntEnum):
    """Bits 29:28 for exit reason 46."""

    SGDT = 0
    SIDT = 1
    LGDT = 2
    LIDT = 3


class SystemSegmentOp(enum.IntEnum):
    """Bits 29:28 for exit reason 47."""

    SLDT = 0
    STR = 1
    LLDT = 2
    LTR = 3


@dataclass(frozen=True)
class InstructionInfo:
    """VM-exit instruction information, the union of all its formats.

    Every format keeps a given item at the same bits, so one value serves all of them; which
    members mean something depends on the instruction:

    - memory operand (VMX instructions, INVEPT, INVVPID, INVPCID, descriptor tables):
      ``scale`` (log2), ``address_size`` (16, 32, 64), ``segment``, ``index``, ``base``
      (register numbers, None when absent);
    - register form (VMREAD, VMWRITE, SLDT and the like): ``register`` is True, ``reg1``;
    - ``reg2``: the other register of VMREAD, VMWRITE, INVEPT, INVVPID, INVPCID; its low two
      bits are `identity` for descriptor-table instructions;
    - ``operand_size`` (2-bit number) for RDRAND, RDSEED, UMWAIT, TPAUSE and descriptor tables.
    """

    scale: int = 0
    reg1: int = 0
    address_size: int = 64
    register: bool = False
    operand_size: int = 0
    segment: int = 3
    index: int | None = None
    base: int | None = None
    reg2: int = 0

    @property
    def identity(self) -> int:
        """Number for DescriptorTableOp or SystemSegmentOp."""
        return self.reg2 & 3

    @classmethod
    def decode(cls, value: int) -> InstructionInfo:
        """Take a 32-bit instruction-information field apart.

        Raises ValueError for an address size that the SDM does not define.
        """
        size = value >> 7 & 7
        if size > 2:
            raise ValueError(f"VM-exit instruction information {value:#x}: address size {size}")
        return cls(
            scale=value & 3,
            reg1=value >> 3 & 0xF,
            address_size=16 << size,
            register=_bit(value, 10),
            operand_size=value >> 11 & 3,
            segment=value >> 15 & 7,
            index=None if _bit(value, 22) else value >> 18 & 0xF,
            base=None if _bit(value, 27) else value >> 23 & 0xF,
            reg2=value >> 28 & 0xF,
        )

    def encode(self) -> int:
        """The 32-bit field."""
        return (
            self.scale
            | self.reg1 << 3
            | (self.address_size // 32) << 7
            | self.register << 10
            | self.operand_size << 11
            | self.segment << 15
            | (1 << 22 if self.index is None else self.index << 18)
            | (1 << 27 if self.base is None else self.base << 23)
            | self.reg2 << 28
        )

    def operand(self) -> str:
        """The operand in assembler form, ``ds:[rbx+rcx*8]`` or ``rax`` (no displacement:
        that is the exit qualification).
        """
        if self.register:
            return GPR_NAMES[self.reg1]
        parts = []
        if self.base is not None:
            parts.append(GPR_NAMES[self.base])
        if self.index is not None:
            parts.append(f"{GPR_NAMES[self.index]}*{1 << self.scale}")
        segment = SEGMENT_NAMES[self.segment] if self.segment < 6 else f"seg{self.segment}"
        return f"{segment}:[{'+'.join(parts) or '0'}]"
