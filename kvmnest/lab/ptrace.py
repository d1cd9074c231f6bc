"""Stop a child process, read and change its registers, make it perform system calls (x86-64)."""

import ctypes
import os
import signal
import struct
import time

_SEIZE, _INTERRUPT, _DETACH, _CONT, _SINGLESTEP = 0x4206, 0x4207, 17, 7, 9
_GETREGSET, _SETREGSET = 0x4204, 0x4205
_NT_PRSTATUS, _NT_X86_XSTATE = 1, 0x202
_O_EXITKILL = 0x100000
_WALL = 0x40000000

# Order of the kernel's struct user_regs_struct.
_REGS = ("r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx",
         "rsi", "rdi", "orig_rax", "rip", "cs", "eflags", "rsp", "ss", "fs_base", "gs_base", "ds",
         "es", "fs", "gs")  # fmt: skip
_LAYOUT = struct.Struct(f"<{len(_REGS)}Q")
_NO_SYSCALL = (1 << 64) - 1

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)


class _IoVec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def _ptrace(request: int, pid: int, address: int = 0, data: int = 0) -> None:
    if _libc.ptrace(request, pid, address, data) < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"ptrace {request:#x}: {os.strerror(error)}")


class Stopped:
    """A child process, stopped for as long as the context lasts, then running on.

    Must be used from one thread. Raises OSError when the system does not allow it or the
    process is gone.
    """

    def __init__(self, pid: int) -> None:
        """Stop ``pid``."""
        self.pid = pid
        _ptrace(_SEIZE, pid, 0, _O_EXITKILL)
        self._interrupt()

    def __enter__(self) -> "Stopped":
        """Return self."""
        return self

    def __exit__(self, *_: object) -> None:
        """Let the process run on."""
        _ptrace(_DETACH, self.pid)

    def _interrupt(self) -> None:
        _ptrace(_INTERRUPT, self.pid)
        self._wait()

    def _wait(self) -> int:
        _, status = os.waitpid(self.pid, _WALL)
        if not os.WIFSTOPPED(status):
            raise OSError(3, f"process {self.pid} ended")
        return os.WSTOPSIG(status)

    def leave_system_call(self, tries: int = 400) -> None:
        """Run on until the process is stopped between instructions of its own."""
        for _ in range(tries):
            if self.registers()["orig_rax"] >> 63:
                return
            _ptrace(_CONT, self.pid)
            time.sleep(0.003)
            self._interrupt()
        raise OSError(11, f"process {self.pid} is always in a system call")

    def _get(self, kind: int, size: int) -> bytes:
        buffer = ctypes.create_string_buffer(size)
        vector = _IoVec(ctypes.addressof(buffer), size)
        _ptrace(_GETREGSET, self.pid, kind, ctypes.addressof(vector))
        return buffer.raw[: vector.length]

    def _set(self, kind: int, data: bytes) -> None:
        buffer = ctypes.create_string_buffer(data, len(data))
        vector = _IoVec(ctypes.addressof(buffer), len(data))
        _ptrace(_SETREGSET, self.pid, kind, ctypes.addressof(vector))

    def registers(self) -> dict[str, int]:
        """General registers by name."""
        return dict(zip(_REGS, _LAYOUT.unpack(self._get(_NT_PRSTATUS, _LAYOUT.size)), strict=True))

    def set_registers(self, values: dict[str, int]) -> None:
        """Set all general registers; no system call is restarted after that."""
        values = values | {"orig_rax": _NO_SYSCALL}
        self._set(_NT_PRSTATUS, _LAYOUT.pack(*(values[name] for name in _REGS)))

    def extended_state(self) -> bytes:
        """The x87, SSE and AVX state, in the XSAVE layout of this machine."""
        return self._get(_NT_X86_XSTATE, 1 << 14)

    def set_extended_state(self, data: bytes) -> None:
        """Set what extended_state() returned."""
        self._set(_NT_X86_XSTATE, data)

    def call(self, at: int, number: int, *arguments: int) -> int:
        """Make the process perform a system call; ``at`` is the address of a SYSCALL instruction.

        Returns its result; raises OSError if it failed. All registers are as before afterwards.
        """
        saved = self.registers()
        names = ("rdi", "rsi", "rdx", "r10", "r8", "r9")
        given = {n: a & _NO_SYSCALL for n, a in zip(names, arguments, strict=False)}
        self.set_registers(saved | given | {"rax": number, "rip": at})
        _ptrace(_SINGLESTEP, self.pid)
        while self._wait() != signal.SIGTRAP:
            _ptrace(_SINGLESTEP, self.pid)
        result = self.registers()["rax"]
        self.set_registers(saved)
        if result > _NO_SYSCALL - 4096:
            error = (1 << 64) - result
            raise OSError(error, f"system call {number} in the emulator: {os.strerror(error)}")
        return result
