"""PID 1 of the lab's guest: load KVM, run the command, send what it says out of the machine.

It runs at about 100 million instructions a second, so it imports next to nothing. What to do
comes as a marshalled dict in ``/kvmnest/job`` (host and guest run the same Python).
"""

from __future__ import annotations

import ctypes
import errno
import marshal
import mmap
import os
import select
import sys
import time

from kvmnest.lab import channel

TYPE_CHECKING = False  # importing typing would cost the guest a tenth of a second
if TYPE_CHECKING:
    from typing import Any

EVENTS_PATH = "/run/kvmnest-events"
JOB_PATH = "/kvmnest/job"

_SYS_FINIT_MODULE = 313
_O_KMSG = os.O_RDONLY | os.O_NONBLOCK

# void out(rdi bytes, rsi count): mov rcx,rsi; mov rsi,rdi; mov dx,0xe9; rep outsb; ret
_OUT_CODE = bytes.fromhex("4889f1 4889fe 66bae900 f36e c3")

_libc = ctypes.CDLL(None, use_errno=True)


class Port:
    """Bochs' debug port 0xE9: the emulator copies each byte written there to its stdout."""

    def __init__(self) -> None:
        """Get access to the port and map the few instructions that Python lacks."""
        if _libc.ioperm(ctypes.c_ulong(0xE9), ctypes.c_ulong(1), 1):
            raise OSError(ctypes.get_errno(), "ioperm")
        self._page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        self._page.write(_OUT_CODE)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._page))
        self._out = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_size_t)(address)

    def send(self, kind: int, payload: bytes) -> None:
        """Send ``payload`` as one frame, or several if it is long."""
        for at in range(0, max(1, len(payload)), channel.MAX_PAYLOAD):
            data = channel.frame(kind, payload[at : at + channel.MAX_PAYLOAD])
            self._out(data, len(data))


def mount(kind: str, where: str, options: str = "") -> None:
    """Mount a file system of the kernel. Raises OSError."""
    os.makedirs(where, exist_ok=True)
    name = kind.encode()
    if _libc.mount(name, where.encode(), name, ctypes.c_ulong(0), options.encode()):
        raise OSError(ctypes.get_errno(), f"mount {kind}", where)


def load_module(path: str, params: str) -> int:
    """Load one kernel module with ``params``; returns 0 or an errno."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if _libc.syscall(_SYS_FINIT_MODULE, fd, params.encode(), 0) == 0:
            return 0
        return ctypes.get_errno()
    finally:
        os.close(fd)


def _read_kmsg(fd: int, max_level: int) -> bytes:
    """Kernel messages of ``max_level`` or more severe that came since the last call."""
    found: list[bytes] = []
    while True:
        try:
            record = os.read(fd, 8192)
        except BlockingIOError:
            return b"".join(found)
        except OSError as e:
            if e.errno == errno.EPIPE:  # overwritten before it was read: go on with the next
                continue
            raise
        head, _, text = record.partition(b";")
        priority, _, stamp, *_ = head.split(b",")
        if int(priority) & 7 <= max_level:
            line = text.split(b"\n", 1)[0]
            found.append(b"[%12.6f] %s\n" % (int(stamp) / 1e6, line))


def _load_modules(job: dict[str, Any], port: Port, kmsg: int) -> bool:
    for path, params in job["modules"]:
        error = load_module(path, params)
        if error and error != errno.EEXIST:
            log = _read_kmsg(kmsg, 7)
            port.send(channel.MODULE_ERROR, marshal.dumps((os.path.basename(path), error, log)))
            return False
    return True


def _parameters(module: str) -> dict[str, str]:
    where = f"/sys/module/{module}/parameters"
    found = {}
    for name in sorted(os.listdir(where)) if os.path.isdir(where) else ():
        try:
            with open(f"{where}/{name}") as f:
                found[name] = f.read().strip()
        except OSError:
            continue
    return found


def _spawn(job: dict[str, Any], outputs: list[int]) -> int:
    """Start the command with stdout and stderr on ``outputs``; returns its pid."""
    actions = [
        (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
        (os.POSIX_SPAWN_DUP2, outputs[0], 1),
        (os.POSIX_SPAWN_DUP2, outputs[1], 2),
    ]
    argv = job["argv"]
    os.chdir(job["cwd"])
    return os.posix_spawnp(argv[0], argv, job["env"], file_actions=actions, setsigdef=[13, 25])


def _pump(job: dict[str, Any], port: Port, kmsg: int) -> int:
    """Run the command and send all its streams out; returns its wait status."""
    out, err, events = os.pipe(), os.pipe(), os.open(EVENTS_PATH, os.O_RDWR | os.O_NONBLOCK)
    kinds = {out[0]: channel.STDOUT, err[0]: channel.STDERR, events: channel.EVENT}
    for fd in kinds:
        os.set_blocking(fd, False)
    pid = _spawn(job, [out[1], err[1]])
    os.close(out[1])
    os.close(err[1])
    child = os.pidfd_open(pid)
    poll = select.poll()
    for fd in (*kinds, kmsg, child):
        poll.register(fd, select.POLLIN)
    done = False
    while not done:
        ready = {fd for fd, _ in poll.poll()}
        done = child in ready
        # Kernel messages first: a warning must arrive before the result of the case it hit.
        log = _read_kmsg(kmsg, job["log_level"])
        if log:
            port.send(channel.KLOG, log)
        for fd, kind in kinds.items():
            while fd in ready or done:
                try:
                    data = os.read(fd, channel.MAX_PAYLOAD)
                except BlockingIOError:
                    break
                if not data:
                    if fd in ready and not done:
                        poll.unregister(fd)
                    break
                port.send(kind, data)
    return os.waitpid(pid, 0)[1]


def _run(port: Port) -> None:
    with open(JOB_PATH, "rb") as f:
        job = marshal.load(f)
    mount("proc", "/proc")
    mount("sysfs", "/sys")
    mount("devtmpfs", "/dev")
    mount("tmpfs", "/tmp")
    os.makedirs("/run", exist_ok=True)
    os.makedirs(job["cwd"], exist_ok=True)
    os.mkfifo(EVENTS_PATH)
    kmsg = os.open("/dev/kmsg", _O_KMSG)
    if not _load_modules(job, port, kmsg):
        return
    info = {
        "release": os.uname().release,
        "uptime": time.clock_gettime(time.CLOCK_BOOTTIME),
        "cpus": os.cpu_count(),
        "params": {m: _parameters(m) for m in ("kvm", "kvm_intel")},
    }
    port.send(channel.READY, marshal.dumps(info))
    port.send(channel.EXIT, marshal.dumps(_pump(job, port, kmsg)))


def main() -> None:
    """Never returns: the host ends the machine after the last frame, or sees the failure."""
    port = Port()
    try:
        _run(port)
    except BaseException as e:
        at = e.__traceback__
        while at is not None and at.tb_next is not None:
            at = at.tb_next
        line = at.tb_lineno if at is not None else 0
        port.send(channel.FAILED, f"{type(e).__name__}: {e} (guest.py line {line})".encode())
    sys.stdout.flush()
    while True:
        time.sleep(3600)
