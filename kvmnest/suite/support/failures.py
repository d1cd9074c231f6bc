"""One broken rule of each stage of VM entry, to be put into a good VMCS."""

from __future__ import annotations

import enum

from kvmnest.l1 import L1
from kvmnest.suite.support.entries import BAD_CONTROL, BAD_GUEST, BAD_HOST, Entries
from kvmnest.vmx import ExitReason, Field, Msr, ProcCtl
from kvmnest.vmx.outcome import EntryFailure, Outcome

#: Bits 31:4 of the TPR threshold must be 0.
_BAD_THRESHOLD = 0x10


class Failure(enum.Enum):
    """What is wrong. KVM finds some of it itself and leaves the rest to the processor."""

    CONTROL = "a reserved control bit"
    TPR_THRESHOLD = "a control that KVM leaves to the processor"
    HOST = "the host-state area"
    GUEST_LINK = "guest state that KVM checks"
    GUEST_RFLAGS = "guest state that KVM leaves to the processor"
    MSR_LOAD = "the VM-entry MSR-load area"


#: The stages in their order; the SDM leaves it open whether host state or controls come first.
STAGES = {
    Failure.CONTROL: 0,
    Failure.TPR_THRESHOLD: 0,
    Failure.HOST: 0,
    Failure.GUEST_LINK: 1,
    Failure.GUEST_RFLAGS: 1,
    Failure.MSR_LOAD: 2,
}

OUTCOMES: dict[Failure, Outcome] = {
    Failure.CONTROL: BAD_CONTROL,
    Failure.TPR_THRESHOLD: BAD_CONTROL,
    Failure.HOST: BAD_HOST,
    Failure.GUEST_LINK: EntryFailure(ExitReason.INVALID_GUEST_STATE, qualification=4),
    Failure.GUEST_RFLAGS: BAD_GUEST,
    Failure.MSR_LOAD: EntryFailure(ExitReason.MSR_LOAD_FAIL, qualification=1),
}


def write_msr_area(l1: L1, address: int, *entries: tuple[int, int]) -> None:
    """Write (index, value) pairs as an MSR area; an index may set its reserved upper half."""
    for number, (index, value) in enumerate(entries):
        l1.write_int(address + 16 * number, index)
        l1.write_int(address + 16 * number + 8, value)


def broken(tries: Entries, failure: Failure) -> dict[Field, int]:
    """Return the changes that break a rule (and write what they point at)."""
    l1 = tries.l1
    if failure is Failure.CONTROL:
        return {Field.CR3_TARGET_COUNT: 0xFFFF}
    if failure is Failure.TPR_THRESHOLD:
        return {
            **tries.using(ProcCtl.USE_TPR_SHADOW),
            Field.VIRTUAL_APIC_PAGE_ADDR: l1.sym("virtual_apic"),
            Field.TPR_THRESHOLD: _BAD_THRESHOLD,
        }
    if failure is Failure.HOST:
        return {Field.HOST_TR_SELECTOR: 0}
    if failure is Failure.GUEST_LINK:
        return {Field.VMCS_LINK_POINTER: 1}
    if failure is Failure.GUEST_RFLAGS:
        return {Field.GUEST_RFLAGS: 0}
    write_msr_area(l1, l1.sym("entry_load_msrs"), (Msr.FS_BASE, 0))
    return {
        Field.VM_ENTRY_MSR_LOAD_ADDR: l1.sym("entry_load_msrs"),
        Field.VM_ENTRY_MSR_LOAD_COUNT: 1,
    }
