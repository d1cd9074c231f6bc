"""Which rules of VM entry the current VMCS of an L1 breaks: what explains a failed entry."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmnest.errors import HarnessError
from kvmnest.kvm.cpuid import table
from kvmnest.vmx import Capabilities, CpuFeatures, Field, Rflags
from kvmnest.vmx.fields import Kind
from kvmnest.vmx.rules import EntryContext, Violation, check

if TYPE_CHECKING:
    from kvmnest.l1 import L1

_FAILED = int(Rflags.CF | Rflags.ZF)


def objections(l1: L1) -> list[Violation]:
    """Every rule that the VMCS breaks as it is now, in the order of the stages of VM entry.

    Where VMREAD is not possible any more, a field has the value that was written last. Raises
    HarnessError without a current VMCS, or without VMX.
    """
    size = l1.payload["RAM_SIZE"]

    def memory(address: int, length: int) -> bytes | None:
        return l1.read(address, length) if address + length <= size else None

    leaves = table(l1.cpu.vcpu.get_cpuid())
    caps = Capabilities(l1.caps.msrs, CpuFeatures.from_cpuid(leaves))
    return check(_values(l1), caps, memory, EntryContext(current_vmcs=l1.current))


def _values(l1: L1) -> dict[Field, int]:
    vmcs, cpu = l1.vmcs, l1.cpu
    wanted = [f for f in Field if f.kind is not Kind.EXIT_INFO and l1.caps.field_exists(f)]
    try:
        seen = [
            entry
            for start in range(0, len(wanted), cpu.list_entries)
            for entry in l1.vmread_list(cpu, tuple(wanted[start : start + cpu.list_entries]))
        ]
    except HarnessError:
        written = vmcs.fields()
        return {field: written[field] for field in wanted if field in written}
    return {Field(field): value for field, value, rflags in seen if not rflags & _FAILED}
