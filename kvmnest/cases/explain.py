"""Text for failures: outcomes decoded, what the VMCS held, the last commands, the machine."""

from __future__ import annotations

import dataclasses
import enum
import re
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from kvmnest import disassembly, host

_LAST_COMMANDS = 12
_MOST_FIELDS = 60
_MOST_DIFFERENCES = 3
#: Bytes of L2's code that a failure shows.
_MOST_CODE = 64
#: VM-instruction errors of an entry with invalid control or host-state fields.
_REFUSALS = (7, 8)


def is_outcome(value: object) -> bool:
    """Whether ``value`` is an outcome of ``kvmnest.vmx.outcome``."""
    return _is_a(value, "kvmnest.vmx.outcome", "Outcome")


def decode(outcome: Any) -> str:
    """An outcome in words, or "" where its repr says everything."""
    from kvmnest.vmx import EXIT_REASON_ENTRY_FAILURE, explain
    from kvmnest.vmx.outcome import ANY, EntryFailure, Exit

    if not isinstance(outcome, Exit | EntryFailure) or outcome.reason is ANY:
        return ""
    given = {
        item.name: int(getattr(outcome, item.name))
        for item in dataclasses.fields(outcome)
        if item.compare and isinstance(getattr(outcome, item.name), int)
    }
    reason = given.get("reason")
    if reason is None:
        return ""
    if isinstance(outcome, EntryFailure):
        reason |= EXIT_REASON_ENTRY_FAILURE
    parts = [explain.explain_reason(reason)]
    if "qualification" in given:
        parts.append(explain.explain_qualification(reason, given["qualification"]))
    for name in ("intr_info", "idt_info"):
        if given.get(name):
            parts.append(f"{name} {explain.explain_intr_info(given[name])}")
    if "info" in given:
        parts.append(explain.explain_instruction(reason, given["info"]))
    return ", ".join(part for part in parts if part)


def explains(got: object, expected: object) -> bool:
    """Whether ``compare`` says more about a failed ``==`` than the two reprs."""
    if is_outcome(got) or is_outcome(expected):
        return True
    if isinstance(got, int) and isinstance(expected, int):
        if isinstance(got, bool) or isinstance(expected, bool):
            return False
        # Below 10 hexadecimal is no other text, and pytest shows where a number comes from.
        return _field(got) is not None or not 0 <= min(got, expected) <= max(got, expected) < 10
    return type(got) is type(expected) and (
        (isinstance(got, tuple | list) and any(type(part) is not str for part in got))
        or isinstance(got, dict)
    )


def relation(op: str, left: object, right: object) -> list[str] | None:
    """Lines for a failed ``left op right``, None where the two reprs say as much."""
    if op == "==":
        return compare(left, right) if explains(left, right) else None
    if not (_holds_number(left) or _holds_number(right)):
        return None
    field = _field(left) or _field(right)
    name = f"{field.name}: " if field is not None else ""
    return [f"{name}{_valued(field, left)} {op} {_valued(field, right)}"]


def _holds_number(value: object) -> bool:
    """Whether a number is in it that hexadecimal shows in another way."""
    if isinstance(value, tuple | list | set | frozenset):
        return any(_holds_number(part) for part in value)
    if not isinstance(value, int) or isinstance(value, bool):
        return False
    return _field(value) is not None or abs(value) >= 10


def compare(got: object, expected: object) -> list[str]:
    """Lines for a failed ``got == expected``: the difference first, the rest after it."""
    if is_outcome(got) or is_outcome(expected):
        return _compare_outcomes(got, expected)
    if isinstance(got, int) and isinstance(expected, int):
        return [_difference("", got, expected)]
    if isinstance(got, dict) and isinstance(expected, dict):
        return _compare_parts(got, expected, f"got {shown(got)}, expected {shown(expected)}")
    if isinstance(got, tuple | list) and isinstance(expected, tuple | list):
        whole = f"got {shown(got)}, expected {shown(expected)}"
        return _compare_parts(_numbered(got), _numbered(expected), whole)
    return [f"got {shown(got)}, expected {shown(expected)}"]


def _compare_outcomes(got: object, expected: object) -> list[str]:
    differences = []
    if type(got) is type(expected) and dataclasses.is_dataclass(got):
        for item in dataclasses.fields(got):
            have, want = getattr(got, item.name), getattr(expected, item.name)
            if item.compare and have != want:
                differences.append(_difference(item.name, have, want))
    lines = [f"got {got!r}, expected {expected!r}"]
    if differences and len(differences) <= _MOST_DIFFERENCES:
        reason = vars(got).get("reason")
        name = f" of {reason.name}" if isinstance(reason, enum.Enum) else ""
        lines = [f"{type(got).__name__}{name}: {'; '.join(differences)}", *lines]
    else:
        lines += differences
    for name, value in (("got", got), ("expected", expected)):
        text = decode(value) if is_outcome(value) else ""
        if text:
            lines.append(f"{name + ':':10}{text}")
    return lines


