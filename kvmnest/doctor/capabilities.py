"""VMX capability MSRs of this machine, of a kernel in the lab, or of a saved file; compared."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvmnest import reading
from kvmnest.cases.capabilities import SCHEMA, read
from kvmnest.errors import HarnessError
from kvmnest.lab.emulators import BOCHS, Choice
from kvmnest.vmx import Capabilities, capdecode

Document = dict[str, Any]

_HEXADECIMAL = "^0x[0-9a-f]{1,16}$"
_SCHEMA = {
    "type": "object",
    "required": ["schema", "kernel", "cpu", "msrs"],
    "properties": {
        "schema": {"const": SCHEMA},
        "kernel": {"type": "string"},
        "cpu": {"type": "string"},
        "kvm_params": {"type": "object", "additionalProperties": {"type": "string"}},
        "reason": {"type": "string"},
        "msrs": {
            "type": "object",
            "propertyNames": {"pattern": _HEXADECIMAL},
            "additionalProperties": {"type": "string", "pattern": _HEXADECIMAL},
        },
    },
}


def here() -> Document:
    """Of this machine's KVM. Raises KvmUnavailable, or HarnessError without VMX."""
    return _with_vmx(read())


def in_lab(
    kernel: str | None,
    params: Mapping[str, str] | None = None,
    modules: str | None = None,
    emulator: Choice = BOCHS,
) -> Document:
    """Of a kernel in the lab. Raises what Lab raises, HarnessError if KVM offers no VMX there."""
    from kvmnest.lab import cache
    from kvmnest.lab.machine import Lab

    lab = Lab(kernel, kvm_params=params, kvm_modules=modules, emulator=emulator)
    cache.tell(f"booting {lab.kernel.release} {lab.emulator.where}: some seconds")
    output = lab.output(["python3", "-m", "kvmnest.cases.capabilities"], "reading the capabilities")
    return _with_vmx(reading.value(output, "JSON", _SCHEMA, "the lab's answer"))


def load(path: Path) -> Document:
    """Read what ``kvmnest caps --json`` wrote. Raises KvmnestError for anything else."""
    found = reading.document(path, "file of kvmnest caps --json", _SCHEMA)
    try:
        decoded(found)
    except ValueError as error:
        raise HarnessError(f"{reading.shown(path)}: {error}") from error
    return found


def decoded(document: Document) -> list[tuple[str, str, str]]:
    """Lines of (MSR, bit or number, value) in the SDM's names."""
    msrs = {int(index, 16): int(value, 16) for index, value in document["msrs"].items()}
    lines = capdecode.decode(Capabilities.from_msrs(msrs))
    return [(msr.name, name, text) for msr, name, text in lines]


def compare(old: Document, new: Document) -> list[tuple[str, str, str, str]]:
    """What differs: (MSR, bit or number, old value, new value); "-" where one has it not."""
    before, after = ({(m, n): v for m, n, v in decoded(doc)} for doc in (old, new))
    # Both in the order of the MSRs, what only the second has last.
    names = [*before, *(name for name in after if name not in before)]
    return [
        (*name, before.get(name, "-"), after.get(name, "-"))
        for name in names
        if before.get(name) != after.get(name)
    ]


def _with_vmx(document: Document) -> Document:
    if not document["msrs"]:
        raise HarnessError(f"KVM offers no VMX to guests: {document.get('reason', '')}")
    return document
