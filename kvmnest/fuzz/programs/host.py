"""What a host does with a VM between two steps, or while L2 waits for it."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Mapping

from kvmnest.kvm import KvmError, Vm
from kvmnest.l1 import L1, vcpu_state
from kvmnest.l1.cpu import Cpu
from kvmnest.vmx import Msr
from kvmnest.vmx.msrs import VMX_MSRS

#: SMBASE beyond everything that a program looks at; SMM begins 8000H behind it (SDM, "SMBASE
#: Relocation") with RSM. The MSR is read-only to guests, but a host may write it.
_SMBASE, _MSR_SMBASE, _RSM = 0x200000, 0x9E, b"\x0f\xaa"
#: Delivery mode of an NMI in the interrupt command; a message-signaled interrupt to APIC 0.
_NMI, _TO_APIC_0 = 4 << 8, 0xFEE00000
#: Where struct kvm_nested_state has its size.
_SIZE = slice(4, 8)
#: Seconds until a signal comes: somewhere in the steps behind it.
_SOON = 0.0005


class Host:
    """The host of one L1.

    ``here``: it does what nothing may be seen of; events come to L1 in any case.
    ``bare``: there is no KVM, so what L1 can do to itself comes from L1.
    """

    def __init__(self, l1: L1, *, here: bool = True, bare: bool = False) -> None:
        self._l1, self._here, self._bare = l1, here, bare
        self._logs = self._smm = False
        self._timer: threading.Timer | None = None

    def act(self, what: str, cpu: Cpu) -> None:
        """Do something of which L1 sees nothing. Raises KvmError if KVM refuses it."""
        if self._here and not self._bare:
            _ACTIONS[what](self, cpu)

    def change_nested_state(self, cpu: Cpu, offset: int, bits: int) -> None:
        """Offer KVM the nested state with other bits, which it may refuse; then the right one.

        Raises KvmError if KVM refuses what it gave.
        """
        if not self._here or self._bare:
            return
        right = cpu.vcpu.get_nested_state()
        wrong = bytearray(right)
        at = offset % len(wrong)
        for number, byte in enumerate(bits.to_bytes(8, "little")):
            if at + number < len(wrong):
                wrong[at + number] ^= byte
        # The size in the header is for this process to respect, not for KVM.
        wrong[_SIZE] = right[_SIZE]
        try:
            cpu.vcpu.set_nested_state(bytes(wrong))
        except KvmError as error:
            if error.errno not in (errno.EINVAL, errno.EFAULT, errno.ENOMEM):
                raise
        cpu.vcpu.set_nested_state(right)

    def move(self) -> None:
        """Save the VM, and restore it into a new one. Raises KvmError."""
        self._l1.round_trip()
        self._logs = False

    def event(self, what: str, vector: int) -> None:
        """Send the first vCPU an interrupt or an NMI, through its local APIC in x2APIC mode."""
        if not self._bare:
            data = vector if what == "interrupt" else _NMI
            self._vm().signal_msi(_TO_APIC_0, data)
        elif what == "interrupt":
            self._l1.wrmsr(Msr.X2APIC_SELF_IPI, vector)
        else:
            self._l1.wrmsr(Msr.X2APIC_ICR, _NMI)

    def finish(self, *, lost: bool = False) -> None:
        """Undo what the next program must not find; with ``lost`` L1 is of no use any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer.join()
            self._timer = None
            self._l1.cpu.vcpu.clear_kick()
        if self._logs and not lost:
            self._set_log(False)
        os.sched_setaffinity(0, _CPUS)

    # --- actions ---

    def _vm(self) -> Vm:
        # Not L1.vm, which has the L1 thrown away: what is done here is undone.
        vm = self._l1.cpu.vcpu.vm
        assert isinstance(vm, Vm)
        return vm

    def _new_vm(self, cpu: Cpu) -> None:
        self.move()

    def _memory_slot(self, cpu: Cpu) -> None:
        """The memory goes, and comes back."""
        vm = self._vm()
        vm.remove_memory(0)
        vm.add_memory(0, 0, self._l1.memory, log_dirty=self._logs)

    def _dirty_log(self, cpu: Cpu) -> None:
        """The log is switched on, or read and switched off."""
        if self._logs:
            self._vm().dirty_log(0)
        self._set_log(not self._logs)

    def _set_log(self, on: bool) -> None:
        self._vm().add_memory(0, 0, self._l1.memory, log_dirty=on)
        self._logs = on

    def _signal(self, cpu: Cpu) -> None:
        if self._timer is not None:
            self._timer.join()
        self._timer = threading.Timer(_SOON, cpu.vcpu.kick)
        self._timer.start()

    def _other_cpu(self, cpu: Cpu) -> None:
        """The next of the CPUs that this process may run on; with one there is nowhere to go."""
        allowed = sorted(_CPUS)
        (now, *_) = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {allowed[(allowed.index(now) + 1) % len(allowed)]})

    def _smi(self, cpu: Cpu) -> None:
        """An SMI whose handler does nothing but RSM."""
        if not self._smm:
            self._l1.enable_smm()
            self._l1.write(_SMBASE + 0x8000, _RSM)
            self._smm = True
        cpu.vcpu.set_msrs({_MSR_SMBASE: _SMBASE})
        cpu.vcpu.smi()

    def _msrs(self, cpu: Cpu) -> None:
        found = vcpu_state.movable_msrs(self._l1.kvm, cpu.vcpu)
        # Linux refuses those of capabilities once the vCPU has run.
        cpu.vcpu.set_msrs({index: v for index, v in found.items() if index not in VMX_MSRS})


_CPUS = frozenset(os.sched_getaffinity(0))


def _in_place(get: str, set_: str) -> Callable[[Host, Cpu], None]:
    """Read a part of the vCPU's state and write it back."""

    def act(host: Host, cpu: Cpu) -> None:
        value = getattr(cpu.vcpu, get)()
        getattr(cpu.vcpu, set_)(value)

    return act


_ACTIONS: Mapping[str, Callable[[Host, Cpu], None]] = {
    "new VM": Host._new_vm,
    "nested state": _in_place("get_nested_state", "set_nested_state"),
    "sregs": _in_place("get_sregs", "set_sregs"),
    "regs": _in_place("get_regs", "set_regs"),
    "events": _in_place("get_vcpu_events", "set_vcpu_events"),
    "msrs": Host._msrs,
    "xsave": _in_place("get_xsave", "set_xsave"),
    "debugregs": _in_place("get_debugregs", "set_debugregs"),
    "memory slot": Host._memory_slot,
    "dirty log": Host._dirty_log,
    "signal": Host._signal,
    "other CPU": Host._other_cpu,
    "SMI": Host._smi,
}


def second(l1: L1) -> Cpu:
    """L1's second vCPU, which begins to exist. Raises NeedsHost where there can be only one."""
    return l1.cpus[1] if len(l1.cpus) > 1 else l1.add_cpu()