def _compare_parts(
    got: Mapping[Any, object], expected: Mapping[Any, object], whole: str
) -> list[str]:
    lines = []
    for key in [*got, *(key for key in expected if key not in got)]:
        name = _key(key)
        if key not in expected:
            lines.append(f"{name}: got {shown(got[key])}, expected nothing")
        elif key not in got:
            lines.append(f"{name}: got nothing, expected {shown(expected[key])}")
        elif got[key] != expected[key]:
            name = "" if _field(got[key]) is not None else name
            lines.append(_difference(name, got[key], expected[key]))
    if len(got) == len(expected) == 1 and len(lines) == 1:
        return lines
    return [*lines[:_MOST_FIELDS], whole]


def _numbered(values: Iterable[object]) -> dict[str, object]:
    return {f"[{number}]": value for number, value in enumerate(values)}


def _difference(name: str, got: object, expected: object) -> str:
    """One part that differs: with the names of its bits, and the bits that differ."""
    field = _field(got) or _field(expected)
    text = f"got {_valued(field, got)}, expected {_valued(field, expected)}"
    if (
        isinstance(got, int)
        and isinstance(expected, int)
        and not isinstance(got, bool | enum.Enum)
        and got.bit_count() + expected.bit_count() > 2
    ):
        text += f", differing in {got ^ expected:#x}"
    name = name or getattr(field, "name", "")
    return f"{name}: {text}" if name else text


def _field(value: Any) -> Any:
    """The VMCS field that VMREAD gave the value of, None for another value."""
    if not _is_a(value, "kvmnest.l1.vmcs", "FieldValue"):
        return None
    from kvmnest.vmx import Field
    from kvmnest.vmx.numbers import enum_or_int

    found = enum_or_int(Field, value.field)
    return found if isinstance(found, Field) else None


def _valued(field: Any, value: object) -> str:
    """A value of a VMCS field in words; of no field, the value."""
    if field is not None and isinstance(value, int):
        from kvmnest.vmx import explain

        return explain.explain_field_value(field, int(value))
    return shown(value)


def shown(value: object) -> str:
    """A value as a failure shows it: numbers in hexadecimal, flags and errors by name."""
    if isinstance(value, enum.IntFlag):
        return f"{value.value:#x} ({value.name or '0'})"
    if isinstance(value, enum.Enum):
        return f"{value.name} ({value.value:#x})" if isinstance(value, int) else value.name
    if isinstance(value, int) and not isinstance(value, bool):
        return hex(value)
    if type(value) is tuple:
        return f"({', '.join(map(shown, value))}{',' * (len(value) == 1)})"
    if type(value) is list:
        return f"[{', '.join(map(shown, value))}]"
    if isinstance(value, set | frozenset):
        return "{" + ", ".join(sorted(map(shown, value))) + "}"
    if type(value) is dict:
        return "{" + ", ".join(f"{_key(key)}: {shown(part)}" for key, part in value.items()) + "}"
    return repr(value)


def _key(key: object) -> str:
    return key if isinstance(key, str) else shown(key)


_OBJECT = re.compile(r"<(?:[\w.<>]*\.)?(\w+) object at 0x[0-9a-f]+>")
_FUNCTION = re.compile(r"(<function [\w.<>]+) at 0x[0-9a-f]+>")


_DECIMAL = re.compile(r"(?<![\w.#-])\d{5,}(?![\w.])")


def readable(text: str) -> str:
    """A failure's text without the addresses of Python's objects, which say nothing.

    Where a line of pytest has one number in hexadecimal, the other large ones are so too: it
    shows the constants of ``cr0 & 0x80000000`` in decimal.
    """
    text = _FUNCTION.sub(r"\1>", _OBJECT.sub(r"<\1>", text))
    return "\n".join(
        _DECIMAL.sub(lambda found: hex(int(found[0])), line) if "0x" in line else line
        for line in text.split("\n")
    )


def context(values: Iterable[object], rerun: str) -> str:
    """What to know about a failed case besides the failure: lines of text.

    ``values`` are what the case was called with; the L1s among them tell what they did.
    """
    lines: list[str] = []
    for value in values:
        if _is_l1(value):
            lines += _vmcs(value) + _objections(value) + _code(value) + _commands(value)
    lines.append(f"kernel {host.kernel()}, {host.cpu_model()}")
    lines.append(host.params_text(host.kvm_intel_params()))
    if rerun:
        lines.append(f"rerun: {rerun}")
    return "\n".join(lines)


