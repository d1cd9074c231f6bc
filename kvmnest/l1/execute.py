"""Executing one instruction in L1, any, and the system instructions as methods."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypedDict, Unpack

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


class SystemInstructions(L1Vm):
    """A machine that executes instructions; the VMX ones are in ``Instructions``.

    Unless a method says otherwise it returns ``Succeed``, ``Fault``, or ``HostExit`` when KVM
    returned to userspace in the middle, and raises ``VmLost`` and ``HarnessError``.
    """

    # --- one instruction, any ---

    def execute(
        self, name: str, inputs: Mapping[str, int], operand: bytes = b"", **how: Unpack[How]
    ) -> Outcome:
        """Execute instruction ``name`` of ``payloads/insn.s`` with these registers."""
        cpu, command = self._command(name, dict(inputs), operand, how)
        return self._finish(cpu, command)

    def call(self, code: bytes, **how: Unpack[How]) -> Outcome:
        """Execute machine code in L1; it must not jump outside itself.

        In ``Fault``, ``rip`` is the offset from its first byte.
        """
        cpu = how.get("cpu", self.cpu)
        address = self.sym("snippet_code") + 2048 * cpu.index
        if len(code) + len(self.done64) > 2048:
            raise HarnessError(
                f"{len(code)} bytes of code, a snippet holds {2048 - len(self.done64)}"
            )
        self.write(address, code + self.done64)
        _, command = self._command("nop", {}, b"", how, bytes(code))
        command.set_state(rip=address)
        return self._finish(cpu, command)

    def command(
        self, name: str, inputs: Mapping[str, int], operand: bytes = b"", **how: Unpack[How]
    ) -> Command:
        """Return the command that ``execute`` would run, for a batch."""
        return self._command(name, dict(inputs), operand, how)[1]

    def _command(
        self,
        name: str,
        inputs: Mapping[str, int],
        operand: bytes,
        how: How,
        code: bytes = b"",
    ) -> tuple[Cpu, Command]:
        if not how:
            cpu = self.cpus[0]
            return cpu, Command(cpu.frames.usual(name), inputs, operand, code)
        cpu = how.get("cpu", self.cpu)
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

    def _finish(self, cpu: Cpu, command: Command) -> Outcome:
        return self._note(command, self._plain(command, cpu.submit((command,))))

    def _plain(self, command: Command, seen: list[Result] | KvmExit) -> Outcome:
        if not isinstance(seen, list):
            return HostExit(seen)
        result = seen[0]
        if self.is_done(result.vector, result.rip):
            return Succeed.made(result)
        return self._fault(command, result)

    def _fault(self, command: Command, result: Result) -> Fault:
        return Fault.made(
            result,
            vector=enum_or_int(Vector, result.vector),
            error_code=result.error,
            cr2=result.cr2,
            rip=result.rip - command.rip,
        )

    def _note(self, command: Command, outcome: Outcome) -> Outcome:
        self.log.append((command, outcome))
        return outcome

    # --- other instructions ---

    def rdmsr(self, index: int, **how: Unpack[How]) -> Outcome:
        """RDMSR; ``Succeed.value`` is EDX:EAX."""
        return _edx_eax(self.execute("rdmsr", {"rcx": index}, **how))

    def wrmsr(self, index: int, value: int, **how: Unpack[How]) -> Outcome:
        """WRMSR."""
        regs = {"rcx": index, "rax": value & 0xFFFFFFFF, "rdx": value >> 32 & 0xFFFFFFFF}
        return self.execute("wrmsr", regs, **how)

    def cpuid(self, leaf: int, subleaf: int = 0, **how: Unpack[How]) -> Outcome:
        """CPUID; ``Succeed.value`` is (EAX, EBX, ECX, EDX)."""
        outcome = self.execute("cpuid", {"rax": leaf, "rcx": subleaf}, **how)
        if isinstance(outcome, Succeed):
            regs = outcome.regs
            value = tuple(regs[name] for name in ("rax", "rbx", "rcx", "rdx"))
            return outcome.with_value(value)
        return outcome

    def rdtsc(self, **how: Unpack[How]) -> Outcome:
        """RDTSC; ``Succeed.value`` is EDX:EAX."""
        return _edx_eax(self.execute("rdtsc", {}, **how))

    def xgetbv(self, register: int = 0, **how: Unpack[How]) -> Outcome:
        """XGETBV; ``Succeed.value`` is EDX:EAX."""
        return _edx_eax(self.execute("xgetbv", {"rcx": register}, **how))

    def xsetbv(self, value: int, register: int = 0, **how: Unpack[How]) -> Outcome:
        """XSETBV."""
        regs = {"rcx": register, "rax": value & 0xFFFFFFFF, "rdx": value >> 32}
        return self.execute("xsetbv", regs, **how)

    def read_cr(self, number: int, **how: Unpack[How]) -> Outcome:
        """MOV from CR0, CR2, CR3, CR4 or CR8; ``Succeed.value`` is the value."""
        return _rax(self.execute(f"read_cr{number}", {}, **how))

    def write_cr(self, number: int, value: int, **how: Unpack[How]) -> Outcome:
        """MOV to CR0, CR2, CR3, CR4 or CR8."""
        return self.execute(f"write_cr{number}", {"rax": value}, **how)

    def read_dr(self, number: int, **how: Unpack[How]) -> Outcome:
        """MOV from DR0-DR3, DR6 or DR7; ``Succeed.value`` is the value."""
        return _rax(self.execute(f"read_dr{number}", {}, **how))

    def write_dr(self, number: int, value: int, **how: Unpack[How]) -> Outcome:
        """MOV to DR0-DR3, DR6 or DR7."""
        return self.execute(f"write_dr{number}", {"rax": value}, **how)

    def inb(self, port: int, **how: Unpack[How]) -> Outcome:
        """IN AL, DX: ``HostExit`` with KVM's I/O exit."""
        return self.execute("in8", {"rdx": port}, **how)

    def outb(self, port: int, value: int, **how: Unpack[How]) -> Outcome:
        """OUT DX, AL: ``HostExit`` with KVM's I/O exit."""
        return self.execute("out8", {"rdx": port, "rax": value}, **how)


def _edx_eax(outcome: Outcome) -> Outcome:
    if isinstance(outcome, Succeed):
        low, high = outcome.regs["rax"] & 0xFFFFFFFF, outcome.regs["rdx"] & 0xFFFFFFFF
        return outcome.with_value(high << 32 | low)
    return outcome


def _rax(outcome: Outcome) -> Outcome:
    if isinstance(outcome, Succeed):
        return outcome.with_value(outcome.regs["rax"])
    return outcome
