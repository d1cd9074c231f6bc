"""What L1 did, command by command, as events for ``kvmnest trace``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from kvmnest.l1 import L1
from kvmnest.l1.command import GPRS, LIST_ENTRY, Command, Kind, Result
from kvmnest.l1.cpu import Cpu
from kvmnest.vmx import EntryCtl, Field

#: Bytes of code that are sent along: some four instructions.
_CODE = 32
_CS_LONG, _CS_DB = 1 << 13, 1 << 14


class Recorder:
    """Sends a dict for each command that a vCPU of L1 has executed.

    Of a list of VMREADs or VMWRITEs: ``op``, ``cpu`` and ``fields``, a list of [encoding, value,
    RFLAGS, baseline value or None]. Of an instruction: ``op``, ``regs`` and ``rflags`` before,
    ``status`` ("exit" after a VM exit, else "trap"), ``out`` with the registers that changed,
    ``rflags_after``, ``vector``, ``error``, ``cr2`` and ``rip`` of the trap. Before a VM entry
    ``l2`` is [address, bits, bytes of code] at L2's instruction pointer, if that is in memory.
    """

    def __init__(self, l1: L1, send: Callable[[dict[str, Any]], None]) -> None:
        self._l1 = l1
        self._send = send
        #: VMCS fields as last written or read, by region.
        self._fields: dict[int | None, dict[int, int]] = {}

    def __call__(self, cpu: Cpu, results: Sequence[Result]) -> None:
        """Take the results of ``cpu.commands``."""
        lists = any(command.kind is Kind.LIST for command in cpu.commands)
        listed = cpu.read_list(cpu.list_entries) if lists else []
        for command, result in zip(cpu.commands, results, strict=True):
            if command.kind is Kind.LIST:
                first = (command.rip - cpu.list) // LIST_ENTRY.size
                self._list(cpu, command, listed[first : first + command.frame.count])
            else:
                self._instruction(cpu, command, result)

    def _list(self, cpu: Cpu, command: Command, entries: Sequence[tuple[int, int, int]]) -> None:
        vmcs = self._l1.vmcs_of(cpu)
        baseline = vmcs.baseline if vmcs else {}
        known = self._fields.setdefault(cpu.current, {})
        known.update({field: value for field, value, _ in entries})
        fields = [[f, v, rflags, baseline.get(f)] for f, v, rflags in entries]  # type: ignore[call-overload]
        self._send({"op": command.name, "cpu": cpu.index, "fields": fields})

    def _instruction(self, cpu: Cpu, command: Command, result: Result) -> None:
        l1 = self._l1
        exited = result.status == l1.payload["STATUS_VMEXIT"]
        before = {name: command.regs.get(name, 0) for name in GPRS}
        event: dict[str, Any] = {
            "op": command.name,
            "cpu": cpu.index,
            "regs": command.regs,
            "rflags": command.rflags,
            "status": "exit" if exited else "trap",
            "done": not exited and l1.is_done(result.vector, result.rip),
            "out": {n: v for n, v in result.regs.items() if v != before[n] and n != "rsp"},
            "rflags_after": result.rflags,
            "vector": result.vector,
            "error": result.error,
            "cr2": result.cr2,
            "rip": result.rip - command.rip,
        }
        if command.operand:
            event["operand"] = command.operand.hex()
        if command.kind is Kind.ENTRY:
            event["l2"] = self._code(cpu)
        self._send(event)

    def _code(self, cpu: Cpu) -> list[Any] | None:
        known = self._fields.get(cpu.current, {})
        if Field.GUEST_RIP not in known:
            return None
        rights = known.get(Field.GUEST_CS_ACCESS_RIGHTS, 0)
        long_mode = known.get(Field.VM_ENTRY_CONTROLS, 0) & EntryCtl.IA32E_MODE_GUEST.value
        bits = 64 if long_mode and rights & _CS_LONG else 32 if rights & _CS_DB else 16
        base = 0 if bits == 64 else known.get(Field.GUEST_CS_BASE, 0)
        address = known[Field.GUEST_RIP]
        room = self._l1.payload["RAM_SIZE"] - (base + address)
        if room <= 0:
            return None
        return [address, bits, self._l1.read(base + address, min(_CODE, room)).hex()]
