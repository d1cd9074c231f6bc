"""Doing the steps of a program on an L1; what is seen of each comes back as JSON."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from typing import Any

from kvmnest.errors import HarnessError, NeedsHost
from kvmnest.fuzz.programs.base import base_vmcs
from kvmnest.fuzz.programs.observe import Seen, Watcher, end, needs_host, registers, watched
from kvmnest.fuzz.programs.program import Program, Step
from kvmnest.kvm import KvmError
from kvmnest.l1 import L1, L2Mode, VmLost, vcpu_state
from kvmnest.l1.payload import Payload
from kvmnest.vmx import Capabilities, Field
from kvmnest.vmx.msrs import VMX_MSRS
from kvmnest.vmx.outcome import Exit, Fault, HostExit, Outcome, Succeed

_FAILED = 0x41
_REAL_CODE = 0x9B


class Doer:
    """Does steps on one L1, all of one program. Capabilities are those that programs assume.

    ``host``: there is one, which can do something between steps; ``moved``: it saves the VM and
    restores it into a new one before each step.
    """

    def __init__(
        self, l1: L1, caps: Capabilities, *, host: bool = True, moved: bool = False
    ) -> None:
        self.l1, self.caps, self.host, self.moved = l1, caps, host, moved
        self._watcher = Watcher(l1, _watched(caps))
        #: What was seen of a step so far, if it has several parts.
        self.seen: list[Seen] = []
        self._parts: list[int] = []
        self._code_at = 0
        self._real = False

    def __call__(self, step: Step) -> list[Seen]:
        """Do one step. Raises VmLost, KvmError, NeedsHost and HarnessError."""
        self.seen = []
        if self.moved:
            self.l1.round_trip()
        done = getattr(self, f"_{step['do']}")(step)
        return done if isinstance(done, list) else [done]

    def _address_of(self, step: Step) -> int:
        place, offset = str(step["place"]), int(step["offset"])
        return ((self.l1.sym(place) if place else 0) + offset) & 0xFFFFFFFFFFFFFFFF

    # --- instructions of L1 ---

    def _plain(self, outcome: Outcome) -> Seen:
        seen: Seen = {"end": end(outcome)}
        if isinstance(outcome, Succeed | Fault):
            seen["regs"] = registers(outcome)
        if isinstance(outcome, Succeed) and isinstance(outcome.__dict__.get("value"), int):
            seen["value"] = int(outcome.value)
        return seen

    def _address(self, step: Step) -> Seen:
        return self._plain(getattr(self.l1, step["name"])(self._address_of(step)))

    def _alone(self, step: Step) -> Seen:
        return self._plain(getattr(self.l1, step["name"])())

    def _invalidate(self, step: Step) -> Seen:
        instruction = getattr(self.l1, step["name"])
        return self._plain(instruction(step["type"], step["first"], step["second"]))

    def _vmread(self, step: Step) -> Seen:
        return self._plain(self.l1.vmread(step["field"]))

    def _vmwrite(self, step: Step) -> Seen:
        return self._plain(self.l1.vmwrite(step["field"], step["value"]))

    def _l1(self, step: Step) -> Seen:
        return self._plain(self.l1.call(bytes.fromhex(step["code"]), regs=dict(step["regs"])))

    # --- VMCS and memory ---

    def _region(self, step: Step) -> Seen:
        revision = self.l1.caps.basic.revision_id
        revision ^= {"good": 0, "shadow": 1 << 31, "bad": 1}[step["revision"]]
        self.l1.prepare_region(self.l1.sym(step["place"]), revision)
        return {}

    def _memory(self, step: Step) -> Seen:
        self.l1.write(self._address_of(step), bytes.fromhex(step["bytes"]) * step["times"])
        return {}

    def _base(self, step: Step) -> Seen:
        fields = _base(self.caps, self.l1.payload, L2Mode[step["mode"]])
        self._real = fields[Field.GUEST_CS_ACCESS_RIGHTS] == _REAL_CODE
        return self._write(fields)

    def _fields(self, step: Step) -> Seen:
        return self._write({Field[name]: value for name, value in step["fields"].items()})

    def _code(self, step: Step) -> Seen:
        parts = [bytes.fromhex(part) for part in step["parts"]]
        address = self.l1.sym("l2_code")
        self._parts, at = [], 0
        for part in parts:
            self._parts.append(at)
            at += len(part)
        self._parts.append(at)
        self.l1.write(address, b"".join(parts) + b"\x0f\x01\xc1\xf4")
        fields = {Field.GUEST_RIP: address}
        self._code_at = address
        if self._real:
            fields = {Field.GUEST_RIP: 0, Field.GUEST_CS_BASE: address}
            fields[Field.GUEST_CS_SELECTOR] = address >> 4
            self._code_at = 0
        return self._write(fields)

    def _write(self, fields: dict[Field, int]) -> Seen:
        """VMWRITE each; seen are those that failed, or the exception."""
        cpu, l1 = self.l1.cpu, self.l1
        entries = [(int(field), int(value)) for field, value in fields.items()]
        results = cpu.submit([cpu.write_list("OP_VMWRITE_LIST", entries)])
        if not isinstance(results, list):
            return {"end": end(HostExit(results))}
        if results[0].status != l1.payload["STATUS_LIST_DONE"]:
            return {"end": ["Fault", results[0].vector, results[0].error]}
        flags = cpu.list_flags(len(entries))
        failed = [
            [field.name, rflags & _FAILED]
            for field, rflags in zip(fields, flags, strict=True)
            if rflags & _FAILED
        ]
        return {"end": ["written"], "failed": failed}

    # --- VM entries ---

    def _enter(self, step: Step) -> list[Seen]:
        seen = self.seen
        outcome = getattr(self.l1, step["name"])(regs=dict(step["regs"]))
        seen.append(self._watcher.entry(outcome, every=step["most"] == 1))
        while len(seen) < step["most"] and isinstance(outcome, Exit):
            behind = next((p for p in self._parts if p > outcome.rip - self._code_at), None)
            if behind is None or outcome.rip < self._code_at:
                break
            seen.append(self._write({Field.GUEST_RIP: self._code_at + behind}))
            outcome = self.l1.vmresume(regs=outcome.regs)
            seen.append(self._watcher.entry(outcome))
        if len(seen) > 1 and not isinstance(outcome, HostExit):
            # What changes seldom is read once; each VMREAD may cost an exit to L0.
            self._watcher.add_fields(seen[-1])
        return seen

    # --- the host ---

    def _host(self, step: Step) -> Seen:
        if self.host:
            _ACTIONS[step["what"]](self.l1)
        return {}


# The capabilities of a run are one object; what follows from them is slow to find out.
_known: dict[tuple[int, L2Mode | None], Any] = {}


def _base(caps: Capabilities, payload: Payload, mode: L2Mode) -> dict[Field, int]:
    key = id(caps), mode
    if key not in _known:
        _known[key] = base_vmcs(caps, payload, mode)
    return dict(_known[key])


def _watched(caps: Capabilities) -> tuple[Field, ...]:
    key = id(caps), None
    if key not in _known:
        _known[key] = watched(caps)
    found: tuple[Field, ...] = _known[key]
    return found


def _in_place(get: str, set_: str) -> Callable[[L1], None]:
    """Read a part of the vCPU's state and write it back."""

    def act(l1: L1) -> None:
        vcpu = l1.cpu.vcpu
        value = getattr(vcpu, get)()
        getattr(vcpu, set_)(value)

    return act


