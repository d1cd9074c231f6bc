"""``Kvm``, ``Vm`` and ``Vcpu`` of ``kvmnest.kvm`` over a bare CPU.

Every ioctl that has no meaning there raises ``NeedsHost`` with its name.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from kvmnest.errors import NeedsHost
from kvmnest.kvm import Cap, Kvm, KvmMsrError, Memory, MsrList, Vcpu, Vm, ffi
from kvmnest.kvm.exits import INTR, Exit, ShutdownExit
from kvmnest.kvm.native import NULL
from kvmnest.reference import emulator, rom
from kvmnest.reference.emulator import BareCpu, SharedMemory
from kvmnest.vmx.msrs import VMX_MSRS

if TYPE_CHECKING:
    from kvmnest.kvm.ioctls import Ioctl
    from kvmnest.kvm.native import CData
    from kvmnest.lab.bochs import Emulator

_GPRS = (
    *("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi"),
    *("r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"),
)
_SELECTORS = ("cs", "ss", "ds", "es", "fs", "gs", "tr", "ldt")
#: Memory of a CPU that is asked what it has.
_SMALL = 4 << 20


class _Bare:
    """In place of a file descriptor of KVM."""

    def ioctl(self, row: Ioctl, argument: CData = NULL) -> int:
        """Raise NeedsHost."""
        raise NeedsHost(row.name)

    def ioctl_value(self, row: Ioctl, value: int) -> int:
        """Raise NeedsHost."""
        raise NeedsHost(row.name)

    def fileno(self) -> int:
        """Raise NeedsHost."""
        raise NeedsHost("a file descriptor of KVM")

    def check_extension(self, cap: int) -> int:
        """0: KVM's capabilities are KVM's."""
        return 0


class ReferenceKvm(_Bare, Kvm):
    """Bare CPUs; a context manager, which ends them.

    ``path`` and ``model``: see ``kvmnest.reference.emulator.find``, which says what it raises.
    """

    def __init__(self, path: str | None = None, model: str | None = None) -> None:
        self._fd = -1
        self.name = "the reference CPU"
        self._cpus: list[BareCpu] = []
        self._found: Emulator | None = None
        self._wanted = (path, model)

    def __hash__(self) -> int:
        return id(self)

    @property
    def emulator(self) -> Emulator:
        """The Bochs that emulates them."""
        if self._found is None:
            self._found = emulator.find(*self._wanted)
        return self._found

    def create_memory(self, size: int) -> Memory:
        """Memory of a CPU that nobody uses, of ``size`` bytes, zeroed. Raises LabSetupError."""
        for cpu in [cpu for cpu in self._cpus if cpu.lost]:
            self._cpus.remove(cpu)
            cpu.__exit__()
        for cpu in self._cpus:
            if not cpu.used and cpu.ram == size:
                break
        else:
            cpu = BareCpu(self.emulator, size)
            self._cpus.append(cpu)
        memory = SharedMemory(cpu)
        memory.discard(0)
        cpu.used = True
        return memory

    def create_vm(self, type: int = 0) -> Vm:
        """Create a VM, which gets its CPU with its memory."""
        return ReferenceVm(self)

    def msr_feature_index_list(self) -> list[int]:
        """Capability MSRs of VMX that the CPU has."""
        return list(self._answers[1])

    def feature_msrs(self, indices: Iterable[int]) -> dict[int, int]:
        """Values of capability MSRs of VMX. Raises KvmMsrError for one that it lacks."""
        wanted, have = list(indices), self._answers[1]
        for done, index in enumerate(wanted):
            if index not in VMX_MSRS:
                raise NeedsHost(f"KVM_GET_MSRS of {index:#x}")
            if index not in have:
                raise KvmMsrError("KVM_GET_MSRS", self.name, index, done, len(wanted))
        return {index: have[index] for index in wanted}

    def supported_cpuid(self) -> CData:
        """All CPUID leaves of the CPU: ``struct kvm_cpuid2 *``."""
        leaves = self._answers[0]
        table = ffi.new("struct kvm_cpuid2 *", {"entries": len(leaves), "nent": len(leaves)})
        for entry, ((function, index), values) in zip(table.entries, leaves.items(), strict=False):
            entry.function, entry.index = function, index
            entry.eax, entry.ebx, entry.ecx, entry.edx = values
        return table

    @functools.cached_property
    def _answers(self) -> tuple[dict[tuple[int, int], tuple[int, ...]], dict[int, int]]:
        """CPUID leaves, and the capability MSRs that are there."""
        memory = self.create_memory(_SMALL)
        try:
            ask = functools.partial(_ask, memory)
            basic, extended = (ask([(first, 0)], [])[0][0][0] for first in (0, 0x80000000))
            leaves = [(n, 0) for n in (*range(basic + 1), *range(0x80000000, extended + 1))]
            leaves += [
                (n, sub) for n in (4, 7, 0xB, 0xD, 0x14) if n <= basic for sub in range(1, 4)
            ]
            leaves.sort()
            values, msrs = ask(leaves, VMX_MSRS)
        finally:
            memory.close()
        there = {
            msr: eax | edx << 32
            for msr, (eax, _, _, edx, ok) in zip(VMX_MSRS, msrs, strict=True)
            if ok
        }
        return {leaf: value[:4] for leaf, value in zip(leaves, values, strict=True)}, there

    def close(self) -> None:
        """End the CPUs."""
        for cpu in self._cpus:
            cpu.__exit__()
        self._cpus.clear()


def _ask(
    memory: Memory, leaves: list[tuple[int, int]], msrs: Iterable[int]
) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    assert isinstance(memory, SharedMemory)
    wanted = list(msrs)
    memory.cpu.tell(rom.questions(leaves, wanted))
    memory.cpu.run(emulator.RESET)
    size, count = rom.ANSWER.size, len(leaves) + len(wanted)
    found = list(rom.ANSWER.iter_unpack(memory.read(rom.ANSWERS, size * count)))
    return found[: len(leaves)], found[len(leaves) :]


class ReferenceVm(_Bare, Vm):
    """One CPU and its memory."""

    def __init__(self, kvm: ReferenceKvm) -> None:
        self._fd = -1
        self.name = "the reference VM"
        self.kvm = kvm
        self.memory: SharedMemory | None = None
        self._stats = None
        self._slots = {}
        self.vcpus: list[Vcpu] = []

    def enable_cap(self, cap: int, *args: int, flags: int = 0) -> None:
        """The local APIC is there; all else raises NeedsHost."""
        if cap != Cap.SPLIT_IRQCHIP:
            raise NeedsHost(f"KVM_CAP_{Cap(cap).name}")

    def add_memory(
        self,
        slot: int,
        gpa: int,
        memory: Memory | None,
        *,
        offset: int = 0,
        size: int | None = None,
        read_only: bool = False,
        log_dirty: bool = False,
    ) -> None:
        """Take the memory that ``ReferenceKvm.create_memory`` made, at 0; else NeedsHost."""
        plain = (slot, gpa, offset, size, read_only, log_dirty) == (0, 0, 0, None, False, False)
        if not plain or not isinstance(memory, SharedMemory) or self.memory is not None:
            raise NeedsHost("memory slots")
        self.memory = memory

    def create_vcpu(self, id: int = 0) -> Vcpu:
        """The CPU; a second one raises NeedsHost."""
        if id or self.vcpus:
            raise NeedsHost("a second vCPU")
        vcpu = ReferenceVcpu(self)
        self.vcpus.append(vcpu)
        return vcpu


class ReferenceVcpu(_Bare, Vcpu):
    """The CPU. Its state is stated before it runs first, and read when it was lost."""

    def __init__(self, vm: ReferenceVm) -> None:
        self._fd = -1
        self.vm: ReferenceVm = vm
        self.name, self.id = "the reference vCPU", 0
        self._stats = None
        self._start = rom.Start()
        self._ready = False
        self._lost = False

    @property
    def _memory(self) -> SharedMemory:
        if self.vm.memory is None:
            raise NeedsHost("a vCPU without memory")
        return self.vm.memory

    @property
    def kvm_run(self) -> CData:
        """Raise NeedsHost."""
        raise NeedsHost("struct kvm_run")

    def _not_running(self, what: str) -> None:
        if self._ready:
            raise NeedsHost(what)

    # --- its state ---

    def set_cpuid(self, cpuid: CData) -> None:
        """Only what the CPU has anyway; NeedsHost for anything else."""
        wanted = bytes(
            ffi.buffer(cpuid.entries, ffi.sizeof("struct kvm_cpuid_entry2") * cpuid.nent)
        )
        have = self.vm.kvm.supported_cpuid()
        if wanted != bytes(ffi.buffer(have.entries, len(wanted))) or cpuid.nent != have.nent:
            raise NeedsHost("KVM_SET_CPUID2")

    def get_cpuid(self) -> CData:
        """The CPU's leaves: ``struct kvm_cpuid2 *``."""
        return self.vm.kvm.supported_cpuid()

    def get_msrs(self, indices: Iterable[int]) -> dict[int, int]:
        """Capability MSRs of VMX; NeedsHost for others."""
        return self.vm.kvm.feature_msrs(indices)

    def set_msrs(self, values: Mapping[int, int] | MsrList) -> int:
        """Before it runs; later NeedsHost."""
        self._not_running("KVM_SET_MSRS")
        if isinstance(values, MsrList) or not set(VMX_MSRS).isdisjoint(values):
            raise NeedsHost("KVM_SET_MSRS of capabilities")
        self._start.msrs.update(values)
        return len(values)

    def get_regs(self) -> CData:
        """General registers, RIP, RFLAGS as they were when the CPU was handed over last."""
        regs = ffi.new("struct kvm_regs *")
        if self._ready:
            found = self._memory.cpu.registers()
            for name, value in zip((*_GPRS, "rip", "rflags"), found, strict=False):
                setattr(regs, name, value)
        return regs

    def set_regs(self, regs: CData) -> None:
        """Before it runs; later NeedsHost."""
        self._not_running("KVM_SET_REGS")
        self._start.gpr = tuple(getattr(regs, name) for name in _GPRS)
        self._start.rip, self._start.rflags = regs.rip, regs.rflags

    def get_sregs(self) -> CData:
        """Before it runs, and (control registers, EFER, CS) when it was lost; else NeedsHost."""
        sregs = ffi.new("struct kvm_sregs *")
        if self._ready:
            if not self._lost:
                raise NeedsHost("KVM_GET_SREGS")
            sregs.cr0, sregs.cr2, sregs.cr3, sregs.cr4, sregs.efer, cs = (
                self._memory.cpu.registers()[18:24]
            )
            sregs.cs.selector = cs
        return sregs

    def set_sregs(self, sregs: CData) -> None:
        """Before it runs, segments as the GDT in memory has them; later NeedsHost."""
        self._not_running("KVM_SET_SREGS")
        start = self._start
        start.cr0, start.cr3, start.cr4, start.efer = sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer
        start.gdtr, start.idtr = ((t.base, t.limit) for t in (sregs.gdt, sregs.idt))
        start.selectors = tuple(getattr(sregs, name).selector for name in _SELECTORS)

    def get_nested_state(self) -> bytes:
        """Raise NeedsHost."""
        raise NeedsHost("KVM_GET_NESTED_STATE")

    def set_nested_state(self, state: bytes) -> None:
        """Raise NeedsHost."""
        raise NeedsHost("KVM_SET_NESTED_STATE")

    def get_xsave2(self) -> CData:
        """Raise NeedsHost."""
        raise NeedsHost("KVM_GET_XSAVE2")

    # --- running it ---

    @property
    def restart(self) -> Callable[[], None]:
        """Back to the state that it started from."""
        return self._restart

    def _restart(self) -> None:
        self._ready = self._lost = False

    def run_to_port(self, port: int) -> Exit | None:
        """Run to the next OUT to PORT_DONE (None), a shutdown, or a kick. Raises HarnessError."""
        cpu = self._memory.cpu
        how = emulator.GO
        if not self._ready:
            base, limit = self._start.gdtr
            cpu.tell(self._start.task(self._memory.read(base, limit + 1)))
            how, self._ready = emulator.RESET, True
        said = cpu.run(how)
        if said == emulator.DONE:
            return None
        if said == emulator.IO:
            port = cpu.registers()[24]
            what = "OUT to" if port >> 24 else "IN from"
            raise NeedsHost(f"KVM_EXIT_IO of {what} port {port & 0xFFFF:#x}")
        if said == emulator.MMIO:
            raise NeedsHost(f"KVM_EXIT_MMIO of a write to {cpu.registers()[24]:#x}")
        self._lost = True
        return ShutdownExit() if said == emulator.SHUTDOWN else INTR

    def run(self, *, immediate_exit: bool = False) -> Exit:
        """Raise NeedsHost: what a KVM_RUN does besides running L1 to its end."""
        raise NeedsHost("KVM_RUN")

    def kick(self) -> None:
        """Make ``run_to_port`` return IntrExit; the CPU has to be started anew then."""
        self._memory.cpu.kick()

    def clear_kick(self) -> None:
        """Nothing to forget."""

    def close(self) -> None:
        """Give it back; a second call does nothing."""
        with contextlib.suppress(ValueError):
            self.vm.vcpus.remove(self)
