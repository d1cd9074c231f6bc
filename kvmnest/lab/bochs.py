"""Run one Bochs: its configuration, its terminal, its end.

Debian's Bochs has no display that shows nothing; its VNC display would listen on every
interface. The terminal display gets a pseudo terminal of ours, and the guest never draws.
"""

import contextlib
import errno
import os
import pty
import re
import select
import shutil
import termios
import time
import tty
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path

from kvmnest.lab import bochs_build, cpu_models
from kvmnest.lab.emulators import Picture, Running, version_text
from kvmnest.lab.errors import LabLost, LabSetupError
from kvmnest.lab.image import INFO, WAIT, WAIT_MARK, WAITING
from kvmnest.lab.snapshot import ADDR_NO_RANDOMIZE, SnapshotError, find_page

IPS = 100_000_000
_START_LIMIT = 60.0  # of its CPU seconds; it takes a fraction of one
_ASLEEP_LIMIT = 30.0  # of real seconds, if it uses no CPU

_CONFIG = """\
cpu: model={model}, count={cpus}, ips={ips}, reset_on_triple_fault=0, msrs=msrs.def
memory: guest={memory}, host={memory}
romimage: file=boot.rom
vgaromimage: file=vga.rom
pci: enabled=0
ata0: enabled=0
ata1: enabled=0
com1: enabled=1, mode=file, dev=console.log
clock: sync=none, time0=local
display_library: {display}
log: bochs.log
panic: action=fatal
error: action=report
info: action=ignore
debug: action=ignore
port_e9_hack: enabled=1
"""

_SOUND = "sound: driver=dummy\nspeaker: enabled=0\n"  # else it opens the host's device
_TERMINAL = Path("/usr/lib/x86_64-linux-gnu/bochs/plugins/libbx_term_gui.so")
_VMX = b"VMENTER FAIL"
_NO_SOUND = b"Bochs is not compiled with lowlevel sound support"
# What Bochs wants of a VGA BIOS, which the ROM never calls: signature, one block, a checksum of 0.
VGA_ROM = bytes([0x55, 0xAA, 1, 0xCB]).ljust(511, b"\0") + bytes([-(0x55 + 0xAA + 1 + 0xCB) & 0xFF])

# MSRs that a PC's firmware leaves behind and Bochs does not have: address, type, reset value,
# reserved and ignored bits (each high, low half). Without "fast strings" the kernel copies memory
# by loops; without a recent microcode revision it does not trust the TSC deadline timer.
MSRS = """\
0x008b 0 02000065 00000000 00000000 00000000 ffffffff ffffffff
"""


# Start code that costs much here and serves nothing that a KVM test uses: tracing, BTF for BPF,
# certificates, debug directories. Names that a kernel does not know are ignored by it.
_SKIPPED_INITCALLS = (
    "trace_eval_init", "init_trace_printk_function_export", "init_kprobe_trace",
    "ftrace_check_for_weak_functions", "tracer_init_tracefs", "load_system_certificate_list",
    "hugetlb_init", "xenbus_probe_backend_init", "slab_sysfs_init", "cubictcp_register",
    "bpf_rstat_kfunc_init", "bpf_key_sig_kfuncs_init", "kfunc_init", "bpf_prog_test_run_init",
    "bpf_tcp_ca_kfunc_init", "crypto_kdf108_init", "jent_mod_init",
    "bpf_dummy_struct_ops_init", "slab_late_init",
)  # fmt: skip
KERNEL_PARAMETERS = (
    "mitigations=off tsc=reliable tsc_early_khz=100000 lpj=400000 "
    "initcall_blacklist=" + ",".join(_SKIPPED_INITCALLS)
)


@dataclass(frozen=True)
class Emulator:
    """A Bochs binary, what matters here about its build, and the CPU model it is to emulate.

    ``repairs`` counts the repairs of its source, for one that was built here.
    """

    path: str
    version: str
    models: tuple[str, ...]
    model: cpu_models.Model
    debugger: bool
    display: str
    sound: bool
    repairs: int = 0
    boot = "lab"
    where = "in the lab"

    @property
    def kernel_parameters(self) -> str:
        """Separated by spaces."""
        bits = ",".join(map(str, self.model.clearcpuid))
        return " ".join([*([f"clearcpuid={bits}"] if bits else []), KERNEL_PARAMETERS])

    @property
    def cpu_emulator(self) -> str:
        """Name and version, with the number of repairs: "bochs 3.0", "bochs 3.0-26"."""
        return f"bochs {self.version}" + (f"-{self.repairs}" if self.repairs else "")

    def process(self) -> "Bochs":
        """A process of it, not yet started. Raises LabSetupError."""
        return Bochs(self)

    def stamp(self) -> str:
        """What identifies this build: another one cannot use its snapshots."""
        status = os.stat(self.path)
        return f"{self.path} {status.st_size} {status.st_mtime_ns} {self.display}"


