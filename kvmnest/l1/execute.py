"""Executing one instruction in L1, any, and the system instructions as methods."""

from __future__ import annotations

import enum
from typing import Any, TypedDict, Unpack

from kvmnest.errors import HarnessError
from kvmnest.l1.cpu import DEFAULT_RFLAGS, Command, Cpu, Mode, Result
from kvmnest.l1.machine import Machine
from kvmnest.vmx import Vector
from kvmnest.vmx.outcome import Fault, HostExit, Outcome, Succeed


class Shadow(enum.Enum):
    """What precedes the instruction by one: nothing, MOV to SS, or STI."""

    NONE = ""
    MOV_SS = "_movss"
    STI = "_sti"


class How(TypedDict, total=False):
    """How L1 executes an instruction.

    cpu: vCPU (default the first). cpl: 0 or 3. mode: code segment. shadow: blocking by MOV SS
    or by STI. rflags: before the instruction (default: all six status flags set). at: linear
    address of the memory operand, used as it is, instead of a place that kvmnest fills.
    via_ss: address memory through SS. regs: general registers before the instruction.
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


class SystemInstructions(Machine):
    """A machine that executes instructions; the VMX ones are in ``Instructions``.

    Unless a method says otherwise it returns ``Succeed``, ``Fault``, or ``HostExit`` when KVM
    returned to userspace in the middle, and raises ``VmLost`` and ``HarnessError``.
    """

    # --- one instruction, any ---

    def execute(
        self, name: str, inputs: dict[str, int], operand: bytes = b"", **how: Unpack[How]
    ) -> Outcome:
        """Execute instruction ``name`` of ``payloads/insn.s`` with these registers."""
        command = self.command(name, inputs, operand, **how)
        return self._finish(how.get("cpu", self.cpu), command)

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
        command = self.command("nop", how.get("regs", {}), b"", **how)
        command.rip, command.name = address, f"code {code.hex()}"
        return self._finish(cpu, command)

    def command(
        self, name: str, inputs: dict[str, int], operand: bytes = b"", **how: Unpack[How]
    ) -> Command:
        """Return the command that ``execute`` would run, for a batch."""
        cpl, mode = how.get("cpl", 0), how.get("mode", Mode.LONG)
        shadow = how.get("shadow", Shadow.NONE)
        via_ss = how.get("via_ss", False)
        symbols = self.payload
        prefix = "insn_" if mode is Mode.LONG else "insn32_"
        label = f"{prefix}{name}{'_ss' if via_ss else ''}{shadow.value}"
        code = {
            (0, Mode.LONG): "SEL_CODE64",
            (3, Mode.LONG): "SEL_USER_CODE64",
            (0, Mode.COMPAT): "SEL_CODE32",
            (3, Mode.COMPAT): "SEL_USER_CODE32",
        }[cpl, mode]
        data = symbols["SEL_USER_DATA" if cpl == 3 else "SEL_DATA"]
        cpu = how.get("cpu", self.cpu)
        at = how.get("at", cpu.operand_address())
        registers = {"rbp" if via_ss else "rdi": at, **inputs, **how.get("regs", {})}
        return Command(
            op=symbols["OP_EXECUTE"],
            rip=symbols[label],
            name=name + shadow.value,
            cs=symbols[code],
            rflags=how.get("rflags", DEFAULT_RFLAGS),
            rsp=how.get("rsp", symbols["snippet_stack_top"] - 2048 * cpu.index),
            ss=data,
            ds=symbols["SEL_USER_DATA"],
            regs=registers,
            operand=operand,
        )

    def _finish(self, cpu: Cpu, command: Command) -> Outcome:
        seen = cpu.submit([command])
        return self._note(command, self._plain(command, seen))

    def _plain(self, command: Command, seen: Any) -> Outcome:
        if not isinstance(seen, list):
            return HostExit(seen)
        result: Result = seen[0]
        fault = self._fault(command, result)
        return fault or Succeed(regs=result.regs, rflags=result.rflags)

    def _fault(self, command: Command, result: Result) -> Fault | None:
        if self.is_done(result.vector, result.rip):
            return None
        return Fault(
            vector=known(Vector, result.vector),
            error_code=result.error,
            cr2=result.cr2,
            rip=result.rip - command.rip,
            regs=result.regs,
            rflags=result.rflags,
        )

    def _note(self, command: Command, outcome: Outcome) -> Outcome:
        regs = " ".join(f"{name}={value:#x}" for name, value in command.regs.items())
        self.log.append((f"{command.name} {regs}", outcome))
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
            return Succeed(value, regs, outcome.rflags)
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
        return Succeed(high << 32 | low, outcome.regs, outcome.rflags)
    return outcome


def _rax(outcome: Outcome) -> Outcome:
    if isinstance(outcome, Succeed):
        return Succeed(outcome.regs["rax"], outcome.regs, outcome.rflags)
    return outcome


def known(kind: type[enum.IntEnum], number: int) -> int:
    """Return the member of an enumeration, or the bare number where it has none."""
    return kind(number) if number in kind._value2member_map_ else number
