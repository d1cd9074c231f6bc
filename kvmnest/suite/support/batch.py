"""Many VM entries in one KVM_RUN, for sweeps whose entries are all to end in a known way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kvmnest.l1 import L1, Vmcs, VmLost
from kvmnest.l1.command import Command, Result
from kvmnest.l1.vmcs import field_name
from kvmnest.vmx import EXIT_REASON_ENTRY_FAILURE, Field, Rflags
from kvmnest.vmx.outcome import EntryFailure, Exit, Outcome, VMfailValid
from kvmnest.vmx.registers import STATUS_FLAGS

Changes = Mapping[Field, int]

_FAILED = Rflags.CF | Rflags.ZF
#: Commands for one entry: write fields, enter, read fields.
_STEPS = 3
#: What is read after an entry that should reach L2, and the names in ``Exit``.
_EXIT_FIELDS = {
    Field.EXIT_QUALIFICATION: "qualification",
    Field.GUEST_RIP: "rip",
    Field.VM_EXIT_INSTRUCTION_LEN: "length",
    Field.VM_EXIT_INTR_INFO: "intr_info",
    Field.IDT_VECTORING_INFO_FIELD: "idt_info",
}


def describe(changes: Changes) -> str:
    """Write changes as ``GUEST_RFLAGS=0x0 GUEST_CR0=0x21``."""
    names = " ".join(f"{field_name(field)}={value:#x}" for field, value in changes.items())
    return names or "nothing changed"


def batch_size(l1: L1) -> int:
    """Return how many entries fit into one ``entries_end_as``."""
    return (l1.payload["SLOT_COUNT"] - 1) // _STEPS


def entries_end_as(
    l1: L1, vmcs: Vmcs, enter: str, cases: Sequence[Changes], expected: Sequence[Outcome]
) -> bool:
    """Tell whether VM entries with the changes in ``cases`` end as expected, each of them.

    ``enter`` is "vmlaunch" or "vmresume". Changed fields get their old values back. After False
    the launch state and the guest state are what these entries made of them.

    Raises:
        VmLost: with a note that says which of the cases it was.
    """
    vmcs.flush()
    known = vmcs.fields()
    cpu = l1.cpu
    entries: list[tuple[int, int]] = []
    commands: list[Command] = []

    def add_list(op: str, part: Sequence[tuple[int, int]]) -> None:
        commands.append(cpu.list_command(op, len(entries), len(part)))
        entries.extend(part)

    instruction = l1.command(enter, {})
    reads: list[int] = []
    before: dict[Field, int] = {}
    for changes, outcome in zip(cases, expected, strict=True):
        add_list("OP_VMWRITE_LIST", list({**before, **changes}.items()))
        before = {field: known.get(field, 0) for field in changes}
        commands.append(instruction)
        reads.append(len(entries))
        add_list("OP_VMREAD_LIST", [(field, 0) for field in _read(outcome)])
    add_list("OP_VMWRITE_LIST", list(before.items()))
    cpu.write_list("OP_VMWRITE_LIST", entries)
    results = _submit(l1, commands, cases)
    for field, value in before.items():
        vmcs.note_write(field, value)
    seen = cpu.read_list(len(entries))
    values = [value for _, value, _ in seen]
    right = not any(rflags & _FAILED for _, _, rflags in seen) and all(
        _is(l1, outcome, results[_STEPS * number + 1], values[start:])
        for number, (start, outcome) in enumerate(zip(reads, expected, strict=True))
    )
    text = f"{enter} {len(cases)} times, {describe(cases[0])} ..."
    l1.log.append((text, expected[0] if right else "not all as expected"))
    return right


def _submit(l1: L1, commands: Sequence[Command], cases: Sequence[Changes]) -> list[Result]:
    cpu = l1.cpu
    try:
        results = cpu.submit(commands)
    except VmLost as error:
        payload = l1.payload
        for number in range(len(cases)):
            slot = cpu.slots + (_STEPS * number + 1) * payload["SLOT_SIZE"]
            status = l1.read_int(slot + payload["SLOT_STATUS"], 4)
            if status == payload["STATUS_RUNNING"]:
                error.add_note(f"entered with {describe(cases[number])}")
        raise
    assert isinstance(results, list), f"{commands[1].name} ended with {results!r}"
    return results


def _read(outcome: Outcome) -> tuple[Field, ...]:
    """Fields that tell whether an entry ended so."""
    if isinstance(outcome, VMfailValid):
        return (Field.VM_INSTRUCTION_ERROR,)
    if isinstance(outcome, EntryFailure):
        return (Field.VM_EXIT_REASON, Field.EXIT_QUALIFICATION)
    return (Field.VM_EXIT_REASON, *_EXIT_FIELDS)


def _is(l1: L1, outcome: Outcome, result: Result, values: list[int]) -> bool:
    exited = result.status == l1.payload["STATUS_VMEXIT"]
    if isinstance(outcome, VMfailValid):
        done = l1.is_done(result.vector, result.rip)
        failed = result.rflags & STATUS_FLAGS == Rflags.ZF
        return not exited and done and failed and values[0] == outcome.error
    if isinstance(outcome, EntryFailure):
        reason = EXIT_REASON_ENTRY_FAILURE | outcome.reason
        return exited and values[0] == reason and values[1] == outcome.qualification
    assert isinstance(outcome, Exit)
    seen = zip(values[1:], _EXIT_FIELDS.values(), strict=False)
    same = all(value == getattr(outcome, name) for value, name in seen)
    return exited and values[0] == outcome.reason and same
