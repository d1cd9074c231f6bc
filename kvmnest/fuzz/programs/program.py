"""A program: steps that L1 and its host do one after the other, as JSON.

A step is an object with "do" (see ``STEPS``). Addresses are a label of the payload and an offset;
without a label ("") the offset is the address. Numbers of VMCS fields are names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvmnest import schema
from kvmnest.l1.baseline import L2Mode
from kvmnest.l1.command import GPRS
from kvmnest.schema import COUNT, TEXT, Schema, exactly
from kvmnest.vmx import Field

#: Version of the meaning of programs; one of another version is not run.
VERSION = 1

Step = Mapping[str, Any]

_HEX: Schema = {"type": "string", "pattern": "^([0-9a-f][0-9a-f])*$"}
_NUMBER: Schema = {"type": "integer", "minimum": 0, "maximum": (1 << 64) - 1}
_REGS: Schema = {
    "type": "object",
    "propertyNames": {"enum": [*GPRS, "cr2"]},
    "additionalProperties": _NUMBER,
}
_FIELDS: Schema = {
    "type": "object",
    "propertyNames": {"enum": [field.name for field in Field]},
    "additionalProperties": _NUMBER,
}
_PLACE = {"place": TEXT, "offset": _NUMBER}

#: What a host does between two steps; nothing of it may be seen by L1.
HOST_ACTIONS = (
    *("new VM", "nested state", "sregs", "regs", "events", "msrs", "xsave", "debugregs"),
    *("memory slot", "dirty log", "signal", "other CPU", "SMI"),
)
#: What comes to the first vCPU of L1 through its local APIC.
EVENTS = ("interrupt", "NMI")
#: The port at whose OUT L2 waits for the host, if L1 lets it.
PAUSE_PORT = 0x77

#: Instructions of L1 by the operands that they take.
AT_ADDRESS = ("vmxon", "vmclear", "vmptrld")
ALONE = ("vmxoff", "vmptrst", "vmfunc")
INVALIDATING = ("invept", "invvpid")


def _step(kind: str, required: Sequence[str], /, **properties: object) -> Schema:
    return exactly(["do", *required], do={"const": kind}, **properties)


#: Steps that are possible while L2 waits, too.
_PAUSES: Mapping[str, Schema] = {
    "host": _step("host", ["what"], what={"enum": [*HOST_ACTIONS]}),
    # Nested state with other bits, then the right one.
    "nested": _step("nested", ["offset", "bits"], offset=_NUMBER, bits=_NUMBER),
    "event": _step(
        "event",
        ["what", "vector"],
        what={"enum": [*EVENTS]},
        vector={"type": "integer", "minimum": 16, "maximum": 255},
    ),
}
_PAUSE: Schema = {"type": "object", "required": ["do"], "anyOf": [*_PAUSES.values()]}

#: What a step may be, by its "do".
STEPS: Mapping[str, Schema] = {
    # A VMX instruction with a physical address in memory.
    "address": _step(
        "address", ["name", "place", "offset"], name={"enum": [*AT_ADDRESS]}, **_PLACE
    ),
    # A VMX instruction without an operand that matters.
    "alone": _step("alone", ["name"], name={"enum": [*ALONE]}),
    # INVEPT or INVVPID: the type in a register, a descriptor of two numbers.
    "invalidate": _step(
        "invalidate",
        ["name", "type", "first", "second"],
        name={"enum": [*INVALIDATING]},
        type=_NUMBER,
        first=_NUMBER,
        second=_NUMBER,
    ),
    # VMREAD or VMWRITE of any encoding.
    "vmread": _step("vmread", ["field"], field=_NUMBER),
    "vmwrite": _step("vmwrite", ["field", "value"], field=_NUMBER, value=_NUMBER),
    # The revision identifier of a region: "good", "shadow" (bit 31 set) or "bad".
    "region": _step(
        "region", ["place", "revision"], place=TEXT, revision={"enum": ["good", "shadow", "bad"]}
    ),
    # VMWRITE of the whole base VMCS, and of some fields.
    "base": _step("base", ["mode"], mode={"enum": [mode.name for mode in L2Mode]}),
    "fields": _step("fields", ["fields"], fields=_FIELDS),
    # L2's code, in parts at whose beginnings L2 may be entered, and GUEST_RIP at the first.
    "code": _step("code", ["parts"], parts={"type": "array", "items": _HEX}),
    # L1's memory: some bytes, again and again.
    "memory": _step(
        "memory",
        ["place", "offset", "bytes", "times"],
        bytes=_HEX,
        times={"type": "integer", "minimum": 1, "maximum": 8192},
        **_PLACE,
    ),
    # VM entry; up to ``most`` times in all, each time at the part of the code behind the exit.
    # At each OUT to PAUSE_PORT that comes to the host it does the next of ``pauses``.
    "enter": _step(
        "enter",
        ["name", "regs", "most"],
        pauses={"type": "array", "items": _PAUSE, "maxItems": 64},
        name={"enum": ["vmlaunch", "vmresume"]},
        regs=_REGS,
        most={"type": "integer", "minimum": 1, "maximum": 64},
    ),
    # An instruction of L1 that is none of VMX, with registers.
    "l1": _step("l1", ["code", "regs"], code=_HEX, regs=_REGS),
    **_PAUSES,
    # The vCPU that does the steps behind this one.
    "cpu": _step("cpu", ["index"], index={"enum": [0, 1]}),
}

_STEP: Schema = {
    "type": "object",
    "required": ["do"],
    "properties": {"do": {"enum": [*STEPS]}},
    "anyOf": [*STEPS.values()],
}
#: A file of the corpus.
SCHEMA: Schema = exactly(
    ["schema", "steps"],
    schema={"const": VERSION},
    steps={"type": "array", "items": _STEP, "maxItems": 1000},
    seed=COUNT,
    number=COUNT,
    shows=TEXT,
)


@dataclass(frozen=True)
class Program:
    """The steps; two programs with the same steps are the same."""

    steps: tuple[Step, ...]

    def to_json(self) -> dict[str, Any]:
        """A document that meets ``SCHEMA``."""
        return {"schema": VERSION, "steps": [dict(step) for step in self.steps]}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Program:
        """Undo ``to_json``; ``found`` meets ``SCHEMA``."""
        return cls(tuple(found["steps"]))


def problem(found: object) -> str:
    """Why this is not a program; "" if it is one."""
    return schema.problem(found, SCHEMA)
