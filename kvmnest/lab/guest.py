"""PID 1 of the lab's guest: load KVM, run the command, send what it says out of the machine.

It runs at about 100 million instructions a second, so it imports next to nothing. What to do
comes as a marshalled dict (host and guest run the same Python): from ``/kvmnest/job``, or, if
there is none, through a mailbox in memory. The second way lets the host save the machine with
KVM loaded and everything imported, and only then say what to do, again and again.
"""

from __future__ import annotations

import atexit
import ctypes
import errno
import marshal
import mmap
import os
import select
import sys
import time

from kvmnest import kmsg
from kvmnest.lab import channel

TYPE_CHECKING = False  # importing typing would cost the guest a tenth of a second
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import Any

EVENTS_PATH = "/run/kvmnest-events"
JOB_PATH = "/kvmnest/job"

# Loaded before the machine is saved, so that no run waits for it: what pytest and kvmnest import.
PRELOAD = (
    "_cffi_backend", "argparse", "ctypes", "dataclasses", "decimal", "elftools.elf.elffile",
    "enum", "fcntl", "importlib.metadata", "importlib.resources", "inspect", "json", "logging",
    "pdb", "pytest", "runpy", "shutil", "struct", "subprocess", "tempfile", "traceback", "typing",
    "unittest", "_pytest.assertion.rewrite", "_pytest.config",
)  # fmt: skip
MAILBOX_PAGES = 4096
MAILBOX_INTERRUPT = 48  # offset in page 0 of the byte by which the host interrupts
MAILBOX_MASK = b"kvmnest mailbox!"  # the mark is this with all bits of 0x5a flipped

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


def _load_modules(modules: list[tuple[str, str]], port: Port, log_fd: int) -> bool:
    for path, params in modules:
        error = load_module(path, params)
        if error and error != errno.EEXIST:
            log = kmsg.read(log_fd, 7)
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


def _python_command(argv: list[str]) -> tuple[str, list[str]] | None:
    """(code, sys.argv) of a command that this very interpreter can run; None for others."""
    if argv[0] in ("python", "python3") and len(argv) > 2:
        if argv[1] == "-c":
            return argv[2], ["-c", *argv[3:]]
        if argv[1] == "-m":
            code = "import runpy; runpy.run_module({!r}, run_name='__main__', alter_sys=True)"
            return code.format(argv[2]), ["-m", *argv[3:]]
    return None


def _become(job: dict[str, Any], code: str, argv: list[str]) -> None:
    """Run Python code in this forked child as a new interpreter would, its modules loaded."""
    if job["mtimes"]:  # kvmnest came with this job: only the modules of the boot are loaded
        _forget_kvmnest()
    os.environ.clear()
    os.environ.update(job["env"])
    sys.argv = argv
    sys.path[0] = "" if argv[0] == "-c" else os.getcwd()
    sys.path_importer_cache.clear()
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    main = type(sys)("__main__")
    main.__dict__["__builtins__"] = __builtins__
    sys.modules["__main__"] = main
    exec(compile(code, "<string>", "exec"), main.__dict__)


def _exit_status(error: SystemExit) -> int:
    if error.code is None or isinstance(error.code, int):
        return (error.code or 0) & 0xFF
    print(error.code, file=sys.stderr)
    return 1


def _fork(job: dict[str, Any], outputs: tuple[int, int], code: str, argv: list[str]) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        null = os.open("/dev/null", os.O_RDONLY)
        for old, new in ((null, 0), (outputs[0], 1), (outputs[1], 2)):
            os.dup2(old, new)
        os.closerange(3, 256)
        _become(job, code, argv)
        status = 0
    except SystemExit as e:
        status = _exit_status(e)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        try:
            threading = sys.modules.get("threading")
            if threading is not None:
                threading._shutdown()
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            # Freeing every object of an interpreter that ends would take half a second.
            os._exit(status)


def _spawn(job: dict[str, Any], outputs: tuple[int, int]) -> int:
    """Start the command with stdout and stderr on ``outputs``; returns its pid."""
    argv = job["argv"]
    os.chdir(job["cwd"])
    python = _python_command(argv)
    if python is not None:
        return _fork(job, outputs, *python)
    actions = [
        (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
        (os.POSIX_SPAWN_DUP2, outputs[0], 1),
        (os.POSIX_SPAWN_DUP2, outputs[1], 2),
    ]
    return os.posix_spawnp(argv[0], argv, job["env"], file_actions=actions, setsigdef=[13, 25])


def _pump(job: dict[str, Any], port: Port, log_fd: int) -> int:
    """Run the command and send all its streams out; returns its wait status."""
    out, err, events = os.pipe(), os.pipe(), os.open(EVENTS_PATH, os.O_RDWR | os.O_NONBLOCK)
    kinds = {out[0]: channel.STDOUT, err[0]: channel.STDERR, events: channel.EVENT}
    for fd in kinds:
        os.set_blocking(fd, False)
    pid = _spawn(job, (out[1], err[1]))
    os.close(out[1])
    os.close(err[1])
    child = os.pidfd_open(pid)
    poll = select.poll()
    for fd in (*kinds, log_fd, child):
        poll.register(fd, select.POLLIN)
    done = False
    while not done:
        ready = {fd for fd, _ in poll.poll()}
        done = child in ready
        # Kernel messages first: a warning must arrive before the result of the case it hit.
        log = kmsg.read(log_fd, job["log_level"])
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


def _write_files(files: dict[str, bytes], mtimes: dict[str, int]) -> None:
    made = set()
    for path, content in files.items():
        folder = path.rpartition("/")[0]
        if folder not in made:
            os.makedirs(folder or "/", exist_ok=True)
            made.add(folder)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o755)
        os.write(fd, content)
        os.close(fd)
    for path, mtime in mtimes.items():
        os.utime(path, (mtime, mtime))


