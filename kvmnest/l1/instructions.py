"""The instructions that L1 executes, each a method that returns an outcome."""

from __future__ import annotations

import enum
import struct
from typing import Any, TypedDict, Unpack

from kvmnest.errors import HarnessError
from kvmnest.l1.cpu import DEFAULT_RFLAGS, Command, Cpu, Mode, Result
from kvmnest.l1.machine import Machine
from kvmnest.vmx import ExitReason, Field, Rflags, Vector, VmxError
from kvmnest.vmx.outcome import (
    EntryFailure,
    Exit,
    Fault,
    HostExit,
    Outcome,
    Succeed,
    VMfailInvalid,
    VMfailValid,
    WrongFlags,
)
from kvmnest.vmx.reasons import EXIT_REASON_ENTRY_FAILURE

#: Plain integers: this is the hot path, and flag enumerations are slow.
_CF, _ZF = int(Rflags.CF), int(Rflags.ZF)
_STATUS_FLAGS = int(Rflags.CF | Rflags.PF | Rflags.AF | Rflags.ZF | Rflags.SF | Rflags.OF)

#: Read after each VM exit; VM_INSTRUCTION_ERROR comes first, since a VMREAD that fails changes it.
_EXIT_FIELDS = (
    Field.VM_INSTRUCTION_ERROR,
    Field.VM_EXIT_REASON,
    Field.EXIT_QUALIFICATION,
    Field.GUEST_RIP,
    Field.VM_EXIT_INSTRUCTION_LEN,
    Field.VM_EXIT_INTR_INFO,
    Field.VM_EXIT_INTR_ERROR_CODE,
    Field.IDT_VECTORING_INFO_FIELD,
    Field.IDT_VECTORING_ERROR_CODE,
    Field.VMX_INSTRUCTION_INFO,
    Field.GUEST_LINEAR_ADDRESS,
    Field.GUEST_PHYSICAL_ADDRESS,
)


_EXIT_NAMES: tuple[str, ...] = (
    *("qualification", "rip", "length", "intr_info", "intr_error"),
    *("idt_info", "idt_error", "info", "linear", "physical"),
)


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


