"""What every rule works on: the VMCS about to be entered, and the violations it finds."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from kvmnest.vmx.caps import Capabilities
from kvmnest.vmx.controls import (
    EntryCtl,
    Exit2Ctl,
    ExitCtl,
    PinCtl,
    Proc2Ctl,
    Proc3Ctl,
    ProcCtl,
)
from kvmnest.vmx.fields import Field
from kvmnest.vmx.registers import Cr0, Rflags

MemoryReader = Callable[[int, int], "bytes | None"]
"""(guest-physical address of L1, length) -> bytes, or None where there is no memory."""


class Stage(enum.Enum):
    """When VM entry finds the violation, which decides how it fails."""

    CONTROL = "control"
    """VMfailValid with error 7."""
    HOST = "host"
    """VMfailValid with error 8."""
    GUEST = "guest"
    """A failed entry that looks like a VM exit with reason 33."""
    MSR_LOAD = "msr-load"
    """A failed entry that looks like a VM exit with reason 34."""


@dataclass(frozen=True)
class Violation:
    """One broken rule: the SDM section that has it and what it wants, in our own words.

    ``qualification`` is the exit qualification of the failed entry (stages GUEST and
    MSR_LOAD). ``optional`` marks a rule that the SDM leaves to the implementation.
    """

    stage: Stage
    section: str
    text: str
    fields: tuple[Field, ...] = ()
    qualification: int = 0
    optional: bool = False

    def __str__(self) -> str:
        """``Guest Segment Registers: SS: DPL must equal RPL [GUEST_SS_SELECTOR]``."""
        names = ", ".join(field.name for field in self.fields)
        return f"{self.section}: {self.text}" + (f" [{names}]" if names else "")


@dataclass(frozen=True)
class Section:
    """An SDM section with checks of one stage."""

    stage: Stage
    title: str

    def broken(
        self, text: str, *fields: Field, qualification: int = 0, optional: bool = False
    ) -> Violation:
        """A violation of a rule of this section."""
        return Violation(self.stage, self.title, text, fields, qualification, optional)


@dataclass(frozen=True)
class EntryContext:
    """State of the logical processor at VM entry that is not in the VMCS.

    ``long_mode``: L1 runs in IA-32e mode. ``current_vmcs``: the current-VMCS pointer, None if
    unknown (its rule is then not checked). ``pae_reload``: PDPTEs in memory are checked, as
    they are unless PAE paging was in use before with the same CR3.
    """

    long_mode: bool = True
    current_vmcs: int | None = None
    pae_reload: bool = True


class Entry:
    """A VM entry: the VMCS's values (absent fields count as 0) with the controls in effect.

    A control word that is not activated counts as 0, whatever its field holds.
    """

    __slots__ = (
        "caps",
        "context",
        "entry",
        "exit",
        "exit2",
        "memory",
        "pin",
        "proc",
        "proc2",
        "proc3",
        "vmcs",
    )

    def __init__(
        self,
        vmcs: Mapping[Field, int],
        caps: Capabilities,
        memory: MemoryReader | None,
        context: EntryContext,
    ) -> None:
        self.vmcs = vmcs
        self.caps = caps
        self.memory = memory
        self.context = context
        self.pin = self[Field.PIN_BASED_VM_EXEC_CONTROL]
        self.proc = self[Field.CPU_BASED_VM_EXEC_CONTROL]
        self.exit = self[Field.VM_EXIT_CONTROLS]
        self.entry = self[Field.VM_ENTRY_CONTROLS]
        self.proc2 = self.proc3 = self.exit2 = 0
        if self.proc & ProcCtl.ACTIVATE_SECONDARY_CONTROLS.value:
            self.proc2 = self[Field.SECONDARY_VM_EXEC_CONTROL]
        if self.proc & ProcCtl.ACTIVATE_TERTIARY_CONTROLS.value:
            self.proc3 = self[Field.TERTIARY_VM_EXEC_CONTROL]
        if self.exit & ExitCtl.ACTIVATE_SECONDARY_CONTROLS.value:
            self.exit2 = self[Field.SECONDARY_VM_EXIT_CONTROLS]

    def __getitem__(self, field: Field) -> int:
        """Value of a field, as an unsigned number."""
        return self.vmcs.get(field, 0)

    def has(self, flag: enum.IntFlag) -> bool:
        """Whether a control is 1 and in effect."""
        return bool(self._word(type(flag)) & flag.value)

    def _word(self, kind: type[enum.IntFlag]) -> int:
        if kind is ProcCtl:
            return self.proc
        if kind is Proc2Ctl:
            return self.proc2
        if kind is PinCtl:
            return self.pin
        if kind is EntryCtl:
            return self.entry
        if kind is ExitCtl:
            return self.exit
        if kind is Proc3Ctl:
            return self.proc3
        if kind is Exit2Ctl:
            return self.exit2
        raise TypeError(f"{kind.__name__} is not a kind of VM controls")

    @property
    def ia32e(self) -> bool:
        """The guest will be in IA-32e mode."""
        return bool(self.entry & EntryCtl.IA32E_MODE_GUEST.value)

    @property
    def unrestricted(self) -> bool:
        """The "unrestricted guest" control is 1."""
        return bool(self.proc2 & Proc2Ctl.UNRESTRICTED_GUEST.value)

    @property
    def v8086(self) -> bool:
        """The guest will be in virtual-8086 mode."""
        return bool(self[Field.GUEST_RFLAGS] & Rflags.VM.value)

    @property
    def protected(self) -> bool:
        """CR0.PE of the guest."""
        return bool(self[Field.GUEST_CR0] & Cr0.PE.value)

    def canonical(self, address: int) -> bool:
        """Bits 63 down to the highest linear-address bit are equal."""
        top = address >> (self.caps.cpu.linear_bits - 1)
        return top in (0, (1 << (65 - self.caps.cpu.linear_bits)) - 1)

    def beyond_width(self, address: int) -> bool:
        """The address sets bits that the processor's physical addresses do not have."""
        bits = 32 if self.caps.basic.physical_32bit else self.caps.cpu.physical_bits
        return address >> bits != 0


Rule = Callable[[Entry], Iterator[Violation]]


def address(
    entry: Entry, section: Section, field: Field, align: int, name: str
) -> Iterator[Violation]:
    """A physical address in a field: aligned to ``align`` bytes and inside the address width."""
    value = entry[field]
    if value & (align - 1):
        yield section.broken(f"the {name} must be aligned to {align} bytes", field)
    if entry.beyond_width(value):
        yield section.broken(f"the {name} must not exceed the physical-address width", field)


def reserved_controls(
    entry: Entry, section: Section, field: Field, kind: type[enum.IntFlag]
) -> Iterator[Violation]:
    """A control word against its capability MSR: must-be-1 and must-be-0 bits."""
    value = entry[field]
    must, may = entry.caps.must_be_one(kind), entry.caps.may_be_one(kind)
    if must & ~value or value & ~may:
        from kvmnest.vmx.explain import flag_names

        msr = entry.caps.source(kind).name
        if must & ~value:
            names = flag_names(kind, must & ~value)
            yield section.broken(f"{msr} requires 1 for {names}", field)
        if value & ~may:
            names = flag_names(kind, value & ~may)
            yield section.broken(f"{msr} requires 0 for {names}", field)


def pat_valid(value: int) -> bool:
    """Each of the 8 bytes of IA32_PAT is a memory type: 0, 1, 4, 5, 6 or 7."""
    return all(value >> shift & 0xFF in (0, 1, 4, 5, 6, 7) for shift in range(0, 64, 8))
