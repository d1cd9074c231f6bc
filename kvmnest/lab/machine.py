"""``Lab``: boot a kernel in an emulator, run a command in it, stream out what it says."""

import contextlib
import marshal
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvmnest import kmsg
from kvmnest.errors import UsageError
from kvmnest.lab import bochs, build, cache, image, kernels, plan, rootfs, snapshot
from kvmnest.lab.bochs import Bochs
from kvmnest.lab.emulators import BOCHS, Choice, Installed, Running
from kvmnest.lab.errors import LabRunError, LabSetupError
from kvmnest.lab.guest import MAILBOX_INTERRUPT
from kvmnest.lab.locate import locate
from kvmnest.lab.saved import SavedBoots
from kvmnest.lab.session import Session, Sink, Times
from kvmnest.lab.snapshot import SnapshotError

# Each emulator has its own to add.
KERNEL_PARAMETERS = (
    "console=ttyS0,115200 quiet nokaslr no_timer_check random.trust_cpu=on panic=-1 reboot=t "
    # What runs on after an oops tells nothing, and may hang on a lock that the dead task held.
    "oops=panic cryptomgr.notests"
)
_USUAL = {"nested": "1"}
GUEST_ENV = {
    "PATH": "/usr/bin:/bin",
    "HOME": "/root",
    "LANG": "C.UTF-8",
    "PYTHONPATH": f"/{rootfs.SITE}",
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONNOUSERSITE": "1",
    # A CPU without RDRAND leaves the kernel without random numbers when Python starts.
    "PYTHONHASHSEED": "0",
}


def _ignore(_: bytes) -> None:
    pass


