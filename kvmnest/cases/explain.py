"""Text for failures: outcomes decoded, what the VMCS held, the last commands, the machine."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from kvmnest import host

_LAST_COMMANDS = 12
_MOST_FIELDS = 60
#: VM-instruction errors of an entry with invalid control or host-state fields.
_REFUSALS = (7, 8)


def is_outcome(value: object) -> bool:
    """Whether ``value`` is an outcome of ``kvmnest.vmx.outcome``."""
    return type(value).__module__ == "kvmnest.vmx.outcome"


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


def compare(got: object, expected: object) -> list[str]:
    """Lines for a failed ``got == expected`` between outcomes, the summary first."""
    lines = [f"got {got!r}, expected {expected!r}"]
    for name, value in (("got", got), ("expected", expected)):
        text = decode(value) if is_outcome(value) else ""
        if text:
            lines.append(f"{name + ':':10}{text}")
    if type(got) is type(expected) and dataclasses.is_dataclass(got):
        for item in dataclasses.fields(got):
            have, want = getattr(got, item.name), getattr(expected, item.name)
            if item.compare and have != want:
                lines.append(f"{item.name}: {_number(have)}, expected {_number(want)}")
    return lines


def _number(value: object) -> str:
    if type(value) is int:
        return hex(value)
    return getattr(value, "name", None) or repr(value)


def context(values: Iterable[object], rerun: str) -> str:
    """What to know about a failed case besides the failure: lines of text.

    ``values`` are what the case was called with; the L1s among them tell what they did.
    """
    lines: list[str] = []
    for value in values:
        if type(value).__name__ == "L1" and type(value).__module__.startswith("kvmnest.l1"):
            lines += _vmcs(value) + _objections(value) + _commands(value)
    lines.append(f"kernel {host.kernel()}, {host.cpu_model()}")
    lines.append(host.params_text(host.kvm_intel_params()))
    if rerun:
        lines.append(f"rerun: {rerun}")
    return "\n".join(lines)


def _vmcs(l1: Any) -> list[str]:
    try:
        changes = l1.vmcs_diff()
    except Exception as error:  # a failure report must not fail
        return [f"VMCS changes against the baseline: not available ({error})"]
    if not changes:
        return []
    lines = ["VMCS changes against the baseline:"]
    for field, before, now in changes[:_MOST_FIELDS]:
        lines.append(f"  {field.name} {'unset' if before is None else hex(before)} -> {now:#x}")
    if len(changes) > _MOST_FIELDS:
        lines.append(f"  and {len(changes) - _MOST_FIELDS} more")
    return lines


def _objections(l1: Any) -> list[str]:
    """Which rules of VM entry object to the VMCS, if L1 has tried to enter it."""
    from kvmnest.vmx.outcome import EntryFailure, VMfailValid

    ends = [end for command, end in l1.log if str(command).startswith(("vmlaunch", "vmresume"))]
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


def _commands(l1: Any) -> list[str]:
    log = list(l1.log)
    if not log:
        return []
    lines = [f"last commands of {len(log)}:"]
    for entry in log[-_LAST_COMMANDS:]:
        command, outcome = entry if isinstance(entry, tuple) else (entry, "")
        lines.append(f"  {command} -> {outcome!r}" if outcome != "" else f"  {command}")
    return lines
