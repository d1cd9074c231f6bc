"""The signal that takes a thread out of KVM_RUN.

``immediate_exit`` alone stops only a thread that is about to enter the guest; one that is inside
needs a signal. Its handler has nothing to do, but there must be one: the default action of a
real-time signal ends the process. Python's ``signal.signal`` works in the main thread only, so
the handler is installed with sigaction and is a C function that has no effect: ``abs``.
"""

from functools import cache

from kvmnest.errors import HarnessError
from kvmnest.kvm.native import ffi, libc

SA_RESTART = 0x10000000


@cache
def kick_signal() -> int:
    """Number of the kick signal; installs its handler on first use.

    It is the highest real-time signal with the default action. Raises HarnessError if the
    process uses all of them.
    """
    import signal  # 1 ms of enums that only a kick needs

    current = ffi.new("struct sigaction *")
    for number in range(signal.SIGRTMAX, signal.SIGRTMIN - 1, -1):
        libc.sigaction(number, ffi.NULL, current)
        if current.sa_handler == ffi.NULL:
            action = ffi.new("struct sigaction *")
            action.sa_handler = ffi.cast("void *", ffi.addressof(libc, "abs"))
            # A kick that comes late must not disturb other system calls. KVM_RUN itself returns
            # EINTR regardless of this flag.
            action.sa_flags = SA_RESTART
            libc.sigaction(number, action, ffi.NULL)
            return number
    raise HarnessError("no real-time signal is free to kick a vCPU with")
