"""/dev/kvm itself: what this host's KVM offers, and the way to a VM."""

import errno
import os
from collections.abc import Iterable

from kvmnest.kvm import ioctls
from kvmnest.kvm.base import KvmObject
from kvmnest.kvm.errors import KvmError, KvmUnavailable
from kvmnest.kvm.ioctls import Ioctl
from kvmnest.kvm.memory import Memory
from kvmnest.kvm.native import CData, ffi
from kvmnest.kvm.vm import Vm

API_VERSION = 12


class Kvm(KvmObject):
    """The system object; a context manager.

    Raises KvmUnavailable, with the fix, if ``path`` is missing, not accessible, not KVM, or
    speaks another API version.
    """

    def __init__(self, path: str = "/dev/kvm") -> None:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise KvmUnavailable.from_open(path, error) from error
        super().__init__(fd, path)
        try:
            self.api_version = self.ioctl(ioctls.GET_API_VERSION)
        except KvmError as error:
            self.close()
            raise KvmUnavailable(f"{path} is not KVM: {error.strerror}") from error
        if self.api_version != API_VERSION:
            self.close()
            raise KvmUnavailable(
                f"{path} has API version {self.api_version}, kvmnest needs {API_VERSION}"
                " (Linux 2.6.22 or newer)"
            )

    @property
    def vcpu_mmap_size(self) -> int:
        """Bytes to map of a vCPU: struct kvm_run and what follows it."""
        return self.ioctl(ioctls.GET_VCPU_MMAP_SIZE)

    def create_memory(self, size: int) -> Memory:
        """Memory for a VM; see ``Memory``."""
        return Memory(size)

    def create_vm(self, type: int = 0) -> Vm:
        """Create a VM of the given machine type (0: default)."""
        fd = self.ioctl_value(ioctls.CREATE_VM, type)
        return Vm(fd, self.vcpu_mmap_size)

    def msr_index_list(self) -> list[int]:
        """Indices of the MSRs that are part of a vCPU's state on this host."""
        return self._index_list(ioctls.GET_MSR_INDEX_LIST)

    def msr_feature_index_list(self) -> list[int]:
        """Indices of the MSRs that describe features (the VMX capabilities are among them)."""
        return self._index_list(ioctls.GET_MSR_FEATURE_INDEX_LIST)

    def _index_list(self, row: Ioctl) -> list[int]:
        count = 0
        while True:
            query = ffi.new(row.pointer, {"indices": count})
            query.nmsrs = count
            try:
                self.ioctl(row, query)
            except KvmError as error:
                # E2BIG: the kernel has put the number that it needs into nmsrs.
                if error.errno != errno.E2BIG or query.nmsrs <= count:
                    raise
                count = query.nmsrs
                continue
            return list(query.indices[0 : query.nmsrs])

    def feature_msrs(self, indices: Iterable[int]) -> dict[int, int]:
        """Values of feature MSRs as KVM offers them to a guest.

        Raises KvmMsrError naming the first index that KVM does not know as a feature MSR.
        """
        return self._read_msrs(indices)

    def mce_capabilities(self) -> int:
        """MCG_CAP bits and bank count that a guest may get."""
        return int(self._get(ioctls.X86_GET_MCE_CAP_SUPPORTED)[0])

    def supported_cpuid(self) -> CData:
        """All CPUID leaves that KVM can give to a guest: ``struct kvm_cpuid2 *``."""
        return self._read_cpuid(ioctls.GET_SUPPORTED_CPUID)

    def emulated_cpuid(self) -> CData:
        """CPUID features that KVM emulates in software: ``struct kvm_cpuid2 *``."""
        return self._read_cpuid(ioctls.GET_EMULATED_CPUID)
