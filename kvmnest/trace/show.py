"""The commands of a case as lines of text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from kvmnest import disassembly
from kvmnest.l1.vmcs import field_name
from kvmnest.vmx import Field, Rflags, Vector, explain
from kvmnest.vmx.reasons import EXIT_REASON_ENTRY_FAILURE

_STATUS = (
    *(Rflags.CF, Rflags.PF, Rflags.AF, Rflags.ZF, Rflags.SF, Rflags.OF),
    *(Rflags.TF, Rflags.IF),
)
_VMX = ("vm", "invept", "invvpid")


def flags(rflags: int) -> str:
    """The status flags, TF and IF that are set: "CF ZF", "-" for none."""
    return " ".join(flag.name or "" for flag in _STATUS if rflags & flag) or "-"


def lines(commands: Sequence[dict[str, Any]], *, every: bool = False) -> Iterator[str]:
    """One command after the other; ``every`` shows the fields of the baseline too."""
    number = 0
    for index, command in enumerate(commands):
        if "fields" in command:
            previous = commands[index - 1] if index else {}
            if previous.get("status") == "exit" and command["op"] == "VMREAD_LIST":
                yield from _exit(command)
            elif previous.get("op", "").startswith(("vmlaunch", "vmresume")):
                # The same VMREADs as after an exit, but L2 was not entered.
                yield from _fields({**command, "fields": command["fields"][:1]}, every)
            else:
                yield from _fields(command, every)
            continue
        number += 1
        yield from _instruction(number, command)


def _registers(values: dict[str, int]) -> str:
    return " ".join(f"{name}={value:#x}" for name, value in values.items())


def _instruction(number: int, command: dict[str, Any]) -> Iterator[str]:
    cpu = f" (cpu {command['cpu']})" if command["cpu"] else ""
    operand = f" [{_operand(command['operand'])}]" if command.get("operand") else ""
    yield f"{number:4}  {command['op']}{cpu} {_registers(command['regs'])}{operand}".rstrip()
    if command["op"].startswith("code "):
        code = bytes.fromhex(command["op"].removeprefix("code "))
        yield from (f"        L1  {line}" for line in disassembly.lines(code, 0, 64))
    if command.get("l2"):
        address, bits, code = command["l2"]
        listing = disassembly.lines(bytes.fromhex(code), address, bits, 3)
        yield from (f"        L2  {line}" for line in listing)
    if command["status"] == "exit":
        yield f"      -> VM exit; L2's registers: {_registers(command['out']) or 'as before'}"
        return
    after = f"RFLAGS {flags(command['rflags'])} -> {flags(command['rflags_after'])}"
    if not command["done"]:
        vector = command["vector"]
        name = Vector(vector).name if vector in Vector.__members__.values() else f"{vector}"
        cr2 = f", CR2 {command['cr2']:#x}" if vector == Vector.PF else ""
        yield (
            f"      -> #{name} (error code {command['error']:#x}{cr2})"
            f" at offset {command['rip']:#x}; {after}"
        )
        return
    out = _registers(command["out"]) if not command["op"].startswith(_VMX) else ""
    yield f"      -> {_result(command)}{f', {out}' if out else ''}; {after}"


def _operand(text: str) -> str:
    size = 16
    return " ".join(
        hex(int.from_bytes(bytes.fromhex(text[at : at + size]), "little"))
        for at in range(0, len(text), size)
    )


def _result(command: dict[str, Any]) -> str:
    if not command["op"].startswith(_VMX):
        return "completed"
    carry, zero = command["rflags_after"] & Rflags.CF, command["rflags_after"] & Rflags.ZF
    return "VMfailInvalid" if carry else "VMfailValid" if zero else "VMsucceed"


def _exit(command: dict[str, Any]) -> Iterator[str]:
    values = {field: value for field, value, _, _ in command["fields"]}
    reason = values.get(Field.VM_EXIT_REASON, 0)
    if reason & EXIT_REASON_ENTRY_FAILURE:
        qualification = values.get(Field.EXIT_QUALIFICATION, 0)
        text = explain.explain_exit(reason)
        yield f"         VM entry failed: {text}, qualification {qualification:#x}"
        return
    yield "         " + explain.explain_exit(
        reason,
        values.get(Field.EXIT_QUALIFICATION, 0),
        values.get(Field.VM_EXIT_INTR_INFO, 0),
        values.get(Field.VMX_INSTRUCTION_INFO),
        values.get(Field.IDT_VECTORING_INFO_FIELD, 0),
    )
    shown = (
        *(Field.GUEST_RIP, Field.VM_EXIT_INSTRUCTION_LEN, Field.EXIT_QUALIFICATION),
        *(Field.GUEST_LINEAR_ADDRESS, Field.GUEST_PHYSICAL_ADDRESS),
    )
    parts = [f"{field.name} {values[field]:#x}" for field in shown if values.get(field)]
    yield f"         {', '.join(parts)}"


def _fields(command: dict[str, Any], every: bool) -> Iterator[str]:
    name = command["op"].removesuffix("_LIST")
    hidden = 0
    for field, value, rflags, baseline in command["fields"]:
        failed = rflags & (Rflags.CF | Rflags.ZF)
        if name == "VMWRITE" and value == baseline and not failed and not every:
            hidden += 1
            continue
        text = f"{value:#x}"
        if field in Field.__members__.values():
            text = explain.explain_field_value(Field(field), value)
        was = f" (baseline {baseline:#x})" if baseline not in (None, value) else ""
        arrow = "<-" if name == "VMWRITE" else "is"
        yield f"      {name} {field_name(field)} {arrow} {text}{was}{' FAILED' if failed else ''}"
    if hidden:
        yield f"      VMWRITE of {hidden} fields of the baseline"
