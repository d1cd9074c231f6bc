"""One vCPU of L1: commands into its slots, KVM_RUN, results out."""

from __future__ import annotations

import enum
import functools
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kvmnest.errors import HarnessError, PayloadError
from kvmnest.kvm import exits
from kvmnest.l1.lost import VmLost
from kvmnest.l1.payload import Payload

if TYPE_CHECKING:
    from kvmnest.l1.machine import Machine
    from kvmnest.l1.vmcs import Vmcs

#: General registers in the order of their encoding, which is the order of the slots.
GPRS = (
    *("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi"),
    *("r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"),
)
_INDEX = {name: index for index, name in enumerate(GPRS)}

_IN = struct.Struct("<II7Q16Q")
_OUT = struct.Struct("<8Q16Q")
_SELECTORS = struct.Struct("<6H")
_TABLE = struct.Struct("<HQ")
_STATUS = struct.Struct("<I")
_QUAD = struct.Struct("<Q")
LIST_ENTRY = struct.Struct("<QQQ")

#: RFLAGS with all six status flags set (CF, PF, AF, ZF, SF, OF): an instruction that should
#: clear one and does not is noticed.
ALL_STATUS_FLAGS = 0x8D5
DEFAULT_RFLAGS = 0x2 | ALL_STATUS_FLAGS


class Mode(enum.Enum):
    """Code segment in which L1 executes an instruction."""

    LONG = "64-bit mode"
    COMPAT = "compatibility mode"


@dataclass(slots=True)
class Command:
    """One entry of the command page; see ``payloads/abi.inc`` for the meaning of each part."""

    op: int
    rip: int
    name: str
    cs: int = 0
    rflags: int = DEFAULT_RFLAGS
    rsp: int = 0
    ss: int = 0
    ds: int = 0
    cr2: int = 0
    regs: dict[str, int] = field(default_factory=dict)
    operand: bytes = b""


@dataclass(slots=True)
class Result:
    """What the payload recorded for one command."""

    status: int
    regs: dict[str, int]
    rip: int
    cs: int
    rflags: int
    rsp: int
    ss: int
    vector: int
    error: int
    cr2: int


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


def check_layout(payload: Payload) -> None:
    """Check that the packed formats above are the payload's layout; PayloadError if not."""
    symbols = payload.symbols
    order = ("OP", "STATUS", "RIP", "CS", "RFLAGS", "RSP", "SS", "DS", "CR2", "GPR")
    offsets = [0, 4, 8, 16, 24, 32, 40, 48, 56, 64]
    outs = ("RIP", "CS", "RFLAGS", "RSP", "SS", "VECTOR", "ERROR", "CR2", "GPR")
    out = symbols["SLOT_OUT"]
    right = (
        [symbols[f"SLOT_{name}"] for name in order] == offsets
        and [symbols[f"OUT_{name}"] for name in outs] == [out + 8 * i for i in range(9)]
        and symbols["LIST_ENTRY_SIZE"] == LIST_ENTRY.size
    )
    if not right:
        raise PayloadError("the payload's command slots differ from kvmnest/l1/cpu.py")


def _packed(entries: Sequence[tuple[int, int]]) -> bytes:
    """Entries of the list page. A plain loop over one flat list: this is the hot path."""
    flat = [0] * (3 * len(entries))
    flat[0::3] = [key for key, _ in entries]
    flat[1::3] = [value & 0xFFFFFFFFFFFFFFFF for _, value in entries]
    return struct.pack(f"<{len(flat)}Q", *flat)


@functools.lru_cache(64)
def _packed_reads(fields: tuple[int, ...]) -> bytes:
    return _packed([(field, 0) for field in fields])