def _write_out(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def write_error(data: bytes) -> None:
    """A sink for what a command of the guest writes to its stderr: ours."""
    sys.stderr.buffer.write(data)
    sys.stderr.buffer.flush()


class Lab:
    """A kernel and its KVM parameters; each ``run`` boots it anew.

    ``kernel`` is a SPEC (see kvmnest.lab.kernels), ``kvm_params`` module parameters
    (``nested=1`` unless given), ``kvm_modules`` a directory whose kvm.ko and kvm-intel.ko are
    loaded instead of the kernel's own, ``emulator`` what boots it: a choice among those that
    kvmnest knows, or any other that does what ``Installed`` asks for. The guest gets at least
    ``memory`` MiB. Preparing happens here: raises LabSetupError, KernelSpecError or UsageError.

    With Bochs the first boot of a kernel is saved, and again with its KVM loaded; later runs
    continue from there. With ``kvm_modules`` or ``kvm_params``, which change from run to run, they
    load KVM anew. ``snapshots=False`` boots from cold each time.
    """

    def __init__(
        self,
        kernel: str | None = None,
        *,
        kvm_params: Mapping[str, str] | None = None,
        kvm_modules: str | os.PathLike[str] | None = None,
        cpus: int = 1,
        emulator: Choice | Installed = BOCHS,
        memory: int = 0,
        snapshots: bool = True,
    ) -> None:
        """Resolve the kernel and build what is not yet cached."""
        if not 1 <= cpus <= 8:
            raise UsageError(f"the lab has 1 to 8 CPUs, not {cpus}")
        started = time.monotonic()
        self.cpus = cpus
        self.emulator = locate(emulator, cpus) if isinstance(emulator, Choice) else emulator
        # What can be wrong at once comes before a kernel that may have to be fetched.
        replaced = plan.replacements(Path(kvm_modules)) if kvm_modules is not None else []
        self.kernel = kernels.resolve(kernel)
        self.params = _USUAL | dict(kvm_params or {})
        plan.require_built_for(self.kernel, replaced)
        files = {**self.kernel.modules, **{module.name: module.path for module in replaced}}
        self._modules, self._arguments = plan.plan(self.kernel, files, self.params)
        self._layers = [rootfs.python_layer(), rootfs.site_layer(), rootfs.boot_layer()]
        self._kvmnest = rootfs.kvmnest_files()
        self._kvm = self._kvm_loading()
        size = sum(layer.path.stat().st_size for layer in self._layers)
        self._memory = max(memory, image.memory_for(self.kernel.end, size))
        usual = not replaced and self.params == _USUAL
        self._saved = self._saved_boots(keep_kvm=usual) if snapshots else None
        self._session: Session | None = None
        self._running: Running | None = None
        self._mailbox: list[int] = []
        self.times = Times(prepare=time.monotonic() - started)

    @property
    def info(self) -> dict[str, Any]:
        """What the guest of the last run reported: release, cpus, uptime, params."""
        return self._session.info if self._session is not None else {}

    @property
    def kernel_log(self) -> bytes:
        """Kernel messages of level warning and worse of the last run."""
        return self._session.kernel_log if self._session is not None else b""

    def run(
        self,
        argv: Sequence[str],
        *,
        on_event: Sink = _ignore,
        on_output: Sink = _write_out,
        on_error: Sink | None = None,
        on_kernel: Sink = _ignore,
        idle_limit: float | None = 120.0,
        limit: float | None = None,
        env: Mapping[str, str] | None = None,
        files: Mapping[str, bytes] | None = None,
    ) -> int:
        """Boot, run ``argv`` in the guest, return its exit status (negative: killed by signal).

        ``on_event`` gets each line that the command writes to ``guest.EVENTS_PATH``,
        ``on_output`` and ``on_error`` its stdout and stderr, ``on_kernel`` kernel warnings.
        ``idle_limit`` is how many seconds may pass without a sign of life (of Bochs' CPU time),
        ``limit`` how many altogether. ``files`` are put into the guest: absolute path -> content.
        Commands ``python3 -m`` and ``python3 -c`` run in a fork of the guest's first process,
        which has pytest and its like loaded.

        Raises LabPanic, LabHang, LabLost, LabModuleError with the console's tail.
        """
        job = self._job(argv, env or {}, files or {})
        self.times = Times(prepare=self.times.prepare)
        with self.emulator.process() as process:
            self._running, self._mailbox = process, []
            try:
                shutil.copyfile(build.build(), process.folder / "boot.rom")
                waiting = self._start(process, job)
            except OSError as e:
                raise LabSetupError(cache.describe(e, "writing the lab's memory image")) from e
            while True:
                self._session = session = Session(
                    self.times, on_event, on_output, on_error or on_output, on_kernel, waiting
                )
                try:
                    return session.follow(process, self.cpus, idle_limit, limit)
                except SnapshotError:
                    process.stop()
                    self._saved = None
                    waiting = self._start(process, job)

    def output(self, argv: Sequence[str], what: str, *, idle_limit: float = 120.0) -> bytes:
        """Run a command as ``run`` does and return its stdout.

        Raises LabRunError, which tells ``what`` failed and its last line, and what ``run`` raises.
        """
        output, errors = bytearray(), bytearray()
        status = self.run(
            argv, on_output=output.extend, on_error=errors.extend, idle_limit=idle_limit
        )
        if status:
            said = (errors or output).decode(errors="replace").strip()
            lines = said.splitlines() or [f"status {status}"]
            raise LabRunError(f"{what} failed in the lab: {lines[-1]}")
        return bytes(output)

    def post(self, mark: bytes, pages: int, mail: dict[str, Any]) -> None:
        """Give mail to the running guest, which waits at a ``guest.Mailbox`` of so many pages.

        To be called from ``on_event``. Raises LabRunError if the mailbox is not found.
        """
        assert self._running is not None
        pid = self._running.pid
        try:
            if not self._mailbox:
                self._mailbox = snapshot.find_mailbox(pid, mark, pages)
            snapshot.fill_mailbox(pid, self._mailbox, marshal.dumps(mail))
        except (SnapshotError, OSError) as e:
            raise LabRunError(f"cannot reach the lab's guest: {e}") from e

    def interrupt(self) -> None:
        """Set what ``guest.Mailbox.interrupted`` asks for, of the mailbox that got mail last.

        Also from a signal handler, while ``run`` follows the guest; it does nothing before the
        first ``post``. A later ``post`` does not undo it.
        """
        if self._running is not None and self._mailbox:
            with contextlib.suppress(OSError):  # it ends just now
                snapshot.poke(self._running.pid, self._mailbox[0] + MAILBOX_INTERRUPT, b"\1")

    def _start(self, process: Running, job: dict[str, Any]) -> Sink:
        """Start the emulator in the best way there is; returns what to do when it waits."""
        if self._saved is not None and isinstance(process, Bochs):
            try:
                waiting, self.times.resumed = self._saved.start(process, self._kvm, job)
                return waiting
            except SnapshotError:
                self._saved = None
        whole = job | {
            "files": self._kvmnest.files | self._kvm["files"] | job["files"],
            "mtimes": self._kvmnest.mtimes,
            "modules": self._kvm["modules"],
        }
        job_layer = rootfs.job_layer(marshal.dumps(whole))
        process.boot(self._memory, self.cpus, lambda out: self._write_image(out, job_layer))
        return _ignore

    def _write_image(self, out: image.Sink, *more: bytes) -> None:
        """Write the picture of memory, with ``more`` layers."""
        layers = [*(layer.read() for layer in self._layers), *more]
        image.write(out, self.kernel.image(), layers, self._command_line(), self.cpus,
                    self._memory)  # fmt: skip

    def _saved_boots(self, keep_kvm: bool) -> SavedBoots | None:
        """None where an emulator cannot be saved."""
        emulator = self.emulator
        if not isinstance(emulator, bochs.Emulator):
            return None
        if not snapshot.supported():
            return None
        layers = [layer.key for layer in self._layers]
        parts: list[str | bytes] = [
            self.kernel.key,
            self._command_line(),
            build.build().read_bytes(),
            *layers,
        ]
        return SavedBoots(emulator, self._memory, self.cpus, parts, self._write_image,
                          self._kvmnest, keep_kvm)  # fmt: skip

    def _job(
        self, argv: Sequence[str], env: Mapping[str, str], files: Mapping[str, bytes]
    ) -> dict[str, Any]:
        return {
            "argv": list(argv),
            "env": GUEST_ENV | dict(env),
            "cwd": "/root",
            "files": dict(files),
            "mtimes": {},
            "log_level": kmsg.WARNING,
        }

    def _kvm_loading(self) -> dict[str, Any]:
        """The part of a job that loads KVM."""
        modules = [(plan.module_path(m.name), self._arguments.get(m.name, ""))
                   for m in self._modules]  # fmt: skip
        return {"modules": modules, "files": plan.module_files(self._modules), "mtimes": {}}

    def _command_line(self) -> str:
        loaded = {m.name for m in self._modules}
        builtin = [f"{name}.{setting}" for name, line in self._arguments.items()
                   if name not in loaded for setting in line.split()]  # fmt: skip
        environment = [f"{name}={value}" for name, value in GUEST_ENV.items()]
        own = self.emulator.kernel_parameters
        start = f"rdinit=/{rootfs.PYTHON} -- /{rootfs.INIT}"
        return " ".join([KERNEL_PARAMETERS, own, *builtin, *environment, start])
