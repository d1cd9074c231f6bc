"""The state of a vCPU: registers, MSRs, CPUID, events, nested state, statistics.

``get_*`` returns a new C structure (cffi) with the kernel's field names; ``set_*`` takes one.
"""

import errno
from collections.abc import Iterable, Mapping

from kvmnest.kvm import ioctls
from kvmnest.kvm.base import MSR_BATCH, KvmObject
from kvmnest.kvm.caps import Cap
from kvmnest.kvm.errors import KvmError, KvmMsrError
from kvmnest.kvm.native import CData, ffi
from kvmnest.kvm.stats import Stats

_NESTED_HEADER = ffi.sizeof("struct kvm_nested_state")

# Attribute of a vCPU's device interface: offset of the guest's TSC from the host's.
_TSC_CTRL = 0
_TSC_OFFSET = 0


class MsrList:
    """Values of MSRs in the form that KVM_SET_MSRS takes, made once for many writes.

    ``batches`` are ``struct kvm_msrs *`` of at most 255 entries, in the order of ``values``.
    """

    def __init__(self, values: Mapping[int, int]) -> None:
        items = [(index, 0, value) for index, value in values.items()]
        self.count = len(items)
        parts = [items[start : start + MSR_BATCH] for start in range(0, self.count, MSR_BATCH)]
        pointer = ioctls.SET_MSRS.pointer
        self.batches = [ffi.new(pointer, {"nmsrs": len(p), "entries": p}) for p in parts]


class TscOffset:
    """An offset of the TSC in the form that KVM_SET_DEVICE_ATTR takes, for many writes."""

    def __init__(self, offset: int) -> None:
        self._value = ffi.new("uint64_t *", offset & (1 << 64) - 1)
        self.request = _tsc_request(ioctls.SET_DEVICE_ATTR, self._value)


def _tsc_request(row: ioctls.Ioctl, value: CData) -> CData:
    address = int(ffi.cast("uintptr_t", value))
    return ffi.new(row.pointer, [0, _TSC_CTRL, _TSC_OFFSET, address])


