"""Binary statistics of a VM or vCPU (KVM_GET_STATS_FD): a header, descriptors, a data block."""

import os

from kvmnest.kvm.native import ffi


class Stats:
    """Reads all statistics from a stats file descriptor, which it owns.

    The layout is read once: it does not change while the object lives.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        header = ffi.new("struct kvm_stats_header *")
        raw = os.pread(fd, ffi.sizeof("struct kvm_stats_header"), 0)
        ffi.memmove(header, raw, len(raw))
        # The name follows the fixed part of each descriptor and is padded to name_size.
        fixed = ffi.offsetof("struct kvm_stats_desc", "name")
        stride = fixed + header.name_size
        table = os.pread(fd, stride * header.num_desc, header.desc_offset)
        descriptor = ffi.new("struct kvm_stats_desc *")
        # (name, index of the first value, number of values)
        self._layout: list[tuple[str, int, int]] = []
        self._length = 0
        for start in range(0, stride * header.num_desc, stride):
            ffi.memmove(descriptor, table[start : start + fixed], fixed)
            name = table[start + fixed : start + stride].split(b"\0", 1)[0].decode()
            first, count = descriptor.offset // 8, descriptor.size
            self._layout.append((name, first, count))
            self._length = max(self._length, (first + count) * 8)
        self._data_offset: int = header.data_offset

    def read(self) -> dict[str, int | list[int]]:
        """Return name -> value; a histogram is a list of its buckets."""
        raw = os.pread(self._fd, self._length, self._data_offset)
        values = memoryview(raw).cast("Q")
        return {
            name: values[first] if count == 1 else values[first : first + count].tolist()
            for name, first, count in self._layout
        }

    def close(self) -> None:
        """Close the file descriptor."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
