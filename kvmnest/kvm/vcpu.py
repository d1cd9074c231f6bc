"""A vCPU: running it, answering its exits, taking it out of the guest."""

import errno
import mmap
import os
from _thread import RLock, get_ident, get_native_id
from collections.abc import Callable
from typing import Any

from kvmnest.kvm import ioctls
from kvmnest.kvm.base import KvmObject
from kvmnest.kvm.errors import KvmError
from kvmnest.kvm.exit_codes import ExitCode
from kvmnest.kvm.exits import DECODERS, INTR, IO_IN, IO_OUT, PORT, Exit, OtherExit
from kvmnest.kvm.kick import kick_signal
from kvmnest.kvm.native import NULL, CData, ffi, libc
from kvmnest.kvm.state import VcpuState

_ioctl = libc.ioctl
_RUN = ioctls.RUN.code
#: Plain integers, since every exit is compared with them.
_IO, _MEMORY_FAULT = ExitCode.IO.value, ExitCode.MEMORY_FAULT.value
_EHWPOISON = 133  # absent from the errno module


class Vcpu(VcpuState):
    """Made by ``Vm.create_vcpu``; a context manager. One thread at a time may run it."""

    def __init__(self, fd: int, vm: KvmObject, id: int, mmap_size: int) -> None:
        super().__init__(fd, vm, f"vcpu {id}")
        self.id = id
        try:
            mapping = mmap.mmap(fd, mmap_size)
        except OSError:
            super().close()
            raise
        # The cffi objects keep the mapping alive: it goes with the last of them.
        self._run = ffi.from_buffer("struct kvm_run *", mapping)
        self._pages: Any = mapping
        # The thread in KVM_RUN, 0 for none; and the one that was there last, by both its names.
        self._tid = 0
        self._ident = self._native_id = 0
        # Reentrant: a Python signal handler may kick while this thread clears a kick.
        self._kick_lock = RLock()

    @property
    def restart(self) -> Callable[[], None] | None:
        """What brings it back to the state that it was started in; None: KVM has no such ioctl."""
        return None

    @property
    def kvm_run(self) -> CData:
        """The shared ``struct kvm_run *``. Raises KvmError after close()."""
        if self._run is None:
            raise KvmError("kvm_run", self.name, errno.EBADF, f"{self.name} is closed")
        return self._run

    def run(self, *, immediate_exit: bool = False) -> Exit:
        """Run the guest until it needs userspace; return why.

        The GIL is released meanwhile. ``immediate_exit``: only complete the pending exit (an IN,
        an MMIO read, an MSR access), do not enter the guest, return IntrExit. Raises KvmError,
        except for EINTR (IntrExit) and the errors that carry a MemoryFaultExit.
        """
        if immediate_exit:
            self.kvm_run.immediate_exit = 1
        return self._enter() or self._exit()

    def run_to_port(self, port: int) -> Exit | None:
        """``run`` for a guest that hands the vCPU back by an OUT of one byte to ``port``.

        None stands for that exit; any other one is decoded. Half the cost of ``run``.
        """
        seen = self._enter()
        if seen is None and PORT.unpack_from(self._pages) != (_IO, IO_OUT, 1, port):
            return self._exit()
        return seen

    def _enter(self) -> Exit | None:
        """KVM_RUN; None if ``struct kvm_run`` says why it came back.

        Not by ``fcntl.ioctl``, although that is quicker: newer Pythons repeat the call after
        EINTR, and a kick would never be seen.
        """
        ident = get_ident()
        if ident != self._ident:
            self._ident, self._native_id = ident, get_native_id()
        self._tid = self._native_id
        while _ioctl(self._fd, _RUN, NULL):
            error = ffi.errno
            # EAGAIN: a vCPU that waited for INIT and SIPI got one. It blocks again or runs.
            if error != errno.EAGAIN:
                self._tid = 0
                return self._run_failed(error)
        self._tid = 0
        return None

    def _exit(self) -> Exit:
        run = self._run
        reason = run.exit_reason
        decoder = DECODERS.get(reason)
        return decoder(run, self._pages) if decoder else OtherExit(reason)

    def _run_failed(self, error: int) -> Exit:
        if error == errno.EINTR:
            self.clear_kick()
            return INTR
        run = self._run
        # The only errors that come with an exit: a page of a memory slot could not be mapped.
        if error in (errno.EFAULT, _EHWPOISON) and run.exit_reason == _MEMORY_FAULT:
            return DECODERS[_MEMORY_FAULT](run, self._pages)
        hint = "" if self._fd >= 0 else f"{self.name} is closed"
        raise KvmError("KVM_RUN", self.name, error, hint)

    def kick(self) -> None:
        """Make ``run`` return IntrExit; from any thread.

        A thread inside the guest leaves it. If none is inside, the next ``run`` returns at once:
        so a kick cannot be lost between the caller's decision and the entry. The kick is used up
        by the first IntrExit or by clear_kick(). An exit that happens at the same time is
        returned first.
        """
        with self._kick_lock:
            run = self._run
            if run is None:
                return
            # This order: whoever enters the guest after the signal sees immediate_exit.
            run.immediate_exit = 1
            tid = self._tid
            if tid:
                libc.tgkill(os.getpid(), tid, kick_signal())

    def clear_kick(self) -> None:
        """Forget a kick that no ``run`` has seen yet."""
        with self._kick_lock:
            if self._run is not None:
                self._run.immediate_exit = 0
        # A signal that the kicker sent before we got the lock is delivered at the latest on the
        # return from this system call, so it cannot end the next KVM_RUN.
        os.getppid()

    def set_io_data(self, data: bytes) -> None:
        """Answer an IoExit of an IN with count*size bytes; the next ``run`` delivers them.

        Raises ValueError if the last exit is not an IN or the length differs.
        """
        run = self.kvm_run
        io = run.io
        if run.exit_reason != 2 or io.direction != IO_IN:
            raise ValueError(f"{self.name} is not at an IN")
        if len(data) != io.size * io.count:
            raise ValueError(f"{self.name}: IN takes {io.size * io.count} bytes, not {len(data)}")
        start = io.data_offset
        self._pages[start : start + len(data)] = data

    def set_mmio_data(self, data: bytes) -> None:
        """Answer an MmioExit of a read; the next ``run`` delivers it. Raises ValueError."""
        run = self.kvm_run
        mmio = run.mmio
        if run.exit_reason != 6 or mmio.is_write:
            raise ValueError(f"{self.name} is not at an MMIO read")
        if len(data) != mmio.len:
            raise ValueError(f"{self.name}: the read takes {mmio.len} bytes, not {len(data)}")
        ffi.memmove(mmio.data, data, len(data))

    def set_msr_result(self, value: int = 0, *, error: bool = False) -> None:
        """Answer a RdmsrExit with a value, or either MSR exit with #GP. Raises ValueError."""
        run = self.kvm_run
        if run.exit_reason not in (29, 30):
            raise ValueError(f"{self.name} is not at an MSR access")
        run.msr.error = error
        if run.exit_reason == 29:
            run.msr.data = value

    def set_hypercall_result(self, value: int) -> None:
        """Answer a HypercallExit: RAX after it. Raises ValueError."""
        run = self.kvm_run
        if run.exit_reason != 3:
            raise ValueError(f"{self.name} is not at a hypercall")
        run.hypercall.ret = value

    def close(self) -> None:
        """Kick a thread that runs the guest, unmap and close; a second call does nothing."""
        if self._run is not None and self._tid:
            self.kick()
        super().close()
        with self._kick_lock:
            self._run = None
        self._pages = None