class Instructions(Machine):
    """A machine with a method for each instruction.

    Unless a method says otherwise it returns ``Succeed``, ``Fault``, or ``HostExit`` when KVM
    returned to userspace in the middle, and raises ``VmLost`` and ``HarnessError``.
    """

    # --- one instruction, any ---

    def execute(
        self, name: str, inputs: dict[str, int], operand: bytes = b"", **how: Unpack[How]
    ) -> Outcome:
        """Execute instruction ``name`` of ``payloads/insn.s`` with these registers."""
        command = self._command(name, inputs, operand, **how)
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
        command = self._command("nop", how.get("regs", {}), b"", **how)
        command.rip, command.name = address, f"code {code.hex()}"
        return self._finish(cpu, command)

    def _command(
        self, name: str, inputs: dict[str, int], operand: bytes = b"", **how: Unpack[How]
    ) -> Command:
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
            vector=_known(Vector, result.vector),
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

    # --- VMX instructions ---

    def _vmx(
        self, name: str, inputs: dict[str, int], operand: bytes = b"", **how: Unpack[How]
    ) -> Outcome:
        """Execute a VMX instruction and judge its flags (SDM, "Conventions")."""
        cpu = how.get("cpu", self.cpu)
        command = self._command(name, inputs, operand, **how)
        seen = cpu.submit([command])
        if not isinstance(seen, list):
            return self._note(command, HostExit(seen))
        return self._note(command, self._judge(cpu, command, seen[0]))

    def _judge(self, cpu: Cpu, command: Command, result: Result) -> Outcome:
        fault = self._fault(command, result)
        if fault:
            return fault
        flags = result.rflags & _STATUS_FLAGS
        if flags == 0:
            return Succeed(regs=result.regs, rflags=result.rflags)
        if flags == _CF:
            return VMfailInvalid(rflags=result.rflags)
        if flags == _ZF:
            return VMfailValid(self.instruction_error(cpu), rflags=result.rflags)
        return WrongFlags(flags)

    def instruction_error(self, cpu: Cpu) -> int:
        """Read the VM-instruction error field of the current VMCS."""
        ((_, value, _),) = self.vmread_list(cpu, (Field.VM_INSTRUCTION_ERROR,))
        return _known(VmxError, value)

    def vmread_list(self, cpu: Cpu, fields: tuple[int, ...]) -> list[tuple[int, int, int]]:
        """VMREAD several fields in one KVM_RUN: (field, value, RFLAGS) of each."""
        cpu.submit([cpu.write_list("OP_VMREAD_LIST", [(field, 0) for field in fields])])
        return cpu.read_list(len(fields))

    def vmxon(self, address: int | None = None, **how: Unpack[How]) -> Outcome:
        """VMXON; ``address`` is the VMXON region's physical address (default: a prepared one)."""
        if address is None:
            address = self.prepare_region(self.sym("vmxon_region"))
        return self._vmx("vmxon", {}, struct.pack("<Q", address), **how)

    def vmxoff(self, **how: Unpack[How]) -> Outcome:
        """VMXOFF."""
        outcome = self._vmx("vmxoff", {}, **how)
        if isinstance(outcome, Succeed):
            how.get("cpu", self.cpu).current = None
        return outcome

    def vmclear(self, address: int, **how: Unpack[How]) -> Outcome:
        """VMCLEAR of the region at physical ``address``."""
        cpu = how.get("cpu", self.cpu)
        outcome = self._vmx("vmclear", {}, struct.pack("<Q", address), **how)
        if isinstance(outcome, Succeed) and address == cpu.current:
            cpu.current = None
        return outcome

    def vmptrld(self, address: int, **how: Unpack[How]) -> Outcome:
        """VMPTRLD of the region at physical ``address``."""
        outcome = self._vmx("vmptrld", {}, struct.pack("<Q", address), **how)
        if isinstance(outcome, Succeed):
            how.get("cpu", self.cpu).current = address
        return outcome

    def vmptrst(self, **how: Unpack[How]) -> Outcome:
        """VMPTRST; ``Succeed.value`` is the current-VMCS pointer."""
        at = how.get("at", how.get("cpu", self.cpu).operand_address())
        outcome = self._vmx("vmptrst", {}, b"\xa5" * 16 if "at" not in how else b"", **how)
        if isinstance(outcome, Succeed) and at < self.payload["RAM_SIZE"]:
            return Succeed(self.read_int(at), outcome.regs, outcome.rflags)
        return outcome

    def vmread(self, field: int, *, memory: bool = False, **how: Unpack[How]) -> Outcome:
        """VMREAD to a register, or with ``memory`` to memory; ``Succeed.value`` is the value."""
        memory = memory or how.get("via_ss", False) or "at" in how
        name = "vmread" if how.get("via_ss") or not memory else "vmread_mem"
        outcome = self._vmx(name, {"rax": field, "rdx": 0xA5A5A5A5A5A5A5A5}, **how)
        if not isinstance(outcome, Succeed):
            return outcome
        value = outcome.regs["rdx"]
        if memory:
            at = how.get("at", how.get("cpu", self.cpu).operand_address())
            value = self.read_int(at, 8 if how.get("mode", Mode.LONG) is Mode.LONG else 4)
        return Succeed(value, outcome.regs, outcome.rflags)

    def vmwrite(
        self, field: int, value: int, *, memory: bool = False, **how: Unpack[How]
    ) -> Outcome:
        """VMWRITE from a register, or with ``memory`` from memory."""
        memory = memory or how.get("via_ss", False) or "at" in how
        name = "vmwrite" if how.get("via_ss") or not memory else "vmwrite_mem"
        operand = struct.pack("<Q", value & 0xFFFFFFFFFFFFFFFF) if "at" not in how else b""
        outcome = self._vmx(name, {"rax": field, "rdx": value}, operand, **how)
        vmcs = how.get("cpu", self.cpu).vmcs
        if isinstance(outcome, Succeed) and vmcs is not None:
            vmcs.note_write(field, value)
        return outcome

    def vmcall(self, **how: Unpack[How]) -> Outcome:
        """VMCALL in L1: outside VMX operation a hypercall to KVM, in VMX root operation error 1."""
        return self._vmx("vmcall", {}, **how)

    def vmfunc(self, **how: Unpack[How]) -> Outcome:
        """VMFUNC in L1: #UD in VMX root operation."""
        return self._vmx("vmfunc", {}, **how)

    def invept(self, kind: int, eptp: int = 0, rest: int = 0, **how: Unpack[How]) -> Outcome:
        """INVEPT with type ``kind`` and the descriptor (EPTP, upper 64 bits)."""
        return self._vmx("invept", {"rax": kind}, struct.pack("<QQ", eptp, rest), **how)

    def invvpid(self, kind: int, vpid: int = 0, linear: int = 0, **how: Unpack[How]) -> Outcome:
        """INVVPID with type ``kind``; ``vpid`` is the descriptor's whole first 64 bits."""
        return self._vmx("invvpid", {"rax": kind}, struct.pack("<QQ", vpid, linear), **how)

    def vmlaunch(self, **how: Unpack[How]) -> Outcome:
        """VMLAUNCH; ``regs`` are L2's registers. ``Exit`` or ``EntryFailure`` when L2 was entered.

        Changes to ``vmcs`` that were not yet written are written first.
        """
        return self._enter("vmlaunch", **how)

    def vmresume(self, **how: Unpack[How]) -> Outcome:
        """VMRESUME; see ``vmlaunch``."""
        return self._enter("vmresume", **how)

    def _enter(self, name: str, **how: Unpack[How]) -> Outcome:
        cpu = how.get("cpu", self.cpu)
        if cpu.vmcs is not None:
            cpu.vmcs.flush(cpu)
        command = self._command(name, {}, **how)
        if "at" not in how:
            command.regs = dict(how.get("regs", {}))
        command.cr2 = command.regs.pop("cr2", 0)
        reads = cpu.write_list("OP_VMREAD_LIST", [(field, 0) for field in _EXIT_FIELDS])
        return self._note(command, self._entered(cpu, cpu.submit([command, reads])))

    def resume(self, cpu: Cpu | None = None) -> Outcome:
        """Go on after a ``HostExit`` and return what becomes of the suspended instruction."""
        cpu = cpu or self.cpu
        command = cpu.commands[0]
        seen = cpu.resume()
        if len(cpu.commands) == 2:
            return self._note(command, self._entered(cpu, seen))
        return self._note(command, self._plain(command, seen))

    def _entered(self, cpu: Cpu, seen: Any) -> Outcome:
        if not isinstance(seen, list):
            return HostExit(seen)
        result: Result = seen[0]
        values = [value for _, value, _ in cpu.read_list(len(_EXIT_FIELDS))]
        if result.status != self.payload["STATUS_VMEXIT"]:
            flags = result.rflags & _STATUS_FLAGS
            if self.is_done(result.vector, result.rip) and flags == _ZF:
                return VMfailValid(_known(VmxError, values[0]), rflags=result.rflags)
            return self._judge(cpu, cpu.commands[0], result)
        reason = values[1]
        if reason & EXIT_REASON_ENTRY_FAILURE:
            basic = reason & ~EXIT_REASON_ENTRY_FAILURE
            return EntryFailure(_known(ExitReason, basic), values[2], regs=result.regs)
        return Exit(
            _known(ExitReason, reason),
            **dict(zip(_EXIT_NAMES, values[2:], strict=True)),
            regs=result.regs,
            cr2=result.cr2,
        )

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


def _known(kind: type[enum.IntEnum], number: int) -> int:
    """Return the member of an enumeration, or the bare number where it has none."""
    return kind(number) if number in kind._value2member_map_ else number
