"""What the lab needs of an emulator: one that is installed, and one that runs."""

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from kvmnest import scratch
from kvmnest.lab import cache, tools
from kvmnest.lab.errors import LabSetupError
from kvmnest.lab.image import Sink

#: Writes the picture of guest memory, see kvmnest.lab.image.
Picture = Callable[[Sink], None]


class Installed(Protocol):
    """An emulator of this machine that can boot kernels.

    ``boot`` is its ``Choice.boot``, ``where`` what is said of a kernel that it boots ("in the
    lab"), ``kernel_parameters`` go to the kernel's command line.
    """

    @property
    def boot(self) -> str:
        """Also the name of the target that runs cases in it."""
        ...

    @property
    def where(self) -> str:
        """In words."""
        ...

    @property
    def kernel_parameters(self) -> str:
        """Separated by spaces."""
        ...

    @property
    def cpu_emulator(self) -> str:
        """Name and version of what emulates the CPU ("bochs 3.0"), "" where the host's own runs."""
        ...

    def process(self) -> "Running":
        """A process of it, not yet started. Raises LabSetupError."""
        ...


@dataclass(frozen=True)
class Choice:
    """Which emulator is to boot a kernel; can be sent to another machine.

    ``boot`` is "lab" (Bochs, which emulates VT-x) or "qemu" (KVM of this machine, which must offer
    VMX to its guests), ``program`` its file, if it is not to be looked up in PATH.
    ``accelerator`` is QEMU's: "tcg" needs no KVM, but its CPU has no VMX. ``cpu_model`` is Bochs'
    (default: the one on which most cases run).
    """

    boot: str = "lab"
    program: str | None = None
    accelerator: str = "kvm"
    cpu_model: str | None = None


BOCHS = Choice()


def version_text(program: str, *options: str) -> str:
    """What ``program`` prints for ``options``. Raises LabSetupError if it does not run."""
    try:
        done = subprocess.run(
            [program, *options],
            capture_output=True,
            timeout=20,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired) as e:
        raise LabSetupError(f"{program} does not run: {e}") from e
    return (done.stdout + done.stderr).decode(errors="replace")


class Running(ABC):
    """One emulator in a private folder: write ``boot.rom`` there, boot it.

    ``output`` is the file descriptor that the guest's bytes to port 0xE9 come from. As a context
    manager it leaves neither process nor folder behind.
    """

    def __init__(self, program: str) -> None:
        """Make the folder. Raises LabSetupError if that is impossible."""
        self.output = -1
        self._program = program
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self._scratch = scratch.Folder(self.stop)
            self.folder = self._scratch.path
        except OSError as e:
            raise LabSetupError(cache.describe(e, "making the lab's folder")) from e

    def __enter__(self) -> "Running":
        """Return self."""
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the emulator and remove its folder."""
        self.stop()
        self._scratch.remove()

    @abstractmethod
    def boot(self, memory: int, cpus: int, write: Picture) -> None:
        """Start emulating ``memory`` MiB and ``cpus`` CPUs with the picture that ``write`` makes.

        The guest's console goes to ``console.log``. Raises LabSetupError if it cannot be started,
        LabLost if it ends at once, OSError if there is no room.
        """

    @abstractmethod
    def verdict(self) -> str:
        """Why the emulator ended, in its own words (one line), or its status."""

    def stuck(self) -> str:
        """Why the guest cannot go on though the emulator still runs (one line); "" if it can."""
        return ""

    def _launch(
        self,
        argv: Sequence[str],
        stdin: int,
        stdout: int,
        env: Mapping[str, str],
        personality: int = 0,
        files: Sequence[int] = (),
    ) -> None:
        """Start the program in the folder, its stderr in ``stderr.log``.

        It inherits the file descriptors ``files``, and has the personality(2) if it is not 0.
        """
        libc = ctypes.CDLL(None)
        try:
            with open(self.folder / "stderr.log", "wb") as errors:
                self._process = tools.start(
                    [self._program, *argv],
                    lambda: libc.personality(personality) if personality else None,
                    cwd=self.folder,
                    stdin=stdin,
                    stdout=stdout,
                    stderr=errors,
                    env={"PATH": os.defpath, "HOME": "/", "LANG": "C", **env},
                    start_new_session=True,
                    pass_fds=files,
                )
        except OSError as e:
            raise LabSetupError(f"cannot start {self._program}: {e.strerror}") from e

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

    def clock(self) -> float:
        """Seconds by which the guest's silence is measured, from any beginning."""
        return time.monotonic()

    def cpu_seconds(self) -> float:
        """CPU time the emulator has used."""
        try:
            fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def drop_images(self) -> None:
        """Delete the memory image and the ROM, which are read once, at the start."""
        for name in ("memory.img", "boot.rom"):
            (self.folder / name).unlink(missing_ok=True)

    def _status(self) -> str:
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
