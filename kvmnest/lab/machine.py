"""``Lab``: boot a kernel in the emulator, run a command in it, stream out what it says."""

import marshal
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvmnest.errors import UsageError
from kvmnest.lab import bochs, cache, image, kernels, plan, rootfs, snapshot
from kvmnest.lab.bochs import Bochs
from kvmnest.lab.errors import LabLost, LabRunError, LabSetupError
from kvmnest.lab.guest import MAILBOX_PAGES
from kvmnest.lab.session import Session, Sink, Times
from kvmnest.lab.snapshot import SnapshotError

SNAPSHOTS_KEPT = 3  # of each kind; some 160 MB each
SNAPSHOT_FORMAT = 3
# What the cases use and pytest does not rewrite.
PRELOAD = ("kvmnest.errors", "kvmnest.vmx", "kvmnest.kvm", "kvmnest.l1")

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
CMDLINE = (
    "console=ttyS0,115200 quiet mitigations=off nokaslr tsc=reliable tsc_early_khz=100000 "
    "no_timer_check lpj=400000 random.trust_cpu=on panic=-1 reboot=t cryptomgr.notests "
    # XSAVEC and XSAVES (Bochs reports a size that Linux warns about), FSRM, APERFMPERF
    "clearcpuid=580,321,323,124 initcall_blacklist=" + ",".join(_SKIPPED_INITCALLS)
)
GUEST_ENV = {
    "PATH": "/usr/bin:/bin",
    "HOME": "/root",
    "LANG": "C.UTF-8",
    "PYTHONPATH": f"/{rootfs.SITE}",
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONNOUSERSITE": "1",
}


def _ignore(_: bytes) -> None:
    pass