class Cpu:
    """vCPU ``index`` of an L1, started in the payload's command loop."""

    def __init__(self, l1: Machine, index: int) -> None:
        self.l1 = l1
        self.index = index
        payload = l1.payload
        self.block = payload[f"cpu{index}_block"]
        self.slots = payload[f"cpu{index}_slots"]
        self.list = payload[f"cpu{index}_list"]
        self.list_entries = 2 * 4096 // LIST_ENTRY.size
        self._slot_size = payload["SLOT_SIZE"]
        self._slot_count = payload["SLOT_COUNT"]
        self._operand = payload["SLOT_OPERAND"]
        self._out = payload["SLOT_OUT"]
        self._done_port = payload["PORT_DONE"]
        self._running = payload["STATUS_RUNNING"]
        self._count = self.block + payload["CPU_COUNT"]
        self.commands: Sequence[Command] = ()
        #: True while a command waits for ``resume`` after an exit to userspace.
        self.suspended = False
        #: Address of the region that this vCPU's VMPTRLD made current.
        self.current: int | None = None
        view = l1.memory.view
        _QUAD.pack_into(view, self.block + payload["CPU_SLOTS"], self.slots)

    @property
    def vcpu(self) -> Any:
        """The KVM vCPU; a new object after a round trip of the VM."""
        return self.l1._vcpus[self.index]

    @property
    def vmcs(self) -> Vmcs | None:
        """The current VMCS, if it was made by ``load_vmcs``."""
        return self.l1.vmcss.get(self.current) if self.current is not None else None

    def operand_address(self, slot: int = 0) -> int:
        """Linear address of the 64 bytes for memory operands in a command slot."""
        return self.slots + slot * self._slot_size + self._operand

    def submit(self, commands: Sequence[Command]) -> list[Result] | Any:
        """Run commands in one go; their results, or the KVM exit that came in between.

        Raises:
            VmLost: the vCPU shut down, failed or did not come back within the budget.
            HarnessError: too many commands, or an earlier command is still suspended.
        """
        if self.suspended:
            raise HarnessError(f"{self.commands[0].name} is suspended: call resume() first")
        if len(commands) > self._slot_count:
            raise HarnessError(f"{len(commands)} commands, a batch holds {self._slot_count}")
        view = self.l1.memory.view
        address = self.slots
        for command in commands:
            gprs = [0] * 16
            for name, value in command.regs.items():
                gprs[_INDEX[name]] = value & 0xFFFFFFFFFFFFFFFF
            _IN.pack_into(
                *(view, address, command.op, 0, command.rip, command.cs, command.rflags),
                *(command.rsp, command.ss, command.ds, command.cr2, *gprs),
            )
            if command.operand:
                start = address + self._operand
                view[start : start + len(command.operand)] = command.operand
            address += self._slot_size
        _QUAD.pack_into(view, self._count, len(commands))
        self.commands = commands
        return self._run()

    def resume(self) -> list[Result] | Any:
        """Go on with commands that an exit to userspace had suspended."""
        if not self.suspended:
            raise HarnessError("nothing is suspended")
        return self._run()

    def _run(self) -> list[Result] | Any:
        l1 = self.l1
        if l1.nested_roundtrip:
            # The time that a round trip takes is no time of the guest.
            l1.stop_budget()
            l1.round_trip()
        l1.arm_budget()
        self.suspended = True
        while True:
            seen = self.vcpu.run()
            if isinstance(seen, exits.IoExit):
                if seen.port == self._done_port:
                    self.suspended = False
                    results = self._results()
                    if l1.on_results is not None:
                        l1.on_results(self, results)
                    return results
                return seen
            if isinstance(seen, exits.IntrExit):
                if l1.expired:
                    raise self.lost("hang", "the case's budget is used up")
                continue
            if isinstance(seen, exits.ShutdownExit):
                raise self.lost("triple fault", "KVM_EXIT_SHUTDOWN")
            if isinstance(seen, exits.InternalErrorExit):
                raise self.lost("internal error", repr(seen))
            if isinstance(seen, exits.FailEntryExit):
                raise self.lost("failed entry", repr(seen))
            return seen

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
        view = self.l1.memory.view
        for slot, command in enumerate(self.commands):
            (status,) = _STATUS.unpack_from(view, self.slots + slot * self._slot_size + 4)
            if status:
                name = command.name
            if status == self._running:
                break
        return name

    def _results(self) -> list[Result]:
        view = self.l1.memory.view
        results = []
        address = self.slots
        for _ in self.commands:
            (status,) = _STATUS.unpack_from(view, address + 4)
            out = _OUT.unpack_from(view, address + self._out)
            results.append(Result(status, dict(zip(GPRS, out[8:], strict=True)), *out[:8]))
            address += self._slot_size
        return results

    def host_loads(self, slot: int = 0) -> HostLoads:
        """Return what the last VM exit loaded, as recorded by the payload at HOST_RIP."""
        view, payload = self.l1.memory.view, self.l1.payload
        address = self.slots + slot * self._slot_size
        return HostLoads(
            *_SELECTORS.unpack_from(view, address + payload["OUT_SELECTORS"]),
            *_TABLE.unpack_from(view, address + payload["OUT_GDTR"]),
            *_TABLE.unpack_from(view, address + payload["OUT_IDTR"]),
        )

    def write_list(self, op: str, entries: Sequence[tuple[int, int]]) -> Command:
        """Put (field, value) pairs into the list page; the command that works through them."""
        return self._put_list(op, _packed(entries))

    def vmread_command(self, fields: tuple[int, ...]) -> Command:
        """Put fields to be read into the list page; ``read_list`` has their values afterwards."""
        return self._put_list("OP_VMREAD_LIST", _packed_reads(fields))

    def _put_list(self, op: str, packed: bytes) -> Command:
        count = len(packed) // LIST_ENTRY.size
        if count > self.list_entries:
            raise HarnessError(f"{count} entries, a list holds {self.list_entries}")
        self.l1.memory.view[self.list : self.list + len(packed)] = packed
        return Command(self.l1.payload[op], self.list, op.removeprefix("OP_"), cs=count)

    def list_flags(self, count: int) -> tuple[int, ...]:
        """RFLAGS after each of the first ``count`` entries of the list page."""
        return struct.unpack_from(f"<{3 * count}Q", self.l1.memory.view, self.list)[2::3]

    def read_list(self, count: int) -> list[tuple[int, int, int]]:
        """Return the first ``count`` entries of the list page: key, value, RFLAGS."""
        end = self.list + count * LIST_ENTRY.size
        return list(LIST_ENTRY.iter_unpack(self.l1.memory.view[self.list : end]))
