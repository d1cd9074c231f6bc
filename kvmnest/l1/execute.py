"""Executes one instruction, or a snippet of code, on a vCPU of L1, and keeps the log."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import TypedDict

from kvmnest.errors import HarnessError
from kvmnest.kvm.exits import Exit as KvmExit
from kvmnest.l1.command import Command, Mode, Result, Shadow
from kvmnest.l1.cpu import Cpu
from kvmnest.l1.vm import L1Vm
from kvmnest.vmx import Vector
from kvmnest.vmx.numbers import enum_or_int
from kvmnest.vmx.outcome import Fault, HostExit, Outcome, Succeed


class How(TypedDict, total=False):
    """How L1 executes an instruction.

    cpu: vCPU (default the first). cpl: 0 or 3. mode: code segment. shadow: blocking by MOV SS
    or by STI. rflags: before the instruction (default: all six status flags set). at: linear
    address of the memory operand, used as it is, instead of a place that kvmnest fills.
    via_ss: address memory through SS. regs: general registers before the instruction, and "cr2".
    rsp: the stack pointer before the instruction.
    """

    cpu: Cpu
    cpl: int
    mode: Mode
    shadow: Shadow
    rflags: int
    at: int
    via_ss: bool
    regs: dict[str, int]
    rsp: int


class Executor:
    """What all instructions of an L1 have in common: command, outcome, log.

    ``execute`` and ``call`` return ``Succeed``, ``Fault``, or ``HostExit`` when KVM returned to
    userspace in the middle, and raise ``VmLost`` and ``HarnessError``.
    """

    def __init__(self, machine: L1Vm) -> None:
        self.machine = machine
        #: Commands since the VM was made, with their outcomes: (command, outcome). The str of a
        #: command names it and its registers.
        self.log: deque[tuple[object, object]] = deque(maxlen=400)

    def execute(
        self, name: str, inputs: Mapping[str, int], operand: bytes = b"", how: How | None = None
    ) -> Outcome:
        """Execute instruction ``name`` of ``payloads/insn.s`` with these registers."""
        cpu, command = self.command(name, inputs, operand, how or {})
        return self.note(command, self.judge(command, cpu.submit((command,))))

    def call(self, code: bytes, how: How) -> Outcome:
        """Execute machine code in L1; see ``SystemInstructions.call``."""
        machine = self.machine
        cpu = how.get("cpu", machine.cpu)
        address = machine.sym("snippet_code") + 2048 * cpu.index
        done = machine.done64
        if len(code) + len(done) > 2048:
            raise HarnessError(f"{len(code)} bytes of code, a snippet holds {2048 - len(done)}")
        machine.write(address, code + done)
        _, command = self.command("nop", {}, b"", how, bytes(code))
        command.set_state(rip=address)
        return self.note(command, self.judge(command, cpu.submit((command,))))

    def command(
        self,
        name: str,
        inputs: Mapping[str, int],
        operand: bytes,
        how: How,
        code: bytes = b"",
    ) -> tuple[Cpu, Command]:
        """The command for instruction ``name``, or for a snippet of code, and its vCPU."""
        if not how:
            cpu = self.machine.cpus[0]
            return cpu, Command(cpu.frames.usual(name), dict(inputs), operand, code)
        cpu = how.get("cpu", self.machine.cpu)
        frame = cpu.frames.get(
            name,
            how.get("cpl", 0),
            how.get("mode", Mode.LONG),
            how.get("shadow", Shadow.NONE),
            how.get("via_ss", False),
            how.get("at"),
        )
        command = Command(frame, {**inputs, **how.get("regs", {})}, operand, code)
        command.set_state(rflags=how.get("rflags"), rsp=how.get("rsp"))
        return cpu, command

    def judge(self, command: Command, seen: list[Result] | KvmExit) -> Outcome:
        """The outcome of a command that is not a VMX instruction."""
        if not isinstance(seen, list):
            return HostExit(seen)
        result = seen[0]
        if self.machine.is_done(result.vector, result.rip):
            return Succeed.made(result)
        return self.fault(command, result)

    def fault(self, command: Command, result: Result) -> Fault:
        """The exception that a command ended with."""
        return Fault.made(
            result,
            vector=enum_or_int(Vector, result.vector),
            error_code=result.error,
            cr2=result.cr2,
            rip=result.rip - command.rip,
        )

    def note(self, command: Command, outcome: Outcome) -> Outcome:
        """Log a command with its outcome, which is returned."""
        self.log.append((command, outcome))
        return outcome
