"""Checks on the VM-entry MSR-load area (SDM "Loading MSRs")."""

from __future__ import annotations

from collections.abc import Iterator

from kvmnest.vmx.fields import Field as F
from kvmnest.vmx.msrs import Msr
from kvmnest.vmx.rules.model import Entry, Rule, Section, Stage, Violation

_S = Section(Stage.MSR_LOAD, "Loading MSRs")

_NEVER = frozenset({Msr.FS_BASE.value, Msr.GS_BASE.value})
"""MSRs that have a VMCS field of their own."""

_SMM_ONLY = frozenset({Msr.SMM_MONITOR_CTL.value, Msr.SMBASE.value})


def entries(e: Entry) -> Iterator[Violation]:
    """Each entry names an MSR that may be loaded; its number is the exit qualification.

    Values are not judged: whether WRMSR would fault on them belongs to the MSR in question.
    """
    count = e[F.VM_ENTRY_MSR_LOAD_COUNT]
    if not count or e.memory is None:
        return
    area = e.memory(e[F.VM_ENTRY_MSR_LOAD_ADDR], 16 * count)
    if area is None:
        return
    for number in range(count):
        entry = area[16 * number : 16 * number + 16]
        index = int.from_bytes(entry[:4], "little")
        text = ""
        if index in _NEVER:
            text = f"{Msr(index).name} is not loaded from the area"
        elif index >> 8 == 8:
            text = f"x2APIC register {index:#x} is not loaded from the area"
        elif index in _SMM_ONLY:
            text = f"{Msr(index).name} can be loaded in SMM only"
        elif entry[4:8] != b"\0\0\0\0":
            text = "bits 63:32 must be 0"
        if text:
            yield _S.broken(
                f"entry {number + 1}: {text}", F.VM_ENTRY_MSR_LOAD_ADDR, qualification=number + 1
            )
            return


RULES: tuple[Rule, ...] = (entries,)
