"""Doing the steps of a program on an L1; what is seen of each comes back as JSON."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from kvmnest.errors import HarnessError, NeedsHost
from kvmnest.fuzz.programs.base import base_vmcs
from kvmnest.fuzz.programs.host import Host, second
from kvmnest.fuzz.programs.observe import (
    FAILED,
    Seen,
    Watcher,
    end,
    needs_host,
    registers,
    some_failed,
    watched,
)
from kvmnest.fuzz.programs.program import PAUSE_PORT, Program, Step
from kvmnest.kvm import KvmError, exits
from kvmnest.l1 import L1, L2Mode, VmLost
from kvmnest.l1.cpu import packed_writes
from kvmnest.l1.payload import Payload
from kvmnest.vmx import Capabilities, Field
from kvmnest.vmx.outcome import Exit, Fault, HostExit, Outcome, Succeed

_REAL_CODE = 0x9B
#: Times that L2 may wait for the host in one entry; its code may be a loop.
_MOST_PAUSES = 100


class Doer:
    """Does steps on one L1, all of one program. Capabilities are those that programs assume.

    ``bare``: there is no host. ``quiet``: there is one, which does nothing that L1 may not see.
    ``moved``: it saves the VM and restores it into a new one before each step.
    """

    def __init__(
        self,
        l1: L1,
        caps: Capabilities,
        *,
        bare: bool = False,
        quiet: bool = False,
        moved: bool = False,
    ) -> None:
        self.l1, self.caps, self.moved = l1, caps, moved
        self.host = Host(l1, here=not quiet, bare=bare)
        self._cpu = l1.cpu
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
            self.host.move()
        done = self._do(step)
        return done if isinstance(done, list) else [done]

    def _do(self, step: Step) -> Any:
        return getattr(self, f"_do_{step['do']}")(step)

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

    def _do_address(self, step: Step) -> Seen:
        return self._plain(getattr(self.l1, step["name"])(self._address_of(step), cpu=self._cpu))

    def _do_alone(self, step: Step) -> Seen:
        return self._plain(getattr(self.l1, step["name"])(cpu=self._cpu))

    def _do_invalidate(self, step: Step) -> Seen:
        instruction = getattr(self.l1, step["name"])
        operand = step["first"], step["second"]
        return self._plain(instruction(step["type"], *operand, cpu=self._cpu))

    def _do_vmread(self, step: Step) -> Seen:
        return self._plain(self.l1.vmread(step["field"], cpu=self._cpu))

    def _do_vmwrite(self, step: Step) -> Seen:
        return self._plain(self.l1.vmwrite(step["field"], step["value"], cpu=self._cpu))

    def _do_l1(self, step: Step) -> Seen:
        code, regs = bytes.fromhex(step["code"]), dict(step["regs"])
        return self._plain(self.l1.call(code, regs=regs, cpu=self._cpu))

    # --- VMCS and memory ---

    def _do_region(self, step: Step) -> Seen:
        revision = self.l1.caps.basic.revision_id
        revision ^= {"good": 0, "shadow": 1 << 31, "bad": 1}[step["revision"]]
        self.l1.prepare_region(self.l1.sym(step["place"]), revision)
        return {}

    def _do_memory(self, step: Step) -> Seen:
        self.l1.write(self._address_of(step), bytes.fromhex(step["bytes"]) * step["times"])
        return {}

    def _do_base(self, step: Step) -> Seen:
        fields, packed = _base(self.caps, self.l1.payload, L2Mode[step["mode"]])
        self._real = fields[Field.GUEST_CS_ACCESS_RIGHTS] == _REAL_CODE
        return self._write(fields, packed)

    def _do_fields(self, step: Step) -> Seen:
        return self._write({Field[name]: value for name, value in step["fields"].items()})

    def _do_code(self, step: Step) -> Seen:
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

    def _write(self, fields: Mapping[Field, int], packed: bytes = b"") -> Seen:
        """VMWRITE each (``packed`` for the list page); seen are those that failed, or a fault."""
        cpu, l1 = self._cpu, self.l1
        results = cpu.submit([cpu.put_list("OP_VMWRITE_LIST", packed or packed_writes(fields))])
        if not isinstance(results, list):
            return {"end": end(HostExit(results))}
        if results[0].status != l1.payload["STATUS_LIST_DONE"]:
            return {"end": ["Fault", results[0].vector, results[0].error]}
        flags = cpu.list_flags(len(fields))
        failed = [
            [field.name, rflags & FAILED]
            for field, rflags in (zip(fields, flags, strict=True) if some_failed(flags) else ())
            if rflags & FAILED
        ]
        return {"end": ["written"], "failed": failed}

    # --- VM entries ---

    def _do_enter(self, step: Step) -> list[Seen]:
        seen = self.seen
        pauses = iter(step.get("pauses", ()))
        outcome = getattr(self.l1, step["name"])(regs=dict(step["regs"]), cpu=self._cpu)
        outcome = self._paused(outcome, pauses)
        seen.append(self._watcher.entry(outcome, self._cpu, every=step["most"] == 1))
        while len(seen) < step["most"] and isinstance(outcome, Exit):
            behind = next((p for p in self._parts if p > outcome.rip - self._code_at), None)
            if behind is None or outcome.rip < self._code_at:
                break
            seen.append(self._write({Field.GUEST_RIP: self._code_at + behind}))
            outcome = self.l1.vmresume(regs=outcome.regs, cpu=self._cpu)
            outcome = self._paused(outcome, pauses)
            seen.append(self._watcher.entry(outcome, self._cpu))
        if len(seen) > 1 and not isinstance(outcome, HostExit):
            # What changes seldom is read once; each VMREAD may cost an exit to L0.
            self._watcher.add_fields(seen[-1], self._cpu)
        return seen

    def _paused(self, outcome: Outcome, pauses: Iterator[Step]) -> Outcome:
        """Let L2 go on wherever it waits for the host, which does the next of ``pauses``."""
        for _ in range(_MOST_PAUSES):
            if not isinstance(outcome, HostExit) or not _waits(outcome.exit):
                break
            step = next(pauses, None)
            if step is not None:
                # The OUT is over then, as it is after a move.
                self._cpu.vcpu.run(immediate_exit=True)
                self._do(step)
            outcome = self.l1.resume(self._cpu)
        return outcome

    # --- the host ---

    def _do_host(self, step: Step) -> Seen:
        self.host.act(step["what"], self._cpu)
        return {}

    def _do_nested(self, step: Step) -> Seen:
        self.host.change_nested_state(self._cpu, step["offset"], step["bits"])
        return {}

    def _do_event(self, step: Step) -> Seen:
        self.host.event(step["what"], step["vector"])
        return {}

    def _do_cpu(self, step: Step) -> Seen:
        self._cpu = second(self.l1) if step["index"] else self.l1.cpu
        return {}


# The capabilities of a run are one object; what follows from them is slow to find out.
_known: dict[tuple[int, L2Mode | None], Any] = {}


def _base(caps: Capabilities, payload: Payload, mode: L2Mode) -> tuple[Mapping[Field, int], bytes]:
    """The base VMCS of a mode, and packed for the list page."""
    key = id(caps), mode
    if key not in _known:
        fields = base_vmcs(caps, payload, mode)
        _known[key] = fields, packed_writes(fields)
    found: tuple[Mapping[Field, int], bytes] = _known[key]
    return found


def _watched(caps: Capabilities) -> tuple[Field, ...]:
    key = id(caps), None
    if key not in _known:
        _known[key] = watched(caps)
    found: tuple[Field, ...] = _known[key]
    return found


def _waits(seen: exits.Exit) -> bool:
    return isinstance(seen, exits.IoExit) and seen.port == PAUSE_PORT and seen.is_out


def run(program: Program, doer: Doer, before: Callable[[int], None]) -> Iterator[list[Seen]]:
    """Do all steps; ``before`` gets the number of each. The last one seen may be the end of L1.

    After an end "lost" or "host" L1 is of no use any more.
    """
    budget = doer.l1.budget
    try:
        for number, step in enumerate(program.steps):
            before(number)
            try:
                seen = doer(step)
            except (VmLost, KvmError, NeedsHost, HarnessError) as error:
                yield [*doer.seen, {"end": _last(error)}]
                return
            budget.pause()
            yield seen
            if any(each.get("end", [""])[0] in ("host", "other") for each in seen):
                return
    finally:
        budget.stop()


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
