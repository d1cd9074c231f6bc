"""The VMX instructions that L1 executes, each a method that returns an outcome."""

from __future__ import annotations

import struct
from typing import Unpack

from kvmnest.errors import HarnessError
from kvmnest.kvm.exits import Exit as KvmExit
from kvmnest.l1.command import Command, Kind, Mode, Result
from kvmnest.l1.cpu import Cpu, packed_reads
from kvmnest.l1.execute import Executor, How
from kvmnest.l1.vmcs import Vmcs
from kvmnest.vmx import ExitReason, Field, Rflags, VmxError
from kvmnest.vmx.numbers import enum_or_int
from kvmnest.vmx.outcome import (
    EntryFailure,
    Exit,
    HostExit,
    Outcome,
    Succeed,
    VMfailInvalid,
    VMfailValid,
    WrongFlags,
)
from kvmnest.vmx.reasons import EXIT_REASON_ENTRY_FAILURE
from kvmnest.vmx.registers import STATUS_FLAGS

#: Plain integers: this is the hot path, and flag enumerations are slow.
_CF, _ZF = int(Rflags.CF), int(Rflags.ZF)

#: Read after each VM exit; VM_INSTRUCTION_ERROR comes first, since a VMREAD that fails changes it.
#: From EXIT_QUALIFICATION on in the order of the parts of ``Exit``.
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
_EXIT_LIST = packed_reads(_EXIT_FIELDS)