def locate(path: str | None = None, model: str | None = None, cpus: int = 1) -> Emulator:
    """Find Bochs and ask it what it was built with.

    ``path``, or the one that ``kvmnest lab build`` made, or ``bochs`` in PATH; with ``cpus`` above
    1 one that was built for several. ``model`` is the CPU model (default: the best it has).
    Raises LabSetupError if there is none or it does not run, UsageError if it has no such model.
    """
    program = path or built(cpus) or "bochs"
    found = shutil.which(program)
    if found is None:
        hint = "no such program" if path else "apt-get install bochs bochs-term"
        raise LabSetupError(f"{program} not found: {hint}")
    text = version_text(found, "--help")
    if "Bochs" not in text:
        raise LabSetupError(f"{found} is not Bochs")
    if program == "bochs" and not _TERMINAL.exists():
        raise LabSetupError("Bochs has no terminal display: apt-get install bochs-term")
    version = re.search(r"Bochs x86 Emulator (\d[\w.]*)", text)
    models = _models(found)
    # A build with the display that shows nothing names its class, even when it is stripped; one
    # with VMX holds its messages. Debian's program is a script that starts the binary.
    binary = Path(found).read_bytes()
    if binary.startswith(b"\x7fELF") and _VMX not in binary:
        raise LabSetupError(f"{found} was built without VMX: configure it with --enable-vmx=2")
    return Emulator(
        path=found,
        version=version[1] if version else "?",
        models=models,
        model=cpu_models.choose(model, version[1] if version else "", models),
        debugger="-rc filename" in text,
        display="nogui" if b"bx_nogui_gui_c" in binary else "term",
        sound=_NO_SOUND not in binary,
        repairs=int(bochs_build.notes(Path(found)).get("repairs", 0)),
    )


def built(cpus: int) -> str | None:
    """The program that ``kvmnest lab build`` made and that can emulate ``cpus`` CPUs."""
    variants = [True] if cpus > 1 else [False, True]
    found = (bochs_build.built_for_the_lab(smp) for smp in variants)
    return next((str(program) for program in found if program is not None), None)


def _models(program: str) -> tuple[str, ...]:
    """The CPU models that a Bochs has."""
    listing = version_text(program, "--help", "cpu").partition("Supported CPU models:")[2]
    return tuple(line for line in listing.splitlines() if re.fullmatch(r"\w+", line))


def configuration(emulator: Emulator, memory: int, cpus: int) -> str:
    """The bochsrc."""
    text = _CONFIG.format(
        model=emulator.model.name, cpus=cpus, ips=IPS, memory=memory, display=emulator.display
    )
    return text + (_SOUND if emulator.sound else "")


class _From:
    """A file as seen from a position on."""

    def __init__(self, file: RawIOBase, start: int) -> None:
        self._file, self._start, self._at = file, start, start

    def write(self, data: bytes) -> int:
        """Write all of it."""
        written = os.pwrite(self._file.fileno(), data, self._at)
        if written != len(data):
            raise OSError(errno.EFAULT, "not all of it is there")
        self._at += written
        return written

    def seek(self, position: int) -> int:
        """Move to a distance from the start."""
        self._at = self._start + position
        return position


class Bochs(Running):
    """One Bochs in a private folder."""

    def __init__(self, emulator: Emulator) -> None:
        """Make the folder. Raises LabSetupError if that is impossible."""
        super().__init__(emulator.path)
        self.emulator = emulator

    def clock(self) -> float:
        """Its CPU time, since it is never idle: a slow guest on a busy host is not a hang."""
        return self.cpu_seconds()

    def __enter__(self) -> "Bochs":
        """Return self."""
        return self

    def boot(self, memory: int, cpus: int, write: Picture) -> None:
        """Start it and give it the picture of memory; see ``Running.boot``."""
        self.start(memory, cpus)
        self.place(write)

    def start(self, memory: int, cpus: int, *, fixed: bool = False) -> None:
        """Start emulating ``memory`` MiB and ``cpus`` CPUs, up to where the ROM waits.

        With ``fixed`` everything lies at addresses that are the same in each process, see
        kvmnest.lab.snapshot. Raises LabSetupError if it cannot be started, LabLost if it ends.
        """
        (self.folder / "bochsrc").write_text(configuration(self.emulator, memory, cpus))
        (self.folder / "msrs.def").write_text(MSRS)
        (self.folder / "vga.rom").write_bytes(VGA_ROM)
        argv = ["-q", "-f", "bochsrc"]
        if self.emulator.debugger:
            (self.folder / "debugger").write_text("c\n")
            argv += ["-rc", "debugger"]
        self.output, terminal = pty.openpty()
        try:
            # Neither the terminal nor curses may change a byte of what the guest says.
            tty.setraw(terminal)
            attributes = termios.tcgetattr(terminal)
            attributes[1] &= ~termios.OPOST
            termios.tcsetattr(terminal, termios.TCSANOW, attributes)
            personality = ADDR_NO_RANDOMIZE if fixed else 0
            self._launch(argv, terminal, terminal, {"TERM": "vt100"}, personality)
        finally:
            os.close(terminal)
        self._wait_rom()

    def _wait_rom(self) -> None:
        started, seen = time.monotonic(), b""
        while WAITING not in seen:
            if select.select([self.output], [], [], 0.1)[0]:
                with contextlib.suppress(OSError):  # EIO: the terminal's other side is closed
                    seen += os.read(self.output, 4096)
                    continue
            if self.ended():
                raise LabLost(f"the emulator ended: {self.verdict()}")
            used, waited = self.clock(), time.monotonic() - started
            if used > _START_LIMIT or (waited > _ASLEEP_LIMIT and used < 1):
                raise LabLost(f"{self.emulator.path} does not execute the lab's ROM")

    def place(self, write: Picture) -> None:
        """Write the picture into the guest's memory, and let the ROM start its kernel.

        Raises LabSetupError if this system does not let us, or the memory is not found.
        """
        try:
            with open(f"/proc/{self.pid}/mem", "r+b", buffering=0) as memory:
                start = find_page(self.pid, WAIT_MARK)
                write(_From(memory, start - WAIT + INFO))
                os.pwrite(memory.fileno(), b"\1", start + len(WAIT_MARK))
        except (OSError, SnapshotError) as e:
            raise LabSetupError(f"cannot write into the emulator's memory: {e}") from e

    def verdict(self) -> str:
        """Why Bochs ended, in its own words (one line), or its status."""
        text = self._text("stderr.log") + self._text("bochs.log")
        message = text.partition("exiting with the following message:")[2].strip().splitlines()
        return message[0] if message else self._status()
