"""The system instructions that L1 executes, each a method that returns an outcome."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Unpack

from kvmnest.l1.command import Command
from kvmnest.l1.execute import Executor, How
from kvmnest.vmx.outcome import Outcome, Succeed


class SystemInstructions:
    """A method for each system instruction, and ``execute`` and ``call`` for any other.

    Unless a method says otherwise it returns ``Succeed``, ``Fault``, or ``HostExit`` when KVM
    returned to userspace in the middle, and raises ``VmLost`` and ``HarnessError``.
    """

    executor: Executor

    # --- one instruction, any ---

    def execute(
        self, name: str, inputs: Mapping[str, int], operand: bytes = b"", **how: Unpack[How]
    ) -> Outcome:
        """Execute instruction ``name`` of ``payloads/insn.s`` with these registers."""
        return self.executor.execute(name, inputs, operand, how)

    def call(self, code: bytes, **how: Unpack[How]) -> Outcome:
        """Execute machine code in L1; it must not jump outside itself.

        In ``Fault``, ``rip`` is the offset from its first byte.
        """
        return self.executor.call(code, how)

    def command(
        self, name: str, inputs: Mapping[str, int], operand: bytes = b"", **how: Unpack[How]
    ) -> Command:
        """Return the command that ``execute`` would run, for a batch."""
        return self.executor.command(name, inputs, operand, how)[1]

    # --- other instructions ---

    def rdmsr(self, index: int, **how: Unpack[How]) -> Outcome:
        """RDMSR; ``Succeed.value`` is EDX:EAX."""
        return _edx_eax(self.executor.execute("rdmsr", {"rcx": index}, how=how))

    def wrmsr(self, index: int, value: int, **how: Unpack[How]) -> Outcome:
        """WRMSR."""
        regs = {"rcx": index, "rax": value & 0xFFFFFFFF, "rdx": value >> 32 & 0xFFFFFFFF}
        return self.executor.execute("wrmsr", regs, how=how)

    def cpuid(self, leaf: int, subleaf: int = 0, **how: Unpack[How]) -> Outcome:
        """CPUID; ``Succeed.value`` is (EAX, EBX, ECX, EDX)."""
        outcome = self.executor.execute("cpuid", {"rax": leaf, "rcx": subleaf}, how=how)
        if isinstance(outcome, Succeed):
            regs = outcome.regs
            value = tuple(regs[name] for name in ("rax", "rbx", "rcx", "rdx"))
            return outcome.with_value(value)
        return outcome

    def rdtsc(self, **how: Unpack[How]) -> Outcome:
        """RDTSC; ``Succeed.value`` is EDX:EAX."""
        return _edx_eax(self.executor.execute("rdtsc", {}, how=how))

    def xgetbv(self, register: int = 0, **how: Unpack[How]) -> Outcome:
        """XGETBV; ``Succeed.value`` is EDX:EAX."""
        return _edx_eax(self.executor.execute("xgetbv", {"rcx": register}, how=how))

    def xsetbv(self, value: int, register: int = 0, **how: Unpack[How]) -> Outcome:
        """XSETBV."""
        regs = {"rcx": register, "rax": value & 0xFFFFFFFF, "rdx": value >> 32}
        return self.executor.execute("xsetbv", regs, how=how)

    def read_cr(self, number: int, **how: Unpack[How]) -> Outcome:
        """MOV from CR0, CR2, CR3, CR4 or CR8; ``Succeed.value`` is the value."""
        return _rax(self.executor.execute(f"read_cr{number}", {}, how=how))

    def write_cr(self, number: int, value: int, **how: Unpack[How]) -> Outcome:
        """MOV to CR0, CR2, CR3, CR4 or CR8."""
        return self.executor.execute(f"write_cr{number}", {"rax": value}, how=how)

    def read_dr(self, number: int, **how: Unpack[How]) -> Outcome:
        """MOV from DR0-DR3, DR6 or DR7; ``Succeed.value`` is the value."""
        return _rax(self.executor.execute(f"read_dr{number}", {}, how=how))

    def write_dr(self, number: int, value: int, **how: Unpack[How]) -> Outcome:
        """MOV to DR0-DR3, DR6 or DR7."""
        return self.executor.execute(f"write_dr{number}", {"rax": value}, how=how)

    def inb(self, port: int, **how: Unpack[How]) -> Outcome:
        """IN AL, DX: ``HostExit`` with KVM's I/O exit."""
        return self.executor.execute("in8", {"rdx": port}, how=how)

    def outb(self, port: int, value: int, **how: Unpack[How]) -> Outcome:
        """OUT DX, AL: ``HostExit`` with KVM's I/O exit."""
        return self.executor.execute("out8", {"rdx": port, "rax": value}, how=how)


def _edx_eax(outcome: Outcome) -> Outcome:
    if isinstance(outcome, Succeed):
        low, high = outcome.regs["rax"] & 0xFFFFFFFF, outcome.regs["rdx"] & 0xFFFFFFFF
        return outcome.with_value(high << 32 | low)
    return outcome


def _rax(outcome: Outcome) -> Outcome:
    if isinstance(outcome, Succeed):
        return outcome.with_value(outcome.regs["rax"])
    return outcome
