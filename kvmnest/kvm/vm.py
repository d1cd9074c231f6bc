"""A VM: memory slots, interrupt controllers, clock, and its vCPUs."""

import errno
from collections.abc import Iterable

from kvmnest.kvm import ioctls
from kvmnest.kvm.base import KvmObject
from kvmnest.kvm.errors import KvmError
from kvmnest.kvm.memory import PAGE_SIZE, Memory
from kvmnest.kvm.native import CData, ffi
from kvmnest.kvm.stats import Stats
from kvmnest.kvm.vcpu import Vcpu

MEM_LOG_DIRTY_PAGES = 1
MEM_READONLY = 2


class Vm(KvmObject):
    """Made by ``Kvm.create_vm``; a context manager. Closing it closes its vCPUs first."""

    def __init__(self, fd: int, vcpu_mmap_size: int) -> None:
        super().__init__(fd, f"vm {fd}")
        self._vcpu_mmap_size = vcpu_mmap_size
        self._slots: dict[int, tuple[int, Memory]] = {}
        self._stats: Stats | None = None
        self.vcpus: list[Vcpu] = []

    def close(self) -> None:
        """Close the vCPUs, then the VM. The kernel frees it when the last mapping is gone."""
        for vcpu in self.vcpus:
            vcpu.close()
        self.vcpus.clear()
        if self._stats:
            self._stats.close()
        super().close()
        self._slots.clear()

    def create_vcpu(self, id: int = 0) -> Vcpu:
        """Create a vCPU. ``id`` is also its initial APIC id."""
        fd = self.ioctl_value(ioctls.CREATE_VCPU, id)
        vcpu = Vcpu(fd, self, id, self._vcpu_mmap_size)
        self.vcpus.append(vcpu)
        return vcpu

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
        """Map ``size`` bytes of ``memory`` from ``offset`` at guest-physical ``gpa``.

        Default size: up to the memory's end; None as memory removes the slot. The same slot
        again moves it or changes log_dirty. All are multiples of 4096. Raises KvmError (EINVAL,
        EEXIST for an overlap) and IndexError for a range outside the memory.
        """
        if memory is None:
            self.remove_memory(slot)
            return
        length = memory.size - offset if size is None else size
        if offset < 0 or length <= 0 or offset + length > memory.size:
            raise IndexError(
                f"{offset:#x}..{offset + length:#x} is outside memory of {memory.size:#x}"
            )
        flags = (MEM_READONLY if read_only else 0) | (MEM_LOG_DIRTY_PAGES if log_dirty else 0)
        self._set_region(slot, flags, gpa, length, memory.address + offset)
        self._slots[slot] = (length, memory)

    def remove_memory(self, slot: int) -> None:
        """Remove a memory slot. Raises KvmError (EINVAL) if there is none."""
        self._set_region(slot, 0, 0, 0, 0)
        self._slots.pop(slot, None)

    def _set_region(self, slot: int, flags: int, gpa: int, size: int, address: int) -> None:
        row = ioctls.SET_USER_MEMORY_REGION
        self.ioctl(row, ffi.new(row.pointer, [slot, flags, gpa, size, address]))

    def dirty_log(self, slot: int) -> bytes:
        """Bitmap of pages written since the last call, bit 0 of byte 0 first.

        Clears the log, unless MANUAL_DIRTY_LOG_PROTECT2 is enabled (then clear_dirty_log does).
        Raises KvmError (ENOENT) for a slot without log_dirty.
        """
        if slot not in self._slots:
            hint = f"{self.name} has no memory slot {slot}"
            raise KvmError("KVM_GET_DIRTY_LOG", self.name, errno.ENOENT, hint)
        pages = self._slots[slot][0] // PAGE_SIZE
        bitmap = ffi.new("uint64_t[]", (pages + 63) // 64)
        request = ffi.new(ioctls.GET_DIRTY_LOG.pointer, {"slot": slot})
        request.dirty_bitmap = bitmap
        self.ioctl(ioctls.GET_DIRTY_LOG, request)
        return bytes(ffi.buffer(bitmap))[: (pages + 7) // 8]

    def clear_dirty_log(self, slot: int, bitmap: bytes, first_page: int, num_pages: int) -> None:
        """Clear the dirty bits that are set in ``bitmap``, whose bit 0 is ``first_page``.

        ``first_page`` and ``num_pages`` are multiples of 64, or num_pages ends with the slot.
        """
        padded = bitmap.ljust((num_pages + 63) // 64 * 8, b"\0")
        buffer = ffi.from_buffer(padded)
        request = ffi.new(ioctls.CLEAR_DIRTY_LOG.pointer, [slot, num_pages, first_page])
        request.dirty_bitmap = ffi.cast("void *", buffer)
        self.ioctl(ioctls.CLEAR_DIRTY_LOG, request)

    def create_irqchip(self) -> None:
        """Create PIC, IOAPIC and local APICs in the kernel; before the first vCPU."""
        self.ioctl(ioctls.CREATE_IRQCHIP)

    def create_pit2(self, flags: int = 0) -> None:
        """Create the i8254 timer in the kernel; after the irqchip."""
        self.ioctl(ioctls.CREATE_PIT2, ffi.new(ioctls.CREATE_PIT2.pointer, {"flags": flags}))

    def get_irqchip(self, chip_id: int) -> CData:
        """State of a chip (0: PIC master, 1: PIC slave, 2: IOAPIC): ``struct kvm_irqchip *``."""
        chip = ffi.new(ioctls.GET_IRQCHIP.pointer, {"chip_id": chip_id})
        self.ioctl(ioctls.GET_IRQCHIP, chip)
        return chip

    def set_irqchip(self, chip: CData) -> None:
        """Load the state of the chip named by ``chip.chip_id``."""
        self.ioctl(ioctls.SET_IRQCHIP, chip)

    def get_pit2(self) -> CData:
        """State of the timer: ``struct kvm_pit_state2 *``."""
        return self._get(ioctls.GET_PIT2)

    def set_pit2(self, state: CData) -> None:
        """Load the state of the timer."""
        self.ioctl(ioctls.SET_PIT2, state)

    def irq_line(self, irq: int, level: int) -> None:
        """Set the level of a GSI of the in-kernel irqchip."""
        self.ioctl(ioctls.IRQ_LINE, ffi.new(ioctls.IRQ_LINE.pointer, {"irq": irq, "level": level}))

    def set_gsi_routing(self, routes: Iterable[CData]) -> None:
        """Replace the GSI routing table by entries of irqchip_route() and msi_route()."""
        entries = [route[0] for route in routes]
        table = ffi.new(ioctls.SET_GSI_ROUTING.pointer, {"nr": len(entries), "entries": entries})
        self.ioctl(ioctls.SET_GSI_ROUTING, table)

    def signal_msi(self, address: int, data: int) -> int:
        """Inject an MSI into the in-kernel irqchip; >0: delivered, 0: the guest blocked it."""
        message = {"address_lo": address & 0xFFFFFFFF, "address_hi": address >> 32, "data": data}
        return self.ioctl(ioctls.SIGNAL_MSI, ffi.new(ioctls.SIGNAL_MSI.pointer, message))

    def get_clock(self) -> CData:
        """kvmclock as the guest sees it, in ns: ``struct kvm_clock_data *``."""
        return self._get(ioctls.GET_CLOCK)

    def set_clock(self, clock: CData) -> None:
        """Set kvmclock."""
        self.ioctl(ioctls.SET_CLOCK, clock)

    def set_tss_addr(self, address: int) -> None:
        """Place three pages for KVM's TSS in real mode (kvm_intel without unrestricted guest)."""
        self.ioctl_value(ioctls.SET_TSS_ADDR, address)

    def set_identity_map_addr(self, address: int) -> None:
        """Place one page for KVM's identity map (kvm_intel with EPT, unpaged guest)."""
        row = ioctls.SET_IDENTITY_MAP_ADDR
        self.ioctl(row, ffi.new(row.pointer, address))

    def get_tsc_khz(self) -> int:
        """TSC frequency that new vCPUs get (needs Cap.VM_TSC_CONTROL)."""
        return self.ioctl(ioctls.GET_TSC_KHZ)

    def set_tsc_khz(self, khz: int) -> None:
        """Set the TSC frequency of vCPUs made from now on (needs Cap.VM_TSC_CONTROL)."""
        self.ioctl_value(ioctls.SET_TSC_KHZ, khz)

    def set_msr_filter(
        self, ranges: Iterable[tuple[int, int, int, bytes]], *, default_deny: bool = False
    ) -> None:
        """Let the guest touch only MSRs whose bit is set in a range's bitmap.

        A range is (flags, base, count, bitmap); flags: 1 read, 2 write. Without ranges and
        default_deny the filter goes away. At most 16 ranges of 0x600 bytes.
        """
        request = ffi.new(ioctls.SET_MSR_FILTER.pointer, {"flags": int(default_deny)})
        bitmaps = []
        for i, (flags, base, count, bitmap) in enumerate(ranges):
            if len(bitmap) * 8 < count:
                raise ValueError(f"MSR range {base:#x}: {count} MSRs need {(count + 7) // 8} bytes")
            bitmaps.append(ffi.new("uint8_t[]", bitmap))
            request.ranges[i] = [flags, count, base, bitmaps[-1]]
        self.ioctl(ioctls.SET_MSR_FILTER, request)

    def stats_fd(self) -> int:
        """A new file descriptor of the binary statistics, owned by the caller."""
        return self.ioctl(ioctls.GET_STATS_FD)

    def stats(self) -> dict[str, int | list[int]]:
        """All statistics by name; histograms as lists."""
        if self._stats is None:
            self._stats = Stats(self.stats_fd())
        return self._stats.read()


def irqchip_route(gsi: int, chip_id: int, pin: int) -> CData:
    """A routing entry from a GSI to a pin of the in-kernel PIC or IOAPIC."""
    entry = ffi.new("struct kvm_irq_routing_entry *", {"gsi": gsi, "type": 1})
    entry.u.irqchip.irqchip = chip_id
    entry.u.irqchip.pin = pin
    return entry


def msi_route(gsi: int, address: int, data: int) -> CData:
    """A routing entry from a GSI to an MSI message."""
    entry = ffi.new("struct kvm_irq_routing_entry *", {"gsi": gsi, "type": 2})
    entry.u.msi.address_lo = address & 0xFFFFFFFF
    entry.u.msi.address_hi = address >> 32
    entry.u.msi.data = data
    return entry
