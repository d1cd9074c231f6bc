"""What the system, VM and vCPU objects share: a file descriptor, ioctls on it, closing."""

import errno
import os
from collections.abc import Iterable
from typing import Self

from kvmnest.kvm import ioctls
from kvmnest.kvm.errors import KvmError, KvmMsrError
from kvmnest.kvm.ioctls import Ioctl
from kvmnest.kvm.native import NULL, CData, ffi, libc

_ioctl = libc.ioctl
_as_pointer = ffi.typeof("void *")

# KVM takes fewer than 256 entries per KVM_GET_MSRS or KVM_SET_MSRS.
MSR_BATCH = 255

# Room for the kernel's own limit (KVM_MAX_CPUID_ENTRIES); doubled if one day it is not enough.
CPUID_ENTRIES = 256

_CPUID_ENTRY_SIZE = ffi.sizeof("struct kvm_cpuid_entry2")
_UNWRITTEN = b"\xff" * _CPUID_ENTRY_SIZE


class KvmObject:
    """An open file descriptor of KVM with a name for error messages ("vcpu 0")."""

    def __init__(self, fd: int, name: str) -> None:
        self._fd = fd
        self.name = name

    def fileno(self) -> int:
        """The file descriptor. Raises KvmError (EBADF) after close()."""
        if self._fd < 0:
            raise KvmError("fileno", self.name, errno.EBADF, f"{self.name} is closed")
        return self._fd

    @property
    def closed(self) -> bool:
        """True after close()."""
        return self._fd < 0

    def close(self) -> None:
        """Close the file descriptor; a second call does nothing."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        # A constructor that failed leaves no _fd.
        if getattr(self, "_fd", -1) >= 0:
            self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}{' closed' if self.closed else ''}>"

    def ioctl(self, row: Ioctl, argument: CData = NULL) -> int:
        """Issue an ioctl of the table with a pointer argument; return its non-negative result.

        Raises KvmError. The GIL is released for the time of the call.
        """
        result: int = _ioctl(self._fd, row.code, argument)
        if result < 0:
            raise self._error(row)
        return result

    def ioctl_value(self, row: Ioctl, value: int) -> int:
        """Issue an ioctl that takes a number instead of a pointer."""
        return self.ioctl(row, ffi.cast(_as_pointer, value))

    def _error(self, row: Ioctl) -> KvmError:
        hint = f"{self.name} is closed" if self._fd < 0 else ""
        return KvmError(row.name, self.name, ffi.errno, hint)

    def _get(self, row: Ioctl) -> CData:
        value = ffi.new(row.pointer)
        self.ioctl(row, value)
        return value

    def check_extension(self, cap: int) -> int:
        """Value of a capability here, 0 if unsupported (KVM_CHECK_EXTENSION)."""
        return self.ioctl_value(ioctls.CHECK_EXTENSION, cap)

    def enable_cap(self, cap: int, *args: int, flags: int = 0) -> None:
        """Enable an optional capability with up to four arguments (KVM_ENABLE_CAP)."""
        request = ffi.new(ioctls.ENABLE_CAP.pointer)
        request.cap = cap
        request.flags = flags
        for i, value in enumerate(args):
            request.args[i] = value
        self.ioctl(ioctls.ENABLE_CAP, request)

    def _read_msrs(self, indices: Iterable[int]) -> dict[int, int]:
        wanted = list(indices)
        result: dict[int, int] = {}
        for start in range(0, len(wanted), MSR_BATCH):
            batch = wanted[start : start + MSR_BATCH]
            query = ffi.new(ioctls.GET_MSRS.pointer, {"entries": len(batch)})
            query.nmsrs = len(batch)
            entries = query.entries
            for i, index in enumerate(batch):
                entries[i].index = index
            done = self.ioctl(ioctls.GET_MSRS, query)
            if done < len(batch):
                raise KvmMsrError("KVM_GET_MSRS", self.name, batch[done], start + done, len(wanted))
            for i, index in enumerate(batch):
                result[index] = entries[i].data
        return result

    def _read_cpuid(self, row: Ioctl) -> CData:
        count = CPUID_ENTRIES
        while True:
            query = ffi.new(row.pointer, {"entries": count})
            query.nent = count
            entries = ffi.buffer(query.entries, count * _CPUID_ENTRY_SIZE)
            if row is ioctls.GET_CPUID2:
                # Linux before 6.3 leaves nent alone when this one succeeds: what it has not
                # written tells the number of entries.
                entries[:] = _UNWRITTEN * count
            try:
                self.ioctl(row, query)
            except KvmError as error:
                if error.errno != errno.E2BIG or count >= 16 * CPUID_ENTRIES:
                    raise
                count *= 2
                continue
            while query.nent and _is_unwritten(entries, query.nent - 1):
                query.nent -= 1
            return query


def _is_unwritten(entries: CData, index: int) -> bool:
    start = index * _CPUID_ENTRY_SIZE
    return bool(entries[start : start + _CPUID_ENTRY_SIZE] == _UNWRITTEN)
