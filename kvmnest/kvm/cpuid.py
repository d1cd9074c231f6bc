"""CPUID as KVM's ioctls pass it: ``struct kvm_cpuid2``, entry by entry."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvmnest.kvm.native import CData

#: CPUID.01H:ECX.VMX.
CPUID_1_ECX_VMX = 1 << 5


def entries(cpuid: CData) -> list[CData]:
    """Return every entry, a ``struct kvm_cpuid_entry2`` that can be changed in place."""
    return [cpuid.entries[number] for number in range(cpuid.nent)]


def leaf(cpuid: CData, function: int, index: int = 0) -> CData:
    """Return the entry of a leaf (and subleaf). Raises KeyError if the table has none."""
    for entry in entries(cpuid):
        if (entry.function, entry.index) == (function, index):
            return entry
    raise KeyError(f"no CPUID leaf {function:#x}, subleaf {index}")


def table(cpuid: CData) -> dict[tuple[int, int], tuple[int, int, int, int]]:
    """Return all leaves: (leaf, subleaf) -> (EAX, EBX, ECX, EDX)."""
    return {(e.function, e.index): (e.eax, e.ebx, e.ecx, e.edx) for e in entries(cpuid)}
