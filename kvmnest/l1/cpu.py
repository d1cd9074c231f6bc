"""One vCPU of L1: commands into its slots, KVM_RUN, results out."""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from kvmnest.errors import HarnessError
from kvmnest.kvm import Vcpu, exits
from kvmnest.kvm.memory import Memory
from kvmnest.l1.budget import Budget
from kvmnest.l1.command import GPRS, LIST_ENTRY, Command, Result, frames
from kvmnest.l1.lost import VmLost
from kvmnest.l1.payload import Payload
from kvmnest.vmx import Field, VmxError
from kvmnest.vmx.numbers import enum_or_int

_SELECTORS = struct.Struct("<6H")
_TABLE = struct.Struct("<HQ")
_STATUS = struct.Struct("<I")
_QUAD = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class HostLoads:
    """Segment and descriptor-table registers as L1 found them right after the last VM exit."""

    ds: int
    es: int
    fs: int
    gs: int
    tr: int
    ldtr: int
    gdtr_limit: int
    gdtr_base: int
    idtr_limit: int
    idtr_base: int


def _packed(entries: Sequence[tuple[int, int]]) -> bytes:
    """Entries of the list page. A plain loop over one flat list: this is the hot path."""
    flat = [0] * (3 * len(entries))
    flat[0::3] = [key for key, _ in entries]
    flat[1::3] = [value & 0xFFFFFFFFFFFFFFFF for _, value in entries]
    return struct.pack(f"<{len(flat)}Q", *flat)


def packed_writes(fields: Mapping[Field, int]) -> bytes:
    """Entries that write ``fields``, for ``Cpu.put_list``."""
    return _packed([*fields.items()])


@functools.lru_cache(64)
def packed_reads(fields: tuple[int, ...]) -> bytes:
    """Entries that read ``fields``, for ``Cpu.put_list``."""
    return _packed([(field, 0) for field in fields])


@functools.cache
def _values(count: int) -> struct.Struct:
    """The values of ``count`` entries, without their fields and flags."""
    return struct.Struct("<" + "8xQ8x" * count)


class Owner(Protocol):
    """What a vCPU of L1 needs of the VM that it belongs to."""

    payload: Payload
    memory: Memory
    budget: Budget
    #: Whether ``round_trip`` goes before every KVM_RUN.
    nested_roundtrip: bool
    #: Called with the vCPU and the results of its commands after each batch.
    on_results: Callable[[Cpu, list[Result]], None] | None

    def round_trip(self) -> None:
        """Save and destroy the VM, and restore it: ``Cpu.vcpu`` is another one then."""


