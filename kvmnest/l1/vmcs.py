"""A VMCS as a case sees it: assign fields, and they are written by VMWRITE before the entry."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

from kvmnest.errors import HarnessError
from kvmnest.l1.cpu import Cpu
from kvmnest.vmx import Field, Rflags
from kvmnest.vmx.numbers import name_of

#: Plain integers: this is the hot path, and flag enumerations are slow.
_ZF = int(Rflags.ZF)
_FAILED = int(Rflags.CF | Rflags.ZF)


class FieldValue(int):
    """What VMREAD gave: a number that knows its field, for what a failed assertion says."""

    field: int

    def __new__(cls, field: int, value: int) -> Self:
        """The value of a field encoding."""
        made = super().__new__(cls, value)
        made.field = field
        return made

    def __repr__(self) -> str:
        return hex(self)


class Vmcs:
    """The VMCS in the region at physical ``address``.

    ``vmcs[field] = value`` is kept until ``flush`` (every VMLAUNCH and VMRESUME calls it), where
    one KVM_RUN writes all changes. ``vmcs[field]`` gives a value not yet written, else executes
    VMREAD. Both need this VMCS to be current on ``cpu``, the vCPU that executes them.
    """

    def __init__(self, cpu: Cpu, address: int, baseline: Mapping[Field, int]) -> None:
        self.cpu = cpu
        self.address = address
        self.baseline = dict(baseline)
        self._pending: dict[int, int] = dict(self.baseline)  # type: ignore[arg-type]
        self._written: dict[int, int] = {}

    def __repr__(self) -> str:
        return f"<VMCS at {self.address:#x}>"

    def __setitem__(self, field: int, value: int) -> None:
        """Set a field, to be written before the next entry."""
        self._pending[field] = int(value)

    def __getitem__(self, field: int) -> int:
        """Value of a field; HarnessError when VMREAD fails."""
        if field in self._pending:
            return self._pending[field]
        return self.read(field)[0]

    def update(self, values: Mapping[Field, int]) -> None:
        """Set several fields."""
        for field, value in values.items():
            self[field] = value

    def read(self, *fields: int) -> tuple[int, ...]:
        """Execute VMREAD of several fields in one KVM_RUN (pending changes are written first)."""
        self._must_be_current(self.cpu)
        self.flush()
        values = []
        for field, value, rflags in self.cpu.vmread(fields):
            if rflags & _FAILED:
                raise HarnessError(f"VMREAD of {field_name(field)} failed")
            values.append(FieldValue(field, value))
        return tuple(values)

    def flush(self, cpu: Cpu | None = None) -> None:
        """Execute VMWRITE for each change; HarnessError names the first that fails."""
        if not self._pending:
            return
        cpu = cpu or self.cpu
        self._must_be_current(cpu)
        changes = list(self._pending.items())
        for start in range(0, len(changes), cpu.list_entries):
            part = changes[start : start + cpu.list_entries]
            self._write(cpu, part)
        self._pending.clear()

    def _write(self, cpu: Cpu, part: list[tuple[int, int]]) -> None:
        results = cpu.submit([cpu.write_list("OP_VMWRITE_LIST", part)])
        if not isinstance(results, list):
            raise HarnessError(f"VMWRITE ended with {results!r}")
        if results[0].status != cpu.status_list_done:
            raise HarnessError(f"VMWRITE faulted with vector {results[0].vector}")
        flags = cpu.list_flags(len(part))
        if not any(rflags & _FAILED for rflags in set(flags)):
            self._written.update(part)
            return
        for number, rflags in enumerate(flags):
            if rflags & _FAILED:
                self._written.update(part[:number])
                field, value = part[number]
                error = "VMfailInvalid"
                if rflags & _ZF:
                    error = str(cpu.instruction_error())
                raise HarnessError(f"VMWRITE of {field_name(field)} <- {value:#x} failed: {error}")

    def rebase(self, *fields: Field) -> None:
        """Count the present values of these fields to the baseline."""
        for field in fields:
            if field in self._pending:
                self.baseline[field] = self._pending[field]

    def _must_be_current(self, cpu: Cpu) -> None:
        if cpu.current != self.address:
            raise HarnessError(f"the VMCS at {self.address:#x} is not current: VMPTRLD it first")

    def note_write(self, field: int, value: int) -> None:
        """Remember a VMWRITE that a case executed itself."""
        self._pending.pop(field, None)
        self._written[field] = value

    def diff(self) -> list[tuple[Field, int | None, int]]:
        """Fields set otherwise than in the baseline: (field, baseline or None, now)."""
        now = {**self._written, **self._pending}
        return [
            (Field(field), self.baseline.get(Field(field)), value)
            for field, value in now.items()
            if name_of(Field, field) and self.baseline.get(Field(field)) != value
        ]

    def fields(self) -> Mapping[int, int]:
        """Return every field that was set, with its last value."""
        return {**self._written, **self._pending}

    def set_bits(self, field: Field, bits: int) -> None:
        """Set bits of a field."""
        self[field] = self[field] | bits

    def clear_bits(self, field: Field, bits: int) -> None:
        """Clear bits of a field."""
        self[field] = self[field] & ~bits


def field_name(field: int) -> str:
    """Name of a field encoding, or its number."""
    return name_of(Field, field) or f"field {field:#x}"
