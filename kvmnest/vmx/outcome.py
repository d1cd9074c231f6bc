"""What became of one instruction that L1 executed, as a value: equality is the assertion.

A field left at ``ANY`` in an expectation equals everything, so ``Exit(ExitReason.VMCALL)`` states
the reason only. What was seen besides (registers, RFLAGS) hangs on the value without taking part
in comparisons.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar, Protocol, Self, dataclass_transform

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


class Seen(Protocol):
    """Where an outcome takes what nobody stated, when somebody asks for it."""

    @property
    def regs(self) -> Registers:
        """General registers by name."""

    @property
    def cr2(self) -> int:
        """CR2."""

    @property
    def rflags(self) -> int:
        """RFLAGS."""


@dataclass_transform(frozen_default=True, eq_default=False, field_specifiers=(field,))
class Outcome:
    """What became of an instruction; one of the classes below.

    The repr leaves out what was not stated and writes numbers in hexadecimal. Asking for a part
    that this outcome does not have (the value of a VMREAD that failed) is an AssertionError.
    """

    # An instance holds the parts that are stated and no others, so that a comparison looks at
    # nothing else; the defaults are here.
    _names: ClassVar[tuple[str, ...]]
    _compared: ClassVar[dict[str, None]]
    _defaults: ClassVar[dict[str, Callable[[], Any]]]

    def __init_subclass__(cls) -> None:
        dataclass(init=False, repr=False, eq=False, frozen=True)(cls)
        items = fields(cls)  # type: ignore[arg-type]
        cls._names = tuple(item.name for item in items)
        cls._compared = dict.fromkeys(item.name for item in items if item.compare)
        cls._defaults = {item.name: _default(item) for item in items if not _required(item)}
        for item in items:
            if item.default is not MISSING:
                delattr(cls, item.name)

    def __init__(self, *args: Any, **parts: Any) -> None:
        given = dict(zip(self._names, args, strict=False), **parts) if args else parts
        known = all(name in self._names for name in given)
        complete = all(name in given or name in self._defaults for name in self._names)
        if not known or not complete or len(given) != len(args) + len(parts):
            raise TypeError(f"{type(self).__name__} takes {self._names}, got {args} and {parts}")
        self.__dict__.update(given)

    @classmethod
    def made(cls, seen: Seen, **parts: Any) -> Self:
        """Return the outcome of what L1 has seen; its registers are unpacked when asked for."""
        value = object.__new__(cls)
        state = value.__dict__
        state["_seen"] = seen
        if parts:
            state.update(parts)
        return value

    def _unpack(self) -> None:
        """State every part that this outcome can compare."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        state = self.__dict__
        self._unpack()
        if name not in state and name in self._defaults:
            if name not in ("regs", "cr2", "rflags") or "_seen" not in state:
                return self._defaults[name]()
            state[name] = getattr(state["_seen"], name)
        if name in state:
            return state[name]
        raise AssertionError(f"no {name}: the outcome is {self!r}")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Outcome) or type(other) is not type(self):
            return NotImplemented
        other._unpack()
        ours, compared = self.__dict__, self._compared
        for name, wanted in other.__dict__.items():
            if name in compared and wanted is not ANY:
                if name not in ours:
                    self._unpack()
                found = ours.get(name, ANY)
                if found is not ANY and found != wanted:
                    return False
        return True

    def __hash__(self) -> int:
        # Values that differ can be equal to the same third one, so nothing finer is possible.
        return hash(type(self))

    def __repr__(self) -> str:
        self._unpack()
        stated = ((name, self.__dict__.get(name, ANY)) for name in self._compared)
        parts = [f"{name}={_show(value)}" for name, value in stated if value is not ANY]
        return f"{type(self).__name__}({', '.join(parts)})"


def _required(item: Any) -> bool:
    return item.default is MISSING and item.default_factory is MISSING


def _default(item: Any) -> Callable[[], Any]:
    if item.default is MISSING:
        return item.default_factory  # type: ignore[no-any-return]
    return lambda: item.default


class Succeed(Outcome):
    """The instruction completed; for a VMX instruction that is VMsucceed, flags checked.

    ``value`` is what a read instruction gave (VMREAD, RDMSR, MOV from CR...).
    """

    value: Any = ANY
    regs: Registers = field(default_factory=dict, compare=False)
    rflags: int = field(default=0, compare=False)

    def with_value(self, value: Any) -> Succeed:
        """Return the same, and what the instruction read."""
        outcome = object.__new__(Succeed)
        outcome.__dict__.update(self.__dict__, value=value)
        return outcome


class VMfailInvalid(Outcome):
    """CF set, the other five status flags clear (SDM, "Conventions" of the VMX instructions)."""

    rflags: int = field(default=0, compare=False)


class VMfailValid(Outcome):
    """ZF set, the other five status flags clear; ``error`` is the VM-instruction error."""

    error: Any
    rflags: int = field(default=0, compare=False)

    def __repr__(self) -> str:
        if isinstance(self.error, VmxError):
            return f"VMfailValid({self.error.value}: {self.error.text})"
        return f"VMfailValid({self.error})"


class WrongFlags(Outcome):
    """RFLAGS that no VMX instruction may leave: neither VMsucceed nor one of the two failures."""

    rflags: int


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


class Exit(Outcome):
    """A VM exit from L2, with the exit-information fields of the VMCS and L2's RIP.

    The repr of an exit that came from L1, with every field, leaves out those that are 0.

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

    @classmethod
    def read(cls, seen: Seen, reason: Any, values: tuple[int, ...]) -> Self:
        """As ``made``; ``values`` are the parts from ``qualification`` to ``physical``."""
        return cls.made(seen, reason=reason, _values=values)

    def _unpack(self) -> None:
        values = self.__dict__.pop("_values", None)
        if values is not None:
            self.__dict__.update(zip(self._names[1:], values, strict=False))

    def __repr__(self) -> str:
        stated = [(item.name, getattr(self, item.name)) for item in fields(self) if item.compare]
        if all(value is not ANY for _, value in stated):
            stated = [stated[0], *((name, value) for name, value in stated[1:] if value)]
        parts = [f"{name}={_show(value)}" for name, value in stated if value is not ANY]
        return f"Exit({', '.join(parts)})"


class EntryFailure(Outcome):
    """A VM exit with bit 31 of the exit reason set: the entry failed after the host was checked.

    ``reason`` is INVALID_GUEST_STATE, MSR_LOAD_FAIL or MCE_DURING_ENTRY.
    """

    reason: Any
    qualification: Any = ANY
    regs: Registers = field(default_factory=dict, compare=False)


class HostExit(Outcome):
    """KVM_RUN returned to userspace while L1 or L2 was in the middle; ``exit`` is KVM's exit.

    The command is not finished: ``L1.resume`` goes on with it.
    """

    exit: Any