def _write_out(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


@dataclass(frozen=True)
class _Step:
    """A point at which the guest waits: where it is saved, and what it gets then."""

    kind: str
    key: str
    mail: bytes


class _Saver:
    """Called when the guest waits: saves it, if nobody has, and gives it the next mail."""

    def __init__(self, emulator: bochs.Bochs, steps: list[_Step]) -> None:
        self._emulator = emulator
        self._steps = list(steps)

    def __call__(self, mark: bytes) -> None:
        pid, step = self._emulator.pid, self._steps.pop(0)
        mailbox: list[int] = []

        def build(folder: Path) -> None:
            mailbox.extend(snapshot.take(pid, folder, mark, MAILBOX_PAGES))

        try:
            cache.entry(step.kind, step.key, build, keep=SNAPSHOTS_KEPT)
        except LabSetupError as e:  # a full disk: this run can do without
            raise SnapshotError(str(e)) from e
        if not mailbox:  # another run of the same lab was faster
            mailbox.extend(snapshot.take(pid, None, mark, MAILBOX_PAGES))
        snapshot.fill_mailbox(pid, mailbox, step.mail)


class Lab:
    """A kernel and its KVM parameters; each ``run`` boots it anew.

    ``kernel`` is a SPEC (see kvmnest.lab.kernels), ``kvm_params`` module parameters
    (``nested=1`` unless given), ``kvm_modules`` a directory whose kvm.ko and kvm-intel.ko are
    loaded instead of the kernel's own, ``bochs`` the emulator to use. Preparing happens here:
    raises LabSetupError, KernelSpecError or UsageError.

    The first boot of a kernel is saved when it waits for what to do, with no KVM module loaded
    yet; later runs continue from there. ``snapshots=False`` boots from cold each time.
    """

    def __init__(
        self,
        kernel: str | None = None,
        kvm_params: Mapping[str, str] | None = None,
        kvm_modules: str | os.PathLike[str] | None = None,
        cpus: int = 1,
        bochs: str | None = None,
        snapshots: bool = True,
    ) -> None:
        """Resolve the kernel and build what is not yet cached."""
        if not 1 <= cpus <= 8:
            raise UsageError(f"the lab has 1 to 8 CPUs, not {cpus}")
        started = time.monotonic()
        self.cpus = cpus
        self.emulator = _locate(bochs)
        self.kernel = kernels.resolve(kernel)
        self.params = {"nested": "1"} | dict(kvm_params or {})
        files = dict(self.kernel.modules)
        if kvm_modules is not None:
            files |= plan.replacements(Path(kvm_modules), self.kernel)
        self._modules, self._arguments = plan.plan(self.kernel, files, self.params)
        self._layers = [rootfs.python_layer(), rootfs.site_layer(), rootfs.boot_layer()]
        self._kvmnest = rootfs.kvmnest_files()
        self._files = plan.module_files(self._modules)
        size = sum(layer.path.stat().st_size for layer in self._layers)
        self._memory = image.memory_for(self.kernel.end, size)
        self._snapshots = snapshots and self.emulator.debugger and snapshot.supported()
        self._session: Session | None = None
        self._running: Bochs | None = None
        self._mailbox: list[int] = []
        self.times = Times(prepare=time.monotonic() - started)

    def __enter__(self) -> "Lab":
        """Return self."""
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is left running between runs."""

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
        ``idle_limit`` is how many seconds may pass without a sign of life, ``limit`` how many
        altogether. ``files`` are put into the guest: absolute path -> content. Commands
        ``python3 -m`` and ``python3 -c`` run in a fork of the guest's first process, which has
        pytest and its like loaded.

        Raises LabPanic, LabHang, LabLost, LabModuleError with the console's tail.
        """
        job = self._job(argv, env or {}, files or {})
        self.times = Times(prepare=self.times.prepare)
        with bochs.Bochs(self.emulator) as emulator:
            self._running, self._mailbox = emulator, []
            try:
                shutil.copyfile(_rom(), emulator.folder / "boot.rom")
                waiting = self._start(emulator, job)
            except OSError as e:
                raise LabSetupError(cache.describe(e, "writing the lab's memory image")) from e
            while True:
                self._session = session = Session(
                    self.times, on_event, on_output, on_error or on_output, on_kernel, waiting
                )
                try:
                    return session.follow(emulator, self.cpus, idle_limit, limit)
                except SnapshotError:
                    emulator.stop()
                    self._snapshots = False
                    waiting = self._start(emulator, job)

    def post(self, mark: bytes, pages: int, mail: dict[str, Any]) -> None:
        """Give mail to the running guest, which waits at a ``guest.Mailbox`` of so many pages.

        To be called from ``on_event``. Raises LabRunError if the mailbox is not found.
        """
        assert self._running is not None
        pid = self._running.pid
        try:
            if not self._mailbox:
                self._mailbox = snapshot.take(pid, None, mark, pages)
            snapshot.fill_mailbox(pid, self._mailbox, marshal.dumps(mail))
        except (SnapshotError, OSError) as e:
            raise LabRunError(f"cannot reach the lab's guest: {e}") from e

    def _start(self, emulator: bochs.Bochs, job: dict[str, Any]) -> Sink:
        """Start the emulator in the best way there is; returns what to do when it waits."""
        if self._snapshots:
            steps = self._steps(job)
            room = snapshot.capacity(MAILBOX_PAGES)
            self._snapshots = all(len(step.mail) <= room for step in steps)
        if not self._snapshots:
            whole = job | {
                "files": self._kvmnest.files | job["files"],
                "mtimes": self._kvmnest.mtimes,
            }
            self._boot(emulator, [rootfs.job_layer(marshal.dumps(whole))])
            return _ignore
        for number in reversed(range(len(steps))):
            saved = cache.existing(steps[number].kind, steps[number].key)
            if saved is None:
                continue
            try:
                self._resume(emulator, saved, steps[number].mail)
            except SnapshotError:
                emulator.stop()
                cache.drop(saved)
                continue
            self.times.resumed = True
            return _Saver(emulator, steps[number + 1 :])
        self._boot(emulator, [])
        if not emulator.wait_prompt():
            raise LabLost(f"the emulator did not start: {emulator.verdict()}")
        emulator.go_on()
        return _Saver(emulator, steps)

    def _boot(self, emulator: bochs.Bochs, more: list[bytes]) -> None:
        """Start from cold, with ``more`` layers."""
        layers = [*(layer.read() for layer in self._layers), *more]
        with open(emulator.folder / "memory.img", "wb") as f:
            image.write(f, self.kernel.image(), layers, self._command_line(), self.cpus,
                        self._memory)  # fmt: skip
        emulator.start(self._memory, self.cpus, saved=self._snapshots)

    def _resume(self, emulator: bochs.Bochs, saved: Path, mail: bytes) -> None:
        """Start an emulator that only has the right shape, and put the saved one into it."""
        (emulator.folder / "memory.img").write_bytes(bytes(image.BLOCK))
        emulator.start(self._memory, self.cpus, saved=True)
        if not emulator.wait_prompt():
            raise SnapshotError("the emulator shows no prompt")
        snapshot.resume(emulator.pid, saved, mail)
        emulator.reset_terminal()

    def _steps(self, job: dict[str, Any]) -> list["_Step"]:
        """The points at which the guest waits: after the boot, and with kvmnest loaded.

        The second changes with each edit of kvmnest, but is made from the first in no time.
        """
        booted = self._snapshot_key()
        loaded = cache.digest([booted, self._kvmnest.key, *PRELOAD])
        load = {
            "files": self._kvmnest.files,
            "mtimes": self._kvmnest.mtimes,
            "preload": PRELOAD,
        }
        return [
            _Step("booted", booted, marshal.dumps(load)),
            _Step("loaded", loaded, marshal.dumps(job)),
        ]

    def _snapshot_key(self) -> str:
        machine = os.uname()
        return cache.digest([
            SNAPSHOT_FORMAT, self.emulator.stamp(), self.kernel.key, self._command_line(),
            bochs.configuration(self.emulator, self._memory, self.cpus), bochs.MSRS,
            _rom().read_bytes(), *(layer.key for layer in self._layers),
            machine.release, machine.version, _host_cpu(),
        ])  # fmt: skip

    def _job(
        self, argv: Sequence[str], env: Mapping[str, str], files: Mapping[str, bytes]
    ) -> dict[str, Any]:
        modules = [(plan.module_path(m.name), self._arguments.get(m.name, ""))
                   for m in self._modules]  # fmt: skip
        return {
            "argv": list(argv),
            "env": GUEST_ENV | dict(env),
            "cwd": "/root",
            "modules": modules,
            "files": self._files | dict(files),
            "mtimes": {},
            "log_level": 4,
        }

    def _command_line(self) -> str:
        loaded = {m.name for m in self._modules}
        builtin = [f"{name}.{setting}" for name, line in self._arguments.items()
                   if name not in loaded for setting in line.split()]  # fmt: skip
        environment = [f"{name}={value}" for name, value in GUEST_ENV.items()]
        start = f"rdinit=/{rootfs.PYTHON} -- /{rootfs.INIT}"
        return " ".join([CMDLINE, *builtin, *environment, start])


def _locate(path: str | None) -> bochs.Emulator:
    return bochs.locate(path)


def _host_cpu() -> str:
    """Model and features of this machine's CPU, which a saved process has adapted to."""
    with open("/proc/cpuinfo") as f:
        return "".join(line for line in f.read().partition("\n\n")[0].splitlines(True)
                       if line.startswith(("model name", "flags", "microcode")))  # fmt: skip


def _rom() -> Path:
    path = Path(__file__).parent.parent / "data" / "lab_boot.bin"
    if not path.is_file():
        from kvmnest.lab import build

        build.build()
    return path