class VcpuState(KvmObject):
    """Everything of a vCPU but running it (which ``Vcpu`` adds)."""

    def __init__(self, fd: int, vm: KvmObject, name: str) -> None:
        super().__init__(fd, name)
        self.vm = vm
        self._stats: Stats | None = None
        self._nested_size = 0

    def check_extension(self, cap: int) -> int:
        """Value of a capability for this vCPU's VM (a vCPU itself has no such ioctl)."""
        return self.vm.check_extension(cap)

    def get_regs(self) -> CData:
        """General registers, RIP, RFLAGS: ``struct kvm_regs *``."""
        return self._get(ioctls.GET_REGS)

    def set_regs(self, regs: CData) -> None:
        """Load the general registers; drops a pending exception."""
        self.ioctl(ioctls.SET_REGS, regs)

    def get_sregs(self) -> CData:
        """Segments, control registers, EFER, APIC base: ``struct kvm_sregs *``."""
        return self._get(ioctls.GET_SREGS)

    def set_sregs(self, sregs: CData) -> None:
        """Load the system registers. Raises KvmError (EINVAL) for an inconsistent state."""
        self.ioctl(ioctls.SET_SREGS, sregs)

    def get_sregs2(self) -> CData:
        """As sregs, with the PAE PDPTEs instead of the interrupt bitmap (Cap.SREGS2)."""
        return self._get(ioctls.GET_SREGS2)

    def set_sregs2(self, sregs: CData) -> None:
        """Load the system registers with PDPTEs (flags bit 0: they are valid)."""
        self.ioctl(ioctls.SET_SREGS2, sregs)

    def get_fpu(self) -> CData:
        """x87 and SSE registers: ``struct kvm_fpu *``."""
        return self._get(ioctls.GET_FPU)

    def set_fpu(self, fpu: CData) -> None:
        """Load the x87 and SSE registers."""
        self.ioctl(ioctls.SET_FPU, fpu)

    def get_xsave(self) -> CData:
        """The first 4096 bytes of the XSAVE area: ``struct kvm_xsave *``."""
        return self._get(ioctls.GET_XSAVE)

    def get_xsave2(self) -> CData:
        """The whole XSAVE area, of the size that Cap.XSAVE2 says: ``struct kvm_xsave *``."""
        size = self.check_extension(Cap.XSAVE2)
        if not size:
            hint = "KVM_CAP_XSAVE2 is 0: use get_xsave()"
            raise KvmError("KVM_GET_XSAVE2", self.name, errno.ENOTTY, hint)
        area = ffi.new(ioctls.GET_XSAVE2.pointer, {"extra": max(0, size - 4096) // 4})
        self.ioctl(ioctls.GET_XSAVE2, area)
        return area

    def set_xsave(self, area: CData) -> None:
        """Load the XSAVE area, of either getter."""
        self.ioctl(ioctls.SET_XSAVE, area)

    def get_xcrs(self) -> CData:
        """Extended control registers: ``struct kvm_xcrs *``."""
        return self._get(ioctls.GET_XCRS)

    def set_xcrs(self, xcrs: CData) -> None:
        """Load the extended control registers."""
        self.ioctl(ioctls.SET_XCRS, xcrs)

    def get_debugregs(self) -> CData:
        """DR0 to DR3, DR6, DR7: ``struct kvm_debugregs *``."""
        return self._get(ioctls.GET_DEBUGREGS)

    def set_debugregs(self, debugregs: CData) -> None:
        """Load the debug registers."""
        self.ioctl(ioctls.SET_DEBUGREGS, debugregs)

    def get_vcpu_events(self) -> CData:
        """Pending and injected events, interrupt shadow, SMM: ``struct kvm_vcpu_events *``."""
        return self._get(ioctls.GET_VCPU_EVENTS)

    def set_vcpu_events(self, events: CData) -> None:
        """Load the events; ``events.flags`` says which optional fields count."""
        self.ioctl(ioctls.SET_VCPU_EVENTS, events)

    def get_mp_state(self) -> int:
        """0 runnable, 1 uninitialized, 2 INIT received, 3 halted, 4 SIPI received."""
        return int(self._get(ioctls.GET_MP_STATE).mp_state)

    def set_mp_state(self, state: int) -> None:
        """Set the state; values above 0 need an in-kernel irqchip."""
        self.ioctl(ioctls.SET_MP_STATE, ffi.new(ioctls.SET_MP_STATE.pointer, [state]))

    def get_lapic(self) -> CData:
        """Registers of the in-kernel local APIC: ``struct kvm_lapic_state *`` (1 KiB)."""
        return self._get(ioctls.GET_LAPIC)

    def set_lapic(self, lapic: CData) -> None:
        """Load the registers of the in-kernel local APIC."""
        self.ioctl(ioctls.SET_LAPIC, lapic)

    def get_msrs(self, indices: Iterable[int]) -> dict[int, int]:
        """Read MSRs. Raises KvmMsrError naming the first index that KVM refuses."""
        return self._read_msrs(indices)

    def set_msrs(self, values: Mapping[int, int] | MsrList) -> int:
        """Write MSRs in order; return how many. Raises KvmMsrError naming the first refused.

        Those before the refused one are written.
        """
        prepared = values if isinstance(values, MsrList) else MsrList(values)
        row, start = ioctls.SET_MSRS, 0
        for batch in prepared.batches:
            done = self.ioctl(row, batch)
            if done < batch.nmsrs:
                index = batch.entries[done].index
                raise KvmMsrError(row.name, self.name, index, start + done, prepared.count)
            start += done
        return prepared.count

    def get_cpuid(self) -> CData:
        """The CPUID leaves of this vCPU: ``struct kvm_cpuid2 *``."""
        return self._read_cpuid(ioctls.GET_CPUID2)

    def set_cpuid(self, cpuid: CData) -> None:
        """Set the CPUID leaves; before the first run."""
        self.ioctl(ioctls.SET_CPUID2, cpuid)

    def get_nested_state(self) -> bytes:
        """Nested virtualization state, of the length that its header says.

        A vCPU outside VMX operation has 128 bytes, the header alone. Raises KvmError (ENOTTY)
        where KVM offers no nested virtualization.
        """
        row = ioctls.GET_NESTED_STATE
        size = self._nested_size or self.check_extension(Cap.NESTED_STATE)
        if not size:
            hint = "KVM_CAP_NESTED_STATE is 0: this KVM offers no nested virtualization"
            raise KvmError(row.name, self.name, errno.ENOTTY, hint)
        while True:
            state = ffi.new(row.pointer, {"size": size, "data": size - _NESTED_HEADER})
            try:
                self.ioctl(row, state)
            except KvmError as error:
                # E2BIG: the kernel has put the size that it needs into the header.
                if error.errno != errno.E2BIG or state.size <= size:
                    raise
                size = state.size
                continue
            self._nested_size = size
            return bytes(ffi.buffer(state, state.size))

    def set_nested_state(self, state: bytes) -> None:
        """Load what get_nested_state() returned; after CPUID, MSRs, sregs and events.

        Raises ValueError if the length does not fit the header, KvmError (EINVAL) if KVM finds
        the state inconsistent.
        """
        header = ffi.from_buffer("struct kvm_nested_state *", state) if len(state) >= 128 else None
        if header is None or not _NESTED_HEADER <= header.size <= len(state):
            raise ValueError(f"nested state of {len(state)} bytes does not hold what it announces")
        self.ioctl(ioctls.SET_NESTED_STATE, header)

    def set_guest_debug(self, control: int, debugregs: Iterable[int] = ()) -> None:
        """Debug the guest: control bits of ``KVM_GUESTDBG_*`` and DR0 to DR7 (0 ends it)."""
        request = ffi.new(ioctls.SET_GUEST_DEBUG.pointer, {"control": control})
        for i, value in enumerate(debugregs):
            request.arch.debugreg[i] = value
        self.ioctl(ioctls.SET_GUEST_DEBUG, request)

    def set_signal_mask(self, blocked: Iterable[int] | None) -> None:
        """Signals blocked while in KVM_RUN, replacing the thread's mask; None: the thread's."""
        if blocked is None:
            self.ioctl(ioctls.SET_SIGNAL_MASK)
            return
        mask = sum(1 << (number - 1) for number in set(blocked)).to_bytes(8, "little")
        row = ioctls.SET_SIGNAL_MASK
        self.ioctl(row, ffi.new(row.pointer, {"len": len(mask), "sigset": mask}))

    def interrupt(self, vector: int) -> None:
        """Queue an external interrupt; without an in-kernel PIC."""
        self.ioctl(ioctls.INTERRUPT, ffi.new(ioctls.INTERRUPT.pointer, [vector]))

    def nmi(self) -> None:
        """Queue an NMI."""
        self.ioctl(ioctls.NMI)

    def smi(self) -> None:
        """Queue an SMI (needs Cap.X86_SMM)."""
        self.ioctl(ioctls.SMI)

    def set_tpr_access_reporting(self, enabled: bool) -> None:
        """Exit with TprAccessExit when the guest touches the in-kernel APIC's TPR."""
        row = ioctls.TPR_ACCESS_REPORTING
        self.ioctl(row, ffi.new(row.pointer, {"enabled": enabled}))

    def setup_mce(self, capabilities: int) -> None:
        """Give the guest machine-check banks: its MCG_CAP, within Kvm.mce_capabilities()."""
        row = ioctls.X86_SETUP_MCE
        self.ioctl(row, ffi.new(row.pointer, capabilities))

    def set_mce(
        self, bank: int, status: int, *, mcg_status: int = 0, addr: int = 0, misc: int = 0
    ) -> None:
        """Inject a machine check: the MSR values of a bank and MCG_STATUS."""
        row = ioctls.X86_SET_MCE
        self.ioctl(row, ffi.new(row.pointer, [status, addr, misc, mcg_status, bank]))

    def translate(self, address: int) -> CData:
        """Translate a linear address by the guest's tables: ``struct kvm_translation *``."""
        result = ffi.new(ioctls.TRANSLATE.pointer, {"linear_address": address})
        self.ioctl(ioctls.TRANSLATE, result)
        return result

    def get_tsc_khz(self) -> int:
        """Frequency of the guest's TSC."""
        return self.ioctl(ioctls.GET_TSC_KHZ)

    def set_tsc_khz(self, khz: int) -> None:
        """Set the frequency of the guest's TSC."""
        self.ioctl_value(ioctls.SET_TSC_KHZ, khz)

    def get_tsc_offset(self) -> int:
        """What KVM adds to the host's TSC, modulo 2**64."""
        row, value = ioctls.GET_DEVICE_ATTR, ffi.new("uint64_t *")
        self.ioctl(row, _tsc_request(row, value))
        return int(value[0])

    def set_tsc_offset(self, offset: int | TscOffset) -> None:
        """Set what KVM adds to the host's TSC, modulo 2**64."""
        prepared = offset if isinstance(offset, TscOffset) else TscOffset(offset)
        self.ioctl(ioctls.SET_DEVICE_ATTR, prepared.request)

    def kvmclock_ctrl(self) -> None:
        """Tell the guest's kvmclock that the VM was paused."""
        self.ioctl(ioctls.KVMCLOCK_CTRL)

    def stats_fd(self) -> int:
        """A new file descriptor of the binary statistics, owned by the caller."""
        return self.ioctl(ioctls.GET_STATS_FD)

    def stats(self) -> dict[str, int | list[int]]:
        """All statistics by name; histograms as lists."""
        if self._stats is None:
            self._stats = Stats(self.stats_fd())
        return self._stats.read()

    def close(self) -> None:
        """Close the vCPU; a second call does nothing."""
        if self._stats:
            self._stats.close()
        super().close()