class VmxInstructions:
    """A method for each VMX instruction, and the VMCSs that they work on.

    Each returns ``Succeed``, ``VMfailInvalid``, ``VMfailValid``, ``Fault``, or ``HostExit`` when
    KVM returned to userspace in the middle, and raises ``VmLost`` and ``HarnessError``.
    """

    executor: Executor
    #: VMCSs that have a baseline, by region address.
    vmcss: dict[int, Vmcs]

    # --- VMCSs ---

    def vmcs_of(self, cpu: Cpu) -> Vmcs | None:
        """The current VMCS of a vCPU, if it was made by ``load_vmcs``."""
        return self.vmcss.get(cpu.current) if cpu.current is not None else None

    @property
    def vmcs(self) -> Vmcs:
        """The current VMCS of the first vCPU; HarnessError when there is none."""
        vmcs = self.vmcs_of(self.executor.machine.cpu)
        if vmcs is None:
            raise HarnessError("no VMCS is current")
        return vmcs

    @property
    def current(self) -> int | None:
        """Address of the region that is the first vCPU's current VMCS."""
        return self.executor.machine.cpu.current

    def vmcs_diff(self) -> list[tuple[Field, int | None, int]]:
        """Fields of the current VMCS that differ from the baseline: (field, baseline, now)."""
        cpus = self.executor.machine.cpus
        vmcs = self.vmcs_of(cpus[0]) if cpus else None
        return vmcs.diff() if vmcs else []

    def prepare_region(self, address: int, revision: int | None = None) -> int:
        """Write the VMCS revision identifier into a region and return its address."""
        machine = self.executor.machine
        if revision is None:
            revision = machine.caps.basic.revision_id if machine.has_vmx else 0
        machine.write_int(address, revision, 4)
        return address

    def vmread_list(self, cpu: Cpu, fields: tuple[int, ...]) -> list[tuple[int, int, int]]:
        """VMREAD several fields in one KVM_RUN: (field, value, RFLAGS) of each."""
        return cpu.vmread(fields)

    # --- instructions ---

    def _vmx(
        self, name: str, inputs: dict[str, int], operand: bytes = b"", **how: Unpack[How]
    ) -> Outcome:
        """Execute a VMX instruction and judge its flags (SDM, "Conventions")."""
        executor = self.executor
        cpu, command = executor.command(name, inputs, operand, how)
        seen = cpu.submit((command,))
        if not isinstance(seen, list):
            return executor.note(command, HostExit(seen))
        return executor.note(command, self._judge(cpu, command, seen[0]))

    def _judge(self, cpu: Cpu, command: Command, result: Result) -> Outcome:
        if not self.executor.machine.is_done(result.vector, result.rip):
            return self.executor.fault(command, result)
        flags = result.rflags & STATUS_FLAGS
        if flags == 0:
            return Succeed.made(result)
        if flags == _CF:
            return VMfailInvalid.made(result)
        if flags == _ZF:
            return VMfailValid.made(result, error=cpu.instruction_error())
        return WrongFlags(flags)

    def vmxon(self, address: int | None = None, **how: Unpack[How]) -> Outcome:
        """VMXON; ``address`` is the VMXON region's physical address (default: a prepared one)."""
        if address is None:
            address = self.prepare_region(self.executor.machine.sym("vmxon_region"))
        return self._vmx("vmxon", {}, struct.pack("<Q", address), **how)

    def vmxoff(self, **how: Unpack[How]) -> Outcome:
        """VMXOFF."""
        outcome = self._vmx("vmxoff", {}, **how)
        if isinstance(outcome, Succeed):
            how.get("cpu", self.executor.machine.cpu).current = None
        return outcome

    def vmclear(self, address: int, **how: Unpack[How]) -> Outcome:
        """VMCLEAR of the region at physical ``address``."""
        cpu = how.get("cpu", self.executor.machine.cpu)
        outcome = self._vmx("vmclear", {}, struct.pack("<Q", address), **how)
        if isinstance(outcome, Succeed) and address == cpu.current:
            cpu.current = None
        return outcome

    def vmptrld(self, address: int, **how: Unpack[How]) -> Outcome:
        """VMPTRLD of the region at physical ``address``."""
        outcome = self._vmx("vmptrld", {}, struct.pack("<Q", address), **how)
        if isinstance(outcome, Succeed):
            how.get("cpu", self.executor.machine.cpu).current = address
        return outcome

    def vmptrst(self, **how: Unpack[How]) -> Outcome:
        """VMPTRST; ``Succeed.value`` is the current-VMCS pointer."""
        at = how.get("at", how.get("cpu", self.executor.machine.cpu).operand_address())
        outcome = self._vmx("vmptrst", {}, b"\xa5" * 16 if "at" not in how else b"", **how)
        if isinstance(outcome, Succeed) and at < self.executor.machine.payload["RAM_SIZE"]:
            return outcome.with_value(self.executor.machine.read_int(at))
        return outcome

    def vmread(self, field: int, *, memory: bool = False, **how: Unpack[How]) -> Outcome:
        """VMREAD to a register, or with ``memory`` to memory; ``Succeed.value`` is the value."""
        memory = memory or how.get("via_ss", False) or "at" in how
        name = "vmread" if how.get("via_ss") or not memory else "vmread_mem"
        outcome = self._vmx(name, {"rax": field, "rdx": 0xA5A5A5A5A5A5A5A5}, **how)
        if not isinstance(outcome, Succeed):
            return outcome
        if not memory:
            return outcome.with_value(outcome.regs["rdx"])
        at = how.get("at", how.get("cpu", self.executor.machine.cpu).operand_address())
        size = 8 if how.get("mode", Mode.LONG) is Mode.LONG else 4
        return outcome.with_value(self.executor.machine.read_int(at, size))

    def vmwrite(
        self, field: int, value: int, *, memory: bool = False, **how: Unpack[How]
    ) -> Outcome:
        """VMWRITE from a register, or with ``memory`` from memory."""
        memory = memory or how.get("via_ss", False) or "at" in how
        name = "vmwrite" if how.get("via_ss") or not memory else "vmwrite_mem"
        operand = struct.pack("<Q", value & 0xFFFFFFFFFFFFFFFF) if "at" not in how else b""
        outcome = self._vmx(name, {"rax": field, "rdx": value}, operand, **how)
        vmcs = self.vmcs_of(how.get("cpu", self.executor.machine.cpu))
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
        cpu, command = self.executor.command(name, {}, b"", how)
        vmcs = self.vmcs_of(cpu)
        if vmcs is not None:
            vmcs.flush(cpu)
        reads = cpu.put_list("OP_VMREAD_LIST", _EXIT_LIST)
        return self.executor.note(command, self._entered(cpu, cpu.submit((command, reads))))

    def resume(self, cpu: Cpu | None = None) -> Outcome:
        """Go on after a ``HostExit`` and return what becomes of the suspended instruction."""
        cpu = cpu or self.executor.machine.cpu
        seen = cpu.resume()
        command = cpu.commands[0]
        if command.kind is Kind.ENTRY:
            return self.executor.note(command, self._entered(cpu, seen))
        return self.executor.note(command, self.executor.judge(command, seen))

    def _entered(self, cpu: Cpu, seen: list[Result] | KvmExit) -> Outcome:
        if not isinstance(seen, list):
            return HostExit(seen)
        result = seen[0]
        values = cpu.list_values(len(_EXIT_FIELDS))
        if result.status != cpu.status_vmexit:
            flags = result.rflags & STATUS_FLAGS
            if flags == _ZF and self.executor.machine.is_done(result.vector, result.rip):
                return VMfailValid.made(result, error=enum_or_int(VmxError, values[0]))
            return self._judge(cpu, cpu.commands[0], result)
        reason = values[1]
        if reason & EXIT_REASON_ENTRY_FAILURE:
            basic = enum_or_int(ExitReason, reason & ~EXIT_REASON_ENTRY_FAILURE)
            return EntryFailure.made(result, reason=basic, qualification=values[2])
        return Exit.read(result, enum_or_int(ExitReason, reason), values[2:])
