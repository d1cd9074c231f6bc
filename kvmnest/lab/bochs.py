"""Run one Bochs: its configuration, its terminal, its end.

Debian's Bochs has no display that shows nothing; its VNC display would listen on every
interface. The terminal display gets a pseudo terminal of ours, and the guest never draws.
"""

import contextlib
import ctypes
import fcntl
import os
import pty
import select
import shutil
import signal
import subprocess
import tempfile
import termios
import time
import tty
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvmnest.lab import cache
from kvmnest.lab.errors import LabSetupError
from kvmnest.lab.image import INFO
from kvmnest.lab.snapshot import ADDR_NO_RANDOMIZE

CPU_MODEL = "corei7_skylake_x"
IPS = 100_000_000
_PR_SET_PDEATHSIG = 1
_PREFIX = "kvmnest-lab-"

_CONFIG = """\
cpu: model={model}, count={cpus}, ips={ips}, reset_on_triple_fault=0, msrs=msrs.def
memory: guest={memory}, host={memory}
romimage: file=boot.rom
optramimage1: file=memory.img, address={info:#x}
pci: enabled=0
ata0: enabled=0
ata1: enabled=0
com1: enabled=1, mode=file, dev=console.log
sound: driver=dummy
speaker: enabled=0
clock: sync=none, time0=local
display_library: {display}
log: bochs.log
panic: action=fatal
error: action=report
info: action=ignore
debug: action=ignore
port_e9_hack: enabled=1
"""

# MSRs that a PC's firmware leaves behind and Bochs does not have: address, type, reset value,
# reserved and ignored bits (each high, low half). Without "fast strings" the kernel copies memory
# by loops; without a recent microcode revision it does not trust the TSC deadline timer.
MSRS = """\
0x008b 0 02000065 00000000 00000000 00000000 ffffffff ffffffff
"""


@dataclass(frozen=True)
class Emulator:
    """A Bochs binary and the two things about its build that matter here."""

    path: str
    debugger: bool
    display: str

    def stamp(self) -> str:
        """What identifies this build: another one cannot use its snapshots."""
        status = os.stat(self.path)
        return f"{self.path} {status.st_size} {status.st_mtime_ns} {self.display}"


def locate(path: str | None = None) -> Emulator:
    """Find Bochs (``path``, or ``bochs`` in PATH) and ask it what it was built with.

    Raises LabSetupError if it is missing or does not run.
    """
    program = path or "bochs"
    found = shutil.which(program)
    if found is None:
        hint = "no such program" if path else "apt-get install bochs bochs-term"
        raise LabSetupError(f"{program} not found: {hint}")
    try:
        done = subprocess.run(
            [found, "--help"],
            capture_output=True,
            timeout=20,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired) as e:
        raise LabSetupError(f"{found} does not run: {e}") from e
    text = (done.stdout + done.stderr).decode(errors="replace")
    if "Bochs" not in text:
        raise LabSetupError(f"{found} is no Bochs")
    plugins = Path("/usr/lib/x86_64-linux-gnu/bochs/plugins/libbx_term_gui.so")
    if path is None and not plugins.exists():
        raise LabSetupError("Bochs has no terminal display: apt-get install bochs-term")
    # A build with the display that shows nothing names its class, even when it is stripped.
    display = "nogui" if b"bx_nogui_gui_c" in Path(found).read_bytes() else "term"
    return Emulator(found, "-rc filename" in text, display)


def _child_setup(saved: bool) -> Callable[[], None]:
    """For the child before exec: the kernel kills it when this process dies."""
    libc = ctypes.CDLL(None)
    parent = os.getpid()

    def setup() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if saved:
            libc.personality(ADDR_NO_RANDOMIZE)
        if os.getppid() != parent:
            os._exit(1)

    return setup


def configuration(emulator: Emulator, memory: int, cpus: int) -> str:
    """The bochsrc."""
    return _CONFIG.format(
        model=CPU_MODEL, cpus=cpus, ips=IPS, memory=memory, info=INFO, display=emulator.display
    )


