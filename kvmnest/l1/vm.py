"""The VM of an L1: its memory and vCPUs, made, reset and moved; no instruction yet."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

from kvmnest.errors import HarnessError
from kvmnest.kvm import Cap, Kvm, KvmMsrError, Vcpu, Vm
from kvmnest.kvm.cpuid import CPUID_1_ECX_VMX, leaf
from kvmnest.kvm.memory import Image
from kvmnest.l1 import vcpu_state
from kvmnest.l1.budget import Budget
from kvmnest.l1.command import Result, checked_payload
from kvmnest.l1.cpu import Cpu
from kvmnest.l1.vcpu_state import Rewind, VcpuState
from kvmnest.vmx import Capabilities, Cr0, Cr4, Efer, FeatureControl, Msr, Vector
from kvmnest.vmx.msrs import VMX_MSRS

_CR0 = Cr0.PE | Cr0.MP | Cr0.ET | Cr0.NE | Cr0.WP | Cr0.PG
_CR4 = Cr4.PAE | Cr4.OSFXSR | Cr4.OSXMMEXCPT
_EFER = Efer.LME | Efer.LMA | Efer.NXE
_GP = int(Vector.GP)
#: Where ``alloc`` begins.
_FIRST_FREE = 0x100000
#: Chips of a full irqchip: two PICs and an I/O APIC.
_CHIPS = 3


@functools.lru_cache(maxsize=8)
def _capabilities(msrs: tuple[tuple[int, int], ...]) -> Capabilities:
    return Capabilities.from_msrs(dict(msrs))


@functools.lru_cache(maxsize=2)
def _vmx_msrs(kvm: Kvm) -> tuple[int, ...]:
    return tuple(sorted(set(kvm.msr_feature_index_list()) & set(VMX_MSRS)))


class L1Vm:
    """An L1 in 64-bit mode, CPL 0, ready to execute instructions; not yet in VMX operation.

    CR4.VMXE is set and IA32_FEATURE_CONTROL is locked with VMX enabled, as firmware leaves it,
    wherever KVM offers VMX to guests; elsewhere L1 runs all the same and VMXON faults.

    Args:
        kvm: the open /dev/kvm.
        budget: seconds of one case after which a vCPU that does not come back is a hang.
        irqchip: "split" (local APICs in KVM), "full" (PIC and I/O APIC too) or "none".
        feature_control: value for IA32_FEATURE_CONTROL, or None to leave it at its reset value.
        vmxe: set CR4.VMXE (where there is VMX).
        nested_roundtrip: before every KVM_RUN save the VM's state, destroy the VM and restore it
            into a new one.

    Raises:
        KvmError, KvmUnavailable: KVM refused a step.
        PayloadError: see ``kvmnest.l1.payload.load``.
    """

    def __init__(
        self,
        kvm: Kvm,
        *,
        budget: float = 5.0,
        irqchip: str = "split",
        feature_control: int | None = FeatureControl.LOCKED | FeatureControl.VMX_OUTSIDE_SMX,
        vmxe: bool = True,
        nested_roundtrip: bool = False,
    ) -> None:
        self.kvm = kvm
        self.payload = checked_payload()
        self.budget = Budget(budget, self._wake)
        self.irqchip = irqchip
        self.nested_roundtrip = nested_roundtrip
        #: Called with the vCPU and the results of its commands after each batch, for tracing.
        self.on_results: Callable[[Cpu, list[Result]], None] | None = None
        self._free = _FIRST_FREE
        self._cpuid = kvm.supported_cpuid()
        self._done64, self._done32 = self.payload.code("done64"), self.payload.code("done32")
        self.has_vmx = bool(leaf(self._cpuid, 1).ecx & CPUID_1_ECX_VMX)
        self._feature_control = feature_control if self.has_vmx else None
        self._vmxe = vmxe and self.has_vmx
        self.memory = kvm.create_memory(self.payload["RAM_SIZE"])
        self.cpus: list[Cpu] = []
        self._caps: Capabilities | None = None
        #: True once a case took hold of the VM or a vCPU itself: ``reset`` cannot know then
        #: what it changed.
        self.touched = False
        self._rewind: Callable[[], object] | None = None
        self._image: Image | None = None
        self._enabled: list[tuple[Cap, int]] = []
        self._slots = [0]
        try:
            for address, content in self.payload.segments:
                self.memory.write(address, content)
            self._vm = self.create_vm()
        except BaseException:
            self.memory.close()
            raise
        try:
            self.add_cpu()
        except BaseException:
            self.close()
            raise

    def __repr__(self) -> str:
        count = len(self.cpus)
        return f"<L1, {count} {'vCPU' if count == 1 else 'vCPUs'}>"

    # --- life ---

    def create_vm(self) -> Vm:
        """Make a VM around L1's memory, without vCPUs."""
        vm = self.kvm.create_vm()
        try:
            if self.irqchip == "split":
                vm.enable_cap(Cap.SPLIT_IRQCHIP, 24)
            elif self.irqchip == "full":
                vm.create_irqchip()
            for cap, argument in self._enabled:
                vm.enable_cap(cap, argument)
            for slot in self._slots:
                vm.add_memory(slot, 0, self.memory)
        except BaseException:
            vm.close()
            raise
        return vm

    def enable_cap(self, cap: Cap, argument: int = 1) -> None:
        """KVM_ENABLE_CAP on the VM, and on those that replace it in round trips."""
        self.vm.enable_cap(cap, argument)
        self._enabled.append((cap, argument))

    def enable_smm(self) -> None:
        """Let SMM see L1's memory: it has memory slots of its own, in address space 1."""
        slot = 1 << 16
        self.vm.add_memory(slot, 0, self.memory)
        self._slots.append(slot)

    def create_vcpu(self, vm: Vm, index: int) -> Vcpu:
        """Make vCPU ``index`` of ``vm`` with L1's CPUID."""
        vcpu = vm.create_vcpu(index)
        vcpu.set_cpuid(self._cpuid)
        return vcpu

    def add_cpu(self) -> Cpu:
        """Start the next vCPU of L1 (at most 2) in the command loop."""
        index = len(self.cpus)
        if index >= self.payload["CPUS"]:
            raise HarnessError(f"L1 has at most {self.payload['CPUS']} vCPUs")
        cpu = Cpu(self, index, self.create_vcpu(self._vm, index))
        self.cpus.append(cpu)
        self._power_on(cpu)
        return cpu

    def _power_on(self, cpu: Cpu) -> None:
        vcpu, payload = cpu.vcpu, self.payload
        sregs = vcpu.get_sregs()
        _segment(sregs.cs, payload["SEL_CODE64"], 0xB, long=1)
        for register in (sregs.ss, sregs.ds, sregs.es, sregs.fs, sregs.gs):
            _segment(register, payload["SEL_DATA"], 0x3, db=1)
        _segment(sregs.tr, payload[f"SEL_TSS{cpu.index}"], 0xB, system=True)
        sregs.tr.base, sregs.tr.limit = payload[f"tss{cpu.index}"], 0x67
        sregs.ldt.unusable, sregs.ldt.present = 1, 0
        sregs.gdt.base = payload["l1_gdt"]
        sregs.gdt.limit = payload["l1_gdt_end"] - payload["l1_gdt"] - 1
        sregs.idt.base = payload["l1_idt"]
        sregs.idt.limit = payload["l1_idt_end"] - payload["l1_idt"] - 1
        sregs.cr0, sregs.cr3 = _CR0, payload["l1_pml4"]
        sregs.cr4 = _CR4 | (Cr4.VMXE if self._vmxe else 0)
        sregs.efer = _EFER
        if self._feature_control is not None:
            vcpu.set_msrs({Msr.IA32_FEATURE_CONTROL: self._feature_control})
        vcpu.set_sregs(sregs)
        if cpu.index:
            # A second vCPU waits for INIT and SIPI; Python starts it itself.
            vcpu.set_mp_state(0)  # KVM_MP_STATE_RUNNABLE
        regs = vcpu.get_regs()
        regs.rip, regs.rsp, regs.rflags = payload.entry, cpu.block, 0x2
        vcpu.set_regs(regs)

    def close(self) -> None:
        """Destroy the VM and free its memory. Closing twice is allowed."""
        self.budget.stop()
        for cpu in self.cpus:
            cpu.vcpu.close()
        self.cpus = []
        self._vm.close()
        self._rewind = self._image = None
        self.memory.close()

    def __enter__(self) -> Self:
        """Return this L1; it is closed at the end of the block."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close."""
        self.close()

    @property
    def resettable(self) -> bool:
        """Whether ``reset`` can bring this VM back: not lost, suspended, changed or grown."""
        return not (
            self.touched
            or self.nested_roundtrip
            or self.budget.used_up
            or len(self.cpus) != 1
            or self.cpu.suspended
        )

    def reset(self) -> None:
        """Bring VM, vCPU and memory back to the moment after creation; HarnessError if it cannot.

        Much cheaper than a new VM: no file descriptor is made or closed, and the pages stay.
        """
        if not self.resettable:
            raise HarnessError("this VM was changed in ways that a reset does not undo")
        self.budget.stop()
        if self._rewind is None or self._image is None:
            raise HarnessError("reset needs keep_state()")
        self._image.restore()
        self.memory.discard(self.payload["work_end"])
        self._rewind()
        self._free = _FIRST_FREE
        self.cpus[0].power_on()

    def keep_state(self) -> None:
        """Remember the vCPU's state for ``reset``; to be called before the first command."""
        self._rewind = self.cpu.vcpu.restart
        if self._rewind is None:
            state = Rewind(self._save(self.cpu))
            # A round trip puts another vCPU in its place.
            self._rewind = lambda: state(self.cpu.vcpu)
        self._image = Image(self.memory, self.payload.image)

    def _wake(self) -> None:
        for cpu in self.cpus:
            if cpu.suspended:
                cpu.vcpu.kick()

    # --- what L1 has ---

    @property
    def cpu(self) -> Cpu:
        """The first vCPU, on which instructions run unless another is chosen."""
        return self.cpus[0]

    @property
    def vm(self) -> Vm:
        """The KVM VM; whoever asks for it may change anything: see ``touched``."""
        self.touched = True
        return self._vm

    @property
    def vcpu(self) -> Vcpu:
        """The KVM vCPU of ``cpu``; whoever asks for it may change anything: see ``touched``."""
        self.touched, self._caps = True, None
        return self.cpu.vcpu

    @property
    def caps(self) -> Capabilities:
        """VMX capabilities as the vCPU's MSRs state them; HarnessError without VMX."""
        if not self.has_vmx:
            raise HarnessError("KVM offers no VMX to this guest: there are no VMX capabilities")
        if self._caps is None:
            values = self.cpu.vcpu.get_msrs(_vmx_msrs(self.kvm))
            self._caps = _capabilities(tuple(values.items()))
        return self._caps

    def sym(self, name: str) -> int:
        """Guest-physical (and linear) address of a label of the payload."""
        return self.payload[name]

    def read(self, address: int, length: int) -> bytes:
        """Bytes of L1's memory."""
        return bytes(self.memory.read(address, length))

    def write(self, address: int, content: bytes) -> None:
        """Change L1's memory."""
        self.memory.write(address, content)

    def read_int(self, address: int, size: int = 8) -> int:
        """Little-endian integer in L1's memory."""
        return int.from_bytes(self.read(address, size), "little")

    def write_int(self, address: int, value: int, size: int = 8) -> None:
        """Write a little-endian integer of ``size`` bytes."""
        self.write(address, (value & ((1 << 8 * size) - 1)).to_bytes(size, "little"))

    def alloc(self, pages: int = 1) -> int:
        """Address of zeroed, unused pages of L1's memory (in RAM from 1 MiB up)."""
        address = self._free
        self._free += 4096 * pages
        if self._free > self.payload["RAM_SIZE"]:
            raise HarnessError("L1's memory is used up")
        return address

    def round_trip(self, msrs: Mapping[int, int] | None = None) -> None:
        """Save and destroy the VM, and restore it into a new one around the same memory.

        The state is the same but for ``msrs``. Kernel documentation, "KVM_GET_NESTED_STATE" and
        "KVM_SET_NESTED_STATE": the nested state belongs to the vCPU's state like its registers.
        """
        states = [self._save(cpu) for cpu in self.cpus]
        chips = range(_CHIPS if self.irqchip == "full" else 0)
        kept = [self._vm.get_irqchip(chip) for chip in chips]
        for cpu in self.cpus:
            cpu.vcpu.close()
        self._vm.close()
        self._vm = self.create_vm()
        for chip in kept:
            self._vm.set_irqchip(chip)
        for cpu in self.cpus:
            cpu.vcpu = self.create_vcpu(self._vm, cpu.index)
        for cpu, state in zip(self.cpus, states, strict=True):
            state.msrs.update(msrs or {})
            vcpu_state.restore(cpu.vcpu, state)

    def _save(self, cpu: Cpu) -> VcpuState:
        return vcpu_state.save(self.kvm, cpu.vcpu, apic=self.irqchip != "none")

    def set_feature_msrs(self, values: Mapping[Msr, int] | Mapping[int, int]) -> None:
        """Set MSRs as a host does before its guest starts: the VMX capabilities, for example.

        Linux refuses a change once the vCPU has run (commit "KVM: x86: Disallow writes to
        immutable feature MSRs after KVM_RUN", 6.4), so the vCPU then becomes a new one in the
        same state. Raises KvmMsrError if a new vCPU refuses too.
        """
        self.touched, self._caps = True, None
        msrs = {int(index): value for index, value in values.items()}
        try:
            self.cpu.vcpu.set_msrs(msrs)
        except KvmMsrError:
            self.round_trip(msrs)

    @property
    def done64(self) -> bytes:
        """The instruction that ends a snippet of 64-bit code."""
        return self._done64

    def is_done(self, vector: int, rip: int) -> bool:
        """Tell whether a trap of L1 at ``rip`` is the end of a snippet."""
        if vector != _GP:
            return False
        found = self.memory.map[rip : rip + len(self._done64)]
        return found == self._done64 or found.startswith(self._done32)


def _segment(
    register: Any, selector: int, kind: int, *, long: int = 0, db: int = 0, system: bool = False
) -> None:
    register.base, register.limit, register.selector = 0, 0xFFFFFFFF, selector
    register.type, register.present, register.dpl = kind, 1, 0
    register.s, register.g = (0, 0) if system else (1, 1)
    register.l, register.db, register.avl, register.unusable = long, db, 0, 0
