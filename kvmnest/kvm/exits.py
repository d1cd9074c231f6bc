"""Why KVM_RUN came back: one immutable, comparable class per exit of x86.

The classes behave as frozen dataclasses (keyword or positional construction, equality, hash,
``match``), but ``dataclasses`` would cost a third of the import time of this package: it
compiles each class's methods from text.
"""

import struct
from collections.abc import Callable
from typing import Any, ClassVar, dataclass_transform

from kvmnest.kvm.exit_codes import ExitCode
from kvmnest.kvm.native import CData, ffi

IO_IN = 0
IO_OUT = 1

# Why KVM handed an MSR access to userspace (RdmsrExit.reason, WrmsrExit.reason).
MSR_REASON_INVAL = 1
MSR_REASON_UNKNOWN = 2
MSR_REASON_FILTER = 4

# Of the most frequent exit everything is unpacked at once: each member that cffi is asked for
# costs as much.
_REASON, _IO = ffi.offsetof("struct kvm_run", "exit_reason"), ffi.offsetof("struct kvm_run", "io")
_GAP = f"<{_REASON}xI{_IO - _REASON - 4}x"
#: exit_reason, then of ``io``: direction, size, port.
PORT = struct.Struct(f"{_GAP}BBH")
_IO_EXIT = struct.Struct(f"{_GAP}BBHIQ")

_SUBERRORS = {
    1: "emulation failed",
    2: "simultaneous exceptions",
    3: "unexpected exit while an event was delivered",
    4: "unexpected exit reason",
}


@dataclass_transform(frozen_default=True)
class Exit:
    """Base of every exit. Fields are set once, by the constructor."""

    _fields: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls) -> None:
        cls._fields = tuple(cls.__annotations__)
        type.__setattr__(cls, "__match_args__", cls._fields)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        fields = self._fields
        values = dict(zip(fields, args, strict=False), **kwargs)
        complete = len(values) == len(args) + len(kwargs) == len(fields)
        if not complete or (kwargs and values.keys() != set(fields)):
            raise TypeError(f"{type(self).__name__} takes {fields}, got {args} and {kwargs}")
        self.__dict__.update(values)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{type(self).__name__} cannot be changed")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"{type(self).__name__} cannot be changed")

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return self.__dict__ == other.__dict__

    def __hash__(self) -> int:
        return hash((type(self), *self.__dict__.values()))

    def __repr__(self) -> str:
        fields = (f"{name}={_show(self.__dict__[name])}" for name in self._fields)
        return f"{type(self).__name__}({', '.join(fields)})"


def _show(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, int):
        return repr(value)
    return hex(value) if value > 9 else str(value)


class UnknownExit(Exit):
    """KVM_EXIT_UNKNOWN: the hardware's own exit reason."""

    hardware_exit_reason: int


class ExceptionExit(Exit):
    """KVM_EXIT_EXCEPTION: vector and error code."""

    exception: int
    error_code: int


class IoExit(Exit):
    """KVM_EXIT_IO: an IN or OUT of ``count`` items of ``size`` (1, 2, 4) bytes.

    ``data`` holds count*size bytes of an OUT and is empty for an IN, which waits for
    ``Vcpu.set_io_data``. KVM completes the instruction at the next ``run``.
    """

    direction: int
    size: int
    port: int
    count: int
    data: bytes

    @property
    def is_out(self) -> bool:
        """True for OUT and OUTS, False for IN and INS."""
        return self.direction == IO_OUT


class HypercallExit(Exit):
    """KVM_EXIT_HYPERCALL: number, six arguments and flags (bit 0: long mode).

    ``Vcpu.set_hypercall_result`` answers.
    """

    nr: int
    args: tuple[int, ...]
    flags: int


class DebugExit(Exit):
    """KVM_EXIT_DEBUG: exception vector, linear address, DR6 and DR7."""

    exception: int
    pc: int
    dr6: int
    dr7: int


class HltExit(Exit):
    """KVM_EXIT_HLT: HLT without an in-kernel irqchip."""


class MmioExit(Exit):
    """KVM_EXIT_MMIO: an access to a guest-physical address without (writable) memory.

    ``length`` is 1 to 8 bytes; ``data`` holds what is written and is empty for a read, which
    waits for ``Vcpu.set_mmio_data``.
    """

    phys_addr: int
    length: int
    is_write: bool
    data: bytes