def _msrs_in_place(l1: L1) -> None:
    vcpu = l1.cpu.vcpu
    found = vcpu_state.movable_msrs(l1.kvm, vcpu)
    # Linux refuses those of capabilities once the vCPU has run.
    vcpu.set_msrs({index: value for index, value in found.items() if index not in VMX_MSRS})


_ACTIONS: dict[str, Callable[[L1], None]] = {
    "new VM": L1.round_trip,
    "nested state": _in_place("get_nested_state", "set_nested_state"),
    "sregs": _in_place("get_sregs", "set_sregs"),
    "regs": _in_place("get_regs", "set_regs"),
    "events": _in_place("get_vcpu_events", "set_vcpu_events"),
    "xsave": _in_place("get_xsave", "set_xsave"),
    "debugregs": _in_place("get_debugregs", "set_debugregs"),
    "msrs": _msrs_in_place,
}


def run(program: Program, doer: Doer, before: Callable[[int], None]) -> Iterator[list[Seen]]:
    """Do all steps; ``before`` gets the number of each. The last one seen may be the end of L1.

    After an end "lost" or "host" L1 is of no use any more.
    """
    for number, step in enumerate(program.steps):
        before(number)
        try:
            seen = doer(step)
        except (VmLost, KvmError, NeedsHost, HarnessError) as error:
            yield [*doer.seen, {"end": _last(error)}]
            return
        finally:
            doer.l1.budget.stop()
        yield seen
        if any(each.get("end", [""])[0] in ("host", "other") for each in seen):
            return


def _last(error: Exception) -> list[Any]:
    """The end of a step that was the end of L1 too."""
    if isinstance(error, VmLost):
        # What hardware does not know is KVM's, and its detail says what it was.
        detail = [] if error.kind in ("triple fault", "hang") else [error.detail]
        return ["lost", error.kind, *detail]
    if isinstance(error, KvmError):
        name = errno.errorcode.get(error.errno or 0, str(error.errno))
        return ["lost", f"{error.ioctl} {name}"]
    return needs_host(error) if isinstance(error, NeedsHost) else ["other", str(error)]