class Cpu:
    """vCPU ``index`` of an L1, started in the payload's command loop.

    ``vcpu`` is the KVM vCPU; after a round trip of the VM another one.
    """

    def __init__(self, owner: Owner, index: int, vcpu: Vcpu) -> None:
        self._owner = owner
        self.index = index
        self.vcpu = vcpu
        #: What its commands for the same instruction have in common.
        self.frames = frames(index)
        payload = owner.payload
        self.block = payload[f"cpu{index}_block"]
        self.slots = payload[f"cpu{index}_slots"]
        self.list = payload[f"cpu{index}_list"]
        self.list_entries = 2 * 4096 // LIST_ENTRY.size
        self._slot_size = payload["SLOT_SIZE"]
        self._slot_count = payload["SLOT_COUNT"]
        self._operand = payload["SLOT_OPERAND"]
        self._done_port = payload["PORT_DONE"]
        self._running = payload["STATUS_RUNNING"]
        self._count = self.block + payload["CPU_COUNT"]
        self._slots_pointer = self.block + payload["CPU_SLOTS"]
        self._memory = owner.memory.map
        self.status_vmexit = payload["STATUS_VMEXIT"]
        self.status_list_done = payload["STATUS_LIST_DONE"]
        self.power_on()

    def power_on(self) -> None:
        """Forget all commands; the command loop starts at the first slot again."""
        self.commands: Sequence[Command] = ()
        #: True while a command waits for ``resume`` after an exit to userspace.
        self.suspended = False
        #: Address of the region that this vCPU's VMPTRLD made current.
        self.current: int | None = None
        _QUAD.pack_into(self._memory, self._slots_pointer, self.slots)

    def __repr__(self) -> str:
        return f"<vCPU {self.index} of L1>"

    def operand_address(self, slot: int = 0) -> int:
        """Linear address of the 64 bytes for memory operands in a command slot."""
        return self.slots + slot * self._slot_size + self._operand

    def submit(self, commands: Sequence[Command]) -> list[Result] | exits.Exit:
        """Run commands in one go; their results, or the KVM exit that came in between.

        Raises:
            VmLost: the vCPU shut down, failed or did not come back within the budget.
            HarnessError: too many commands, or an earlier command is still suspended.
        """
        if self.suspended:
            raise HarnessError(f"{self.commands[0].name} is suspended: call resume() first")
        count = len(commands)
        if count > self._slot_count:
            raise HarnessError(f"{count} commands, a batch holds {self._slot_count}")
        memory = self._memory
        address = self.slots
        for command in commands:
            command.pack_into(memory, address)
            address += self._slot_size
        _QUAD.pack_into(memory, self._count, count)
        self.commands = commands
        return self._run()

    def resume(self) -> list[Result] | exits.Exit:
        """Go on with commands that an exit to userspace had suspended."""
        if not self.suspended:
            raise HarnessError("nothing is suspended")
        return self._run()

    def _run(self) -> list[Result] | exits.Exit:
        owner = self._owner
        if owner.nested_roundtrip:
            # The time that a round trip takes is no time of the guest.
            owner.budget.stop()
            owner.round_trip()
        owner.budget.start()
        self.suspended = True
        while True:
            seen = self.vcpu.run_to_port(self._done_port)
            if seen is None:
                break
            if isinstance(seen, exits.IntrExit):
                if owner.budget.used_up:
                    raise self.lost("hang", "the case's budget is used up")
                continue
            if isinstance(seen, exits.ShutdownExit):
                raise self.lost("triple fault", "KVM_EXIT_SHUTDOWN")
            if isinstance(seen, exits.InternalErrorExit):
                raise self.lost("internal error", repr(seen))
            if isinstance(seen, exits.FailEntryExit):
                raise self.lost("failed entry", repr(seen))
            return seen
        self.suspended = False
        end = len(self.commands) * self._slot_size
        raw = self._memory[self.slots : self.slots + end]
        if end == self._slot_size:
            results = [Result(raw, 0)]
        else:
            results = [Result(raw, at) for at in range(0, end, self._slot_size)]
        if owner.on_results is not None:
            owner.on_results(self, results)
        return results

    def lost(self, kind: str, detail: str) -> VmLost:
        """Describe the end of this vCPU, with its registers and the command it was in."""
        regs, sregs = self.vcpu.get_regs(), self.vcpu.get_sregs()
        registers = {"rip": regs.rip, "rflags": regs.rflags}
        registers |= {name: getattr(regs, name) for name in GPRS}
        registers |= {"cr0": sregs.cr0, "cr2": sregs.cr2, "cr3": sregs.cr3, "cr4": sregs.cr4}
        registers |= {"efer": sregs.efer, "cs": sregs.cs.selector}
        return VmLost(kind, detail, self.running(), registers)

    def running(self) -> str:
        """Name of the command that is running or ran last."""
        name = ""
        for slot, command in enumerate(self.commands):
            (status,) = _STATUS.unpack_from(self._memory, self.slots + slot * self._slot_size + 4)
            if status:
                name = command.name
            if status == self._running:
                break
        return name

    def host_loads(self, slot: int = 0) -> HostLoads:
        """Return what the last VM exit loaded, as recorded by the payload at HOST_RIP."""
        view, payload = self._memory, self._owner.payload
        address = self.slots + slot * self._slot_size
        return HostLoads(
            *_SELECTORS.unpack_from(view, address + payload["OUT_SELECTORS"]),
            *_TABLE.unpack_from(view, address + payload["OUT_GDTR"]),
            *_TABLE.unpack_from(view, address + payload["OUT_IDTR"]),
        )

    def vmread(self, fields: tuple[int, ...]) -> list[tuple[int, int, int]]:
        """VMREAD several fields in one KVM_RUN: (field, value, RFLAGS) of each."""
        self.submit([self.vmread_command(fields)])
        return self.read_list(len(fields))

    def instruction_error(self) -> int:
        """Read the VM-instruction error field of the current VMCS."""
        ((_, value, _),) = self.vmread((Field.VM_INSTRUCTION_ERROR,))
        return enum_or_int(VmxError, value)

    def write_list(self, op: str, entries: Sequence[tuple[int, int]]) -> Command:
        """Put (field, value) pairs into the list page; the command that works through them."""
        return self.put_list(op, _packed(entries))

    def vmread_command(self, fields: tuple[int, ...]) -> Command:
        """Put fields to be read into the list page; ``read_list`` has their values afterwards."""
        return self.put_list("OP_VMREAD_LIST", packed_reads(fields))

    def put_list(self, op: str, packed: bytes) -> Command:
        """Put packed entries into the list page; the command that works through them."""
        count = len(packed) // LIST_ENTRY.size
        if count > self.list_entries:
            raise HarnessError(f"{count} entries, a list holds {self.list_entries}")
        self._memory[self.list : self.list + len(packed)] = packed
        return self.list_command(op, 0, count)

    def list_command(self, op: str, first: int, count: int) -> Command:
        """Return the command that works through ``count`` entries of the list page from ``first``.

        ``op`` is OP_VMREAD_LIST or OP_VMWRITE_LIST.
        """
        return self.frames.list(op, self.list + first * LIST_ENTRY.size, count)

    def list_flags(self, count: int) -> tuple[int, ...]:
        """RFLAGS after each of the first ``count`` entries of the list page."""
        return struct.unpack_from(f"<{3 * count}Q", self._memory, self.list)[2::3]

    def list_values(self, count: int) -> tuple[int, ...]:
        """Values of the first ``count`` entries of the list page."""
        return _values(count).unpack_from(self._memory, self.list)

    def read_list(self, count: int) -> list[tuple[int, int, int]]:
        """Return the first ``count`` entries of the list page: key, value, RFLAGS."""
        end = self.list + count * LIST_ENTRY.size
        return list(LIST_ENTRY.iter_unpack(self._memory[self.list : end]))