class IrqWindowOpenExit(Exit):
    """KVM_EXIT_IRQ_WINDOW_OPEN: the guest can take an interrupt now."""


class ShutdownExit(Exit):
    """KVM_EXIT_SHUTDOWN: triple fault."""


class FailEntryExit(Exit):
    """KVM_EXIT_FAIL_ENTRY: the CPU refused to enter the guest; its reason and the host CPU."""

    hardware_entry_failure_reason: int
    cpu: int


class IntrExit(Exit):
    """KVM_RUN returned EINTR: a kick, immediate_exit or a signal."""


class SetTprExit(Exit):
    """KVM_EXIT_SET_TPR: the guest lowered CR8."""


class TprAccessExit(Exit):
    """KVM_EXIT_TPR_ACCESS: RIP and direction of an access to the TPR."""

    rip: int
    is_write: bool


class NmiExit(Exit):
    """KVM_EXIT_NMI."""


class InternalErrorExit(Exit):
    """KVM_EXIT_INTERNAL_ERROR: KVM gave up; ``data`` is what it tells, as 64-bit words."""

    suberror: int
    data: tuple[int, ...]

    @property
    def text(self) -> str:
        """The suberror in words."""
        return _SUBERRORS.get(self.suberror, f"suberror {self.suberror}")

    @property
    def instruction(self) -> bytes:
        """Bytes at RIP of a failed emulation (up to 15), empty if KVM does not tell."""
        if self.suberror != 1 or len(self.data) < 3 or not self.data[0] & 1:
            return b""
        raw = b"".join(word.to_bytes(8, "little") for word in self.data[1:3])
        return raw[1 : 1 + raw[0]]


class SystemEventExit(Exit):
    """KVM_EXIT_SYSTEM_EVENT: type (1 shutdown, 2 reset, 3 crash, ...) and data words."""

    type: int
    data: tuple[int, ...]


class EoiExit(Exit):
    """KVM_EXIT_IOAPIC_EOI: an EOI of ``vector`` with a split irqchip."""

    vector: int


class HypervExit(Exit):
    """KVM_EXIT_HYPERV: type (1 SynIC, 2 hypercall, 3 debugger) and its fields in order."""

    type: int
    values: tuple[int, ...]


class RdmsrExit(Exit):
    """KVM_EXIT_X86_RDMSR: why (MSR_REASON_*) and which; ``Vcpu.set_msr_result`` answers."""

    reason: int
    index: int


class WrmsrExit(Exit):
    """KVM_EXIT_X86_WRMSR: why (MSR_REASON_*), which and the value written."""

    reason: int
    index: int
    data: int


class DirtyRingFullExit(Exit):
    """KVM_EXIT_DIRTY_RING_FULL."""


class ApResetHoldExit(Exit):
    """KVM_EXIT_AP_RESET_HOLD: an encrypted guest's AP waits for its start."""


class BusLockExit(Exit):
    """KVM_EXIT_X86_BUS_LOCK."""


class XenExit(Exit):
    """KVM_EXIT_XEN: a Xen hypercall."""

    longmode: int
    cpl: int
    input: int
    params: tuple[int, ...]


class NotifyExit(Exit):
    """KVM_EXIT_NOTIFY: no event window for too long; bit 0: the VMCS is corrupt."""

    flags: int


class MemoryFaultExit(Exit):
    """KVM_EXIT_MEMORY_FAULT: guest-physical range that KVM could not map."""

    flags: int
    gpa: int
    size: int


class OtherExit(Exit):
    """An exit reason of another architecture or of a newer kernel."""

    reason: int


INTR = IntrExit()


def _io(run: CData, pages: CData) -> Exit:
    _, direction, size, port, count, start = _IO_EXIT.unpack_from(pages)
    data = pages[start : start + size * count] if direction == IO_OUT else b""
    # Past the checks of the constructor, in a third of the time.
    value = object.__new__(IoExit)
    value.__dict__.update(direction=direction, size=size, port=port, count=count, data=data)
    return value


def _mmio(run: CData, pages: CData) -> Exit:
    mmio = run.mmio
    length, is_write = mmio.len, bool(mmio.is_write)
    data = bytes(mmio.data)[:length] if is_write else b""
    return MmioExit(mmio.phys_addr, length, is_write, data)