def _sweep() -> None:
    """Remove folders whose owner was killed: the lock inside is free again."""
    for folder in Path(tempfile.gettempdir()).glob(_PREFIX + "*"):
        with contextlib.suppress(OSError):
            if folder.stat().st_uid != os.getuid():
                continue
            fd = os.open(folder / "lock", os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(fd)


class Bochs:
    """One emulator in a private folder: write ``memory.img`` and ``boot.rom`` there, start it.

    ``output`` is the file descriptor its stdout comes from. As a context manager it leaves
    neither process nor folder behind.
    """

    def __init__(self, emulator: Emulator) -> None:
        """Make the folder. Raises LabSetupError if that is impossible."""
        self.emulator = emulator
        self.output = -1
        self._process: subprocess.Popen[bytes] | None = None
        self._attributes: list[Any] = []
        try:
            _sweep()
            # It gets the name that _sweep looks for when its lock is held, not before.
            made = Path(tempfile.mkdtemp(prefix=f".{_PREFIX}"))
            self._lock = os.open(made / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            self.folder = made.rename(made.with_name(made.name.removeprefix(".")))
        except OSError as e:
            raise LabSetupError(cache.describe(e, "making the lab's folder")) from e

    def __enter__(self) -> "Bochs":
        """Return self."""
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the emulator and remove its folder."""
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._lock)

    def start(self, memory: int, cpus: int, *, saved: bool = False) -> None:
        """Start emulating ``memory`` MiB and ``cpus`` CPUs.

        With ``saved`` it stops at the debugger's prompt, at addresses that are the same in each
        process, see kvmnest.lab.snapshot. Raises LabSetupError if it cannot be started.
        """
        (self.folder / "bochsrc").write_text(configuration(self.emulator, memory, cpus))
        (self.folder / "msrs.def").write_text(MSRS)
        (self.folder / "debugger").write_text("c\n")
        argv = [self.emulator.path, "-q", "-f", "bochsrc"]
        if self.emulator.debugger and not saved:
            argv += ["-rc", "debugger"]
        self.output, terminal = pty.openpty()
        try:
            # Neither the terminal nor curses may change a byte of what the guest says.
            tty.setraw(terminal)
            attributes = termios.tcgetattr(terminal)
            attributes[1] &= ~termios.OPOST
            termios.tcsetattr(terminal, termios.TCSANOW, attributes)
            self._attributes = attributes
            with open(self.folder / "stderr.log", "wb") as errors:
                self._process = subprocess.Popen(
                    argv,
                    cwd=self.folder,
                    stdin=terminal,
                    stdout=terminal,
                    stderr=errors,
                    env={"PATH": os.defpath, "TERM": "vt100", "HOME": "/", "LANG": "C"},
                    start_new_session=True,
                    preexec_fn=_child_setup(saved),
                )
        except OSError as e:
            raise LabSetupError(f"cannot start {self.emulator.path}: {e.strerror}") from e
        finally:
            os.close(terminal)

    def wait_prompt(self, seconds: float = 20.0) -> bool:
        """Wait for the debugger's first prompt; False if it does not come."""
        limit, seen = time.monotonic() + seconds, b""
        while b"<bochs:1>" not in seen:
            if self.ended() or time.monotonic() > limit:
                return False
            if select.select([self.output], [], [], 0.1)[0]:
                with contextlib.suppress(OSError):
                    seen += os.read(self.output, 4096)
        return True

    def go_on(self) -> None:
        """Leave the prompt."""
        os.write(self.output, b"c\n")

    def reset_terminal(self) -> None:
        """Undo what the prompt did to the terminal."""
        termios.tcsetattr(self.output, termios.TCSANOW, self._attributes)

    @property
    def pid(self) -> int:
        """Process id, 0 before the start."""
        return self._process.pid if self._process is not None else 0

    def ended(self) -> bool:
        """Whether the process is gone."""
        return self._process is None or self._process.poll() is not None

    def console(self) -> str:
        """The guest kernel's log so far."""
        return self._text("console.log").replace("\r", "")

    def console_size(self) -> int:
        """Bytes of kernel log so far: a cheap sign of life."""
        try:
            return (self.folder / "console.log").stat().st_size
        except OSError:
            return 0

    def cpu_seconds(self) -> float:
        """CPU time the emulator has used."""
        try:
            fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def drop_images(self) -> None:
        """Delete the memory image and the ROM, which Bochs reads once at its start."""
        for name in ("memory.img", "boot.rom"):
            (self.folder / name).unlink(missing_ok=True)

    def verdict(self) -> str:
        """Why Bochs ended, in its own words (one line), or its status."""
        text = self._text("stderr.log") + self._text("bochs.log")
        message = text.partition("exiting with the following message:")[2].strip().splitlines()
        if message:
            return message[0]
        status = self._process.poll() if self._process is not None else None
        if status is not None and status < 0:
            return f"killed by {signal.Signals(-status).name}"
        return f"exit status {status}"

    def _text(self, name: str) -> str:
        try:
            return (self.folder / name).read_bytes().decode(errors="replace")
        except OSError:
            return ""

    def stop(self) -> None:
        """Kill the emulator's process group, if it still runs."""
        process = self._process
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            self._process = None
        if self.output >= 0:
            os.close(self.output)
            self.output = -1

    def wait_end(self, seconds: float) -> bool:
        """Wait until the process is gone; False if it still runs after ``seconds``."""
        limit = time.monotonic() + seconds
        while not self.ended() and time.monotonic() < limit:
            time.sleep(0.02)
        return self.ended()