def _is_l1(value: object) -> bool:
    """An L1 or of a class made from it."""
    return _is_a(value, "kvmnest.l1.l1", "L1")


def _is_a(value: object, module: str, name: str) -> bool:
    """isinstance without an import: where the module is not loaded, nothing is of its class."""
    kind = getattr(sys.modules.get(module), name, None)
    return kind is not None and isinstance(value, kind)


def _vmcs(l1: Any) -> list[str]:
    try:
        changes = l1.vmcs_diff()
    except Exception as error:  # a failure report must not fail
        return [f"VMCS changes against the baseline: not available ({error})"]
    if not changes:
        return []
    lines = ["VMCS changes against the baseline:"]
    from kvmnest.vmx import explain

    for field, before, now in changes[:_MOST_FIELDS]:
        was = "unset" if before is None else hex(before)
        lines.append(f"  {field.name} {was} -> {explain.explain_field_value(field, now)}")
    if len(changes) > _MOST_FIELDS:
        lines.append(f"  and {len(changes) - _MOST_FIELDS} more")
    return lines


def _entries(l1: Any) -> list[object]:
    """How the VM entries among the last commands ended."""
    from kvmnest.l1.command import Kind

    return [end for command, end in l1.log if getattr(command, "kind", None) is Kind.ENTRY]


def _objections(l1: Any) -> list[str]:
    """Which rules of VM entry object to the VMCS, if L1 has tried to enter it."""
    from kvmnest.vmx.outcome import EntryFailure, VMfailValid

    ends = _entries(l1)
    if not ends:
        return []
    try:
        from kvmnest.l1.objections import objections

        found = objections(l1)
    except Exception as error:  # a failure report must not fail
        return [f"rules of VM entry: not available ({error})"]
    refused = isinstance(ends[-1], EntryFailure) or (
        isinstance(ends[-1], VMfailValid) and ends[-1].error in _REFUSALS
    )
    if not found:
        return ["no rule of VM entry objects to this VMCS"] if refused else []
    though = "" if refused else ", though the last entry was not refused"
    return [f"rules of VM entry that object{though}:", *(f"  {each}" for each in found)]


def _code(l1: Any) -> list[str]:
    """L2's code at the GUEST_RIP that was set last, as ``disassembly.expand`` takes it."""
    from kvmnest.vmx import EntryCtl, Field

    try:
        if not _entries(l1):
            return []
        fields = l1.cpu.vmcs.fields()
        rights = fields.get(Field.GUEST_CS_ACCESS_RIGHTS, 0)
        long_mode = fields.get(Field.VM_ENTRY_CONTROLS, 0) & EntryCtl.IA32E_MODE_GUEST.value
        bits = 64 if long_mode and rights >> 13 & 1 else 32 if rights >> 14 & 1 else 16
        base = 0 if bits == 64 else fields.get(Field.GUEST_CS_BASE, 0)
        address = fields[Field.GUEST_RIP]
        code, end, _ = l1.read(base + address, _MOST_CODE).partition(_END_OF_L2)
    except Exception:  # a failure report must not fail
        return []
    return [disassembly.code_line("L2's code", address, bits, code + end[:3])]


#: What ``L1.set_l2`` writes behind the code: VMCALL and HLT.
_END_OF_L2 = b"\x0f\x01\xc1\xf4"


def _commands(l1: Any) -> list[str]:
    log = list(l1.log)
    if not log:
        return []
    hidden = False
    lines = []
    for entry in log[-_LAST_COMMANDS:]:
        command, outcome = entry if isinstance(entry, tuple) else (entry, "")
        text = str(command)
        told = _without_pattern(text)
        hidden |= told != text.rstrip()
        lines.append(f"  {told} -> {outcome!r}" if outcome != "" else f"  {told}")
    left_out = " (registers with their default pattern left out)" if hidden else ""
    return [f"last commands of {len(log)}{left_out}:", *lines]


_REGISTER = re.compile(r" \w+=0x([0-9a-f]+)")


def _without_pattern(text: str) -> str:
    """A command without the registers that hold one byte, 1 to 15, eight times."""

    def keep(found: re.Match[str]) -> str:
        value = int(found[1], 16)
        pattern = value % 0x0101010101010101 == 0 and 0 < value >> 56 < 16
        return "" if pattern else found[0]

    return _REGISTER.sub(keep, text).rstrip()