def _debug(run: CData, pages: CData) -> Exit:
    arch = run.debug.arch
    return DebugExit(arch.exception, arch.pc, arch.dr6, arch.dr7)


def _hypercall(run: CData, pages: CData) -> Exit:
    call = run.hypercall
    return HypercallExit(call.nr, tuple(call.args), call.longmode)


def _internal(run: CData, pages: CData) -> Exit:
    error = run.internal
    return InternalErrorExit(error.suberror, tuple(error.data)[: error.ndata])


def _system_event(run: CData, pages: CData) -> Exit:
    event = run.system_event
    return SystemEventExit(event.type, tuple(event.data)[: event.ndata])


def _hyperv(run: CData, pages: CData) -> Exit:
    kind = run.hyperv.type
    u = run.hyperv.u
    values: tuple[int, ...] = ()
    if kind == 1:
        values = (u.synic.msr, u.synic.control, u.synic.evt_page, u.synic.msg_page)
    elif kind == 2:
        values = (u.hcall.input, *u.hcall.params)
    elif kind == 3:
        dbg = u.syndbg
        values = (dbg.msr, dbg.control, dbg.status, dbg.send_page, dbg.recv_page, dbg.pending_page)
    return HypervExit(kind, values)


def _xen(run: CData, pages: CData) -> Exit:
    call = run.xen.u.hcall
    return XenExit(call.longmode, call.cpl, call.input, tuple(call.params))


def _constant(value: Exit) -> Callable[[CData, CData], Exit]:
    return lambda run, pages: value


# Exit reason -> decoder of (struct kvm_run, the whole mapping).
_DECODERS: dict[ExitCode, Callable[[CData, CData], Exit]] = {
    ExitCode.UNKNOWN: lambda run, pages: UnknownExit(run.hw.hardware_exit_reason),
    ExitCode.EXCEPTION: lambda run, pages: ExceptionExit(run.ex.exception, run.ex.error_code),
    ExitCode.IO: _io,
    ExitCode.HYPERCALL: _hypercall,
    ExitCode.DEBUG: _debug,
    ExitCode.HLT: _constant(HltExit()),
    ExitCode.MMIO: _mmio,
    ExitCode.IRQ_WINDOW_OPEN: _constant(IrqWindowOpenExit()),
    ExitCode.SHUTDOWN: _constant(ShutdownExit()),
    ExitCode.FAIL_ENTRY: lambda run, pages: FailEntryExit(
        run.fail_entry.hardware_entry_failure_reason, run.fail_entry.cpu
    ),
    ExitCode.INTR: _constant(INTR),
    ExitCode.SET_TPR: _constant(SetTprExit()),
    ExitCode.TPR_ACCESS: lambda run, pages: TprAccessExit(
        run.tpr_access.rip, bool(run.tpr_access.is_write)
    ),
    ExitCode.NMI: _constant(NmiExit()),
    ExitCode.INTERNAL_ERROR: _internal,
    ExitCode.SYSTEM_EVENT: _system_event,
    ExitCode.IOAPIC_EOI: lambda run, pages: EoiExit(run.eoi.vector),
    ExitCode.HYPERV: _hyperv,
    ExitCode.X86_RDMSR: lambda run, pages: RdmsrExit(run.msr.reason, run.msr.index),
    ExitCode.X86_WRMSR: lambda run, pages: WrmsrExit(run.msr.reason, run.msr.index, run.msr.data),
    ExitCode.DIRTY_RING_FULL: _constant(DirtyRingFullExit()),
    ExitCode.AP_RESET_HOLD: _constant(ApResetHoldExit()),
    ExitCode.X86_BUS_LOCK: _constant(BusLockExit()),
    ExitCode.XEN: _xen,
    ExitCode.NOTIFY: lambda run, pages: NotifyExit(run.notify.flags),
    ExitCode.MEMORY_FAULT: lambda run, pages: MemoryFaultExit(
        run.memory_fault.flags, run.memory_fault.gpa, run.memory_fault.size
    ),
}

#: What makes the exit, by its number: (``struct kvm_run *``, the mapping that holds it).
DECODERS = {code.value: decoder for code, decoder in _DECODERS.items()}
