"""What became of one instruction that L1 executed, as a value: equality is the assertion.

A field left at ``ANY`` in an expectation equals everything, so ``Exit(ExitReason.VMCALL)`` states
the reason only. What was seen besides (registers, RFLAGS) hangs on the value without taking part
in comparisons.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field, fields
from typing import Any

from kvmnest.vmx.errors import VmxError


class _Any:
    """Equal to everything."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return 0

    def __repr__(self) -> str:
        return "ANY"


ANY: Any = _Any()

#: General registers by name, as the instruction or L2 left them.
Registers = dict[str, int]


def _show(value: object) -> str:
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, int) and not isinstance(value, bool):
        return hex(value)
    return repr(value)


class Outcome:
    """What became of an instruction; one of the classes below.

    The repr leaves out what was not stated and writes numbers in hexadecimal. Asking for a part
    that this outcome does not have (the value of a VMREAD that failed) is an AssertionError.
    """

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        raise AssertionError(f"no {name}: the outcome is {self!r}")

    def __repr__(self) -> str:
        parts = []
        for item in fields(self):  # type: ignore[arg-type]
            value = getattr(self, item.name)
            if item.compare and value is not ANY:
                parts.append(f"{item.name}={_show(value)}")
        return f"{type(self).__name__}({', '.join(parts)})"


@dataclass(frozen=True, repr=False)
class Succeed(Outcome):
    """The instruction completed; for a VMX instruction that is VMsucceed, flags checked.

    ``value`` is what a read instruction gave (VMREAD, RDMSR, MOV from CR...).
    """

    value: Any = ANY
    regs: Registers = field(default_factory=dict, compare=False)
    rflags: int = field(default=0, compare=False)


@dataclass(frozen=True, repr=False)
class VMfailInvalid(Outcome):
    """CF set, the other five status flags clear (SDM, "Conventions" of the VMX instructions)."""

    rflags: int = field(default=0, compare=False)


@dataclass(frozen=True, repr=False)
class VMfailValid(Outcome):
    """ZF set, the other five status flags clear; ``error`` is the VM-instruction error."""

    error: Any
    rflags: int = field(default=0, compare=False)

    def __repr__(self) -> str:
        if isinstance(self.error, VmxError):
            return f"VMfailValid({self.error.value}: {self.error.text})"
        return f"VMfailValid({self.error})"


@dataclass(frozen=True, repr=False)
class WrongFlags(Outcome):
    """RFLAGS that no VMX instruction may leave: neither VMsucceed nor one of the two failures."""

    rflags: int


@dataclass(frozen=True, repr=False)
class Fault(Outcome):
    """An exception that L1 took at the instruction.

    ``error_code`` is 0 for a vector without one; ``cr2`` matters for #PF only; ``rip`` is the
    offset of the faulting instruction from the start of the snippet (so 0 without a prefix).
    """

    vector: Any
    error_code: Any = ANY
    cr2: Any = ANY
    rip: Any = ANY
    regs: Registers = field(default_factory=dict, compare=False)
    rflags: int = field(default=0, compare=False)


@dataclass(frozen=True, repr=False)
class Exit(Outcome):
    """A VM exit from L2, with the exit-information fields of the VMCS and L2's RIP.

    ``intr_info`` and ``intr_error`` are the VM-exit interruption fields, ``idt_info`` and
    ``idt_error`` the IDT-vectoring ones, ``length`` and ``info`` the instruction's length and
    information; ``linear`` and ``physical`` the guest addresses.
    """

    reason: Any
    qualification: Any = ANY
    rip: Any = ANY
    length: Any = ANY
    intr_info: Any = ANY
    intr_error: Any = ANY
    idt_info: Any = ANY
    idt_error: Any = ANY
    info: Any = ANY
    linear: Any = ANY
    physical: Any = ANY
    regs: Registers = field(default_factory=dict, compare=False)
    cr2: int = field(default=0, compare=False)


@dataclass(frozen=True, repr=False)
class EntryFailure(Outcome):
    """A VM exit with bit 31 of the exit reason set: the entry failed after the host was checked.

    ``reason`` is INVALID_GUEST_STATE, MSR_LOAD_FAIL or MCE_DURING_ENTRY.
    """

    reason: Any
    qualification: Any = ANY
    regs: Registers = field(default_factory=dict, compare=False)


@dataclass(frozen=True, repr=False)
class HostExit(Outcome):
    """KVM_RUN returned to userspace while L1 or L2 was in the middle; ``exit`` is KVM's exit.

    The command is not finished: ``L1.resume`` goes on with it.
    """

    exit: Any