def _preload(names: Iterable[str]) -> None:
    for name in names:
        try:
            __import__(name)
        except Exception:  # the command shall meet the error, if it needs the module
            continue


def _load_kvmnest(job: dict[str, Any]) -> None:
    """Replace the few modules of the boot by all of kvmnest, and load some of it."""
    _write_files(job["files"], job["mtimes"])
    _forget_kvmnest()
    sys.path[0] = "/run"
    sys.path_importer_cache.clear()
    _preload(job["preload"])


def _forget_kvmnest() -> None:
    for name in [n for n in sys.modules if n.partition(".")[0] == "kvmnest"]:
        del sys.modules[name]


class Mailbox:
    """Marked pages of memory that the host finds in the emulator, and writes to.

    Another ``key`` makes another ``mark``, for a second mailbox of the same guest.
    """

    def __init__(self, pages: int = MAILBOX_PAGES, key: int = 0x5A) -> None:
        self._pages = mmap.mmap(-1, pages * 4096)
        self.pages = pages
        self.mark = bytes(byte ^ key for byte in MAILBOX_MASK)

    def wait(self, tell: Callable[[bytes], object]) -> dict[str, Any]:
        """Let ``tell`` give the host the mark, and wait for mail."""
        self._pages[32:49] = bytes(17)
        for page in range(self.pages):
            self._pages[page * 4096 : page * 4096 + 20] = self.mark + page.to_bytes(4, "little")
        tell(self.mark)
        while not self._pages[40]:
            pass
        size = int.from_bytes(self._pages[32:40], "little")
        mail: dict[str, Any] = marshal.loads(self._pages[4096 : 4096 + size])
        return mail

    def interrupted(self) -> bool:
        """Whether the host has interrupted (``Lab.interrupt``) since the last question."""
        seen = self._pages[MAILBOX_INTERRUPT] != 0
        self._pages[MAILBOX_INTERRUPT] = 0
        return seen


def _mails(port: Port) -> Iterator[dict[str, Any]]:
    """What the host asks for: the job, or, one after the other, steps to it and the job."""
    if os.path.exists(JOB_PATH):
        with open(JOB_PATH, "rb") as f:
            yield marshal.load(f)
            return
    _preload(PRELOAD)
    config = sys.modules.get("_pytest.config")
    _preload(f"_pytest.{plugin}" for plugin in getattr(config, "default_plugins", ()))
    mailbox = Mailbox()

    def tell(mark: bytes) -> None:
        port.send(channel.SNAPSHOT, mark)

    while True:
        yield mailbox.wait(tell)


def _run(port: Port) -> None:
    mount("proc", "/proc")
    mount("sysfs", "/sys")
    mount("devtmpfs", "/dev")
    mount("tmpfs", "/tmp")
    os.makedirs("/run", exist_ok=True)
    os.mkfifo(EVENTS_PATH)
    log_fd = os.open(kmsg.PATH, _O_KMSG)
    for job in _mails(port):
        if "preload" in job:
            _load_kvmnest(job)
            continue
        _write_files(job["files"], job["mtimes"])
        if "modules" in job:
            received, log = time.clock_gettime(time.CLOCK_BOOTTIME), kmsg.read(log_fd, kmsg.WARNING)
            if not _load_modules(job["modules"], port, log_fd):
                return
            params = {module: _parameters(module) for module in ("kvm", "kvm_intel")}
        if "argv" in job:
            break
    os.makedirs(job["cwd"], exist_ok=True)
    info = {
        "release": os.uname().release,
        "received": received,
        "uptime": time.clock_gettime(time.CLOCK_BOOTTIME),
        "cpus": os.cpu_count(),
        "params": params,
    }
    port.send(channel.READY, marshal.dumps(info))
    if log:
        port.send(channel.KLOG, log)
    port.send(channel.EXIT, marshal.dumps(_pump(job, port, log_fd)))


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
