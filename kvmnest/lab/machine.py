"""``Lab``: boot a kernel in the emulator, run a command in it, stream out what it says."""

import marshal
import os
import select
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvmnest.errors import UsageError
from kvmnest.lab import bochs, cache, channel, image, kernels, modules, rootfs
from kvmnest.lab.cpio import Cpio
from kvmnest.lab.errors import (
    KernelSpecError,
    LabHang,
    LabLost,
    LabModuleError,
    LabPanic,
    LabRunError,
    LabSetupError,
)

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
BOOT_LIMIT = 60.0
_GUEST_ENV = {
    "PATH": "/usr/bin:/bin",
    "HOME": "/root",
    "LANG": "C.UTF-8",
    "PYTHONPATH": f"/{rootfs.SITE}",
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONNOUSERSITE": "1",
}

Sink = Callable[[bytes], object]


def _ignore(_: bytes) -> None:
    pass


def _write_out(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


@dataclass
class Times:
    """Host seconds of one run: preparing files, start to userspace, start to first event."""

    prepare: float = 0.0
    boot: float = 0.0
    first_event: float = 0.0
    total: float = 0.0


class Lab:
    """A kernel and its KVM parameters; each ``run`` boots it anew.

    ``kernel`` is a SPEC (see kvmnest.lab.kernels), ``kvm_params`` module parameters
    (``nested=1`` unless given), ``kvm_modules`` a directory whose kvm.ko and kvm-intel.ko are
    loaded instead of the kernel's own, ``bochs`` the emulator to use. Preparing happens here:
    raises LabSetupError, KernelSpecError or UsageError.

    After a run ``info`` is what the guest reported (release, params), ``times`` how long it
    took, ``kernel_log`` the guest's kernel messages of level warning and worse.
    """

    def __init__(
        self,
        kernel: str | None = None,
        kvm_params: Mapping[str, str] | None = None,
        kvm_modules: str | os.PathLike[str] | None = None,
        cpus: int = 1,
        bochs: str | None = None,
        memory: int = 256,
    ) -> None:
        """Resolve the kernel and build what is not yet cached."""
        if not 1 <= cpus <= 8:
            raise UsageError(f"the lab has 1 to 8 CPUs, not {cpus}")
        started = time.monotonic()
        self.cpus, self.memory = cpus, memory
        self.emulator = _locate(bochs)
        self.kernel = kernels.resolve(kernel)
        self.params = {"nested": "1"} | dict(kvm_params or {})
        files = dict(self.kernel.modules)
        if kvm_modules is not None:
            files |= _replacements(Path(kvm_modules), self.kernel)
        self._modules, self._arguments = _plan(self.kernel, files, self.params)
        self._layers = [rootfs.python_layer(), rootfs.site_layer(), rootfs.kvmnest_layer()]
        self._layers.append(_module_layer(self._modules))
        self.info: dict[str, object] = {}
        self.kernel_log = b""
        self.times = Times(prepare=time.monotonic() - started)

    def __enter__(self) -> "Lab":
        """Return self."""
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is left running between runs."""

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
        altogether. ``files`` are put into the guest: absolute path -> content.

        Raises LabPanic, LabHang, LabLost, LabModuleError with the console's tail.
        """
        session = _Session(self, on_event, on_output, on_error or on_output, on_kernel)
        job = {
            "argv": list(argv),
            "env": _GUEST_ENV | dict(env or {}),
            "cwd": "/root",
            "modules": [
                (f"/modules/{m.name}.ko", self._arguments.get(m.name, "")) for m in self._modules
            ],
            "log_level": 4,
        }
        layers = [*self._layers, rootfs.job_layer(job, dict(files or {}))]
        with bochs.Bochs(self.emulator) as emulator:
            try:
                with open(emulator.folder / "memory.img", "wb") as f:
                    layout = image.write(
                        f, self.kernel.image, layers, self._command_line(), self.cpus, self.memory
                    )
                shutil.copyfile(_rom(), emulator.folder / "boot.rom")
            except OSError as e:
                raise LabSetupError(cache.describe(e, "writing the lab's memory image")) from e
            emulator.start(layout, self.cpus)
            return session.follow(emulator, idle_limit, limit)

    def _command_line(self) -> str:
        loaded = {m.name for m in self._modules}
        builtin = [
            f"{name}.{setting}"
            for name, line in self._arguments.items()
            if name not in loaded
            for setting in line.split()
        ]
        return " ".join([CMDLINE, *builtin, f"rdinit=/{rootfs.PYTHON} -- -I -S /kvmnest/init.py"])


def _locate(path: str | None) -> bochs.Emulator:
    return bochs.locate(path)


def _rom() -> Path:
    path = Path(__file__).parent.parent / "data" / "lab_boot.bin"
    if not path.is_file():
        from kvmnest.lab import build

        build.build()
    return path


def _replacements(folder: Path, kernel: kernels.Kernel) -> dict[str, Path]:
    """The user's own KVM modules, checked to be built for this very kernel."""
    if not folder.is_dir():
        raise KernelSpecError(f"{folder}: no such directory")
    found = {n: p for n, p in modules.find(folder).items() if n in kernels.MODULES}
    if not found:
        raise KernelSpecError(f"{folder} has no kvm.ko or kvm-intel.ko")
    own = [modules.read(p).vermagic for n, p in kernel.modules.items() if n in kernels.MODULES]
    for path in found.values():
        vermagic = modules.read(path).vermagic
        if own and vermagic.split() != own[0].split():
            raise KernelSpecError(
                f"{path} was built for {vermagic.strip()}, the kernel is {own[0].strip()}"
            )
    return found


def _plan(
    kernel: kernels.Kernel, files: Mapping[str, Path], params: Mapping[str, str]
) -> tuple[list[modules.Module], dict[str, str]]:
    """Modules in load order, and the parameter line of each. Raises UsageError, KernelSpecError."""
    where = f"kernel {kernel.release}"
    order = modules.load_order(kernels.MODULES, files, kernel.builtin, where)
    known = {m.name: m.parameters for m in order}
    lines: dict[str, list[str]] = {}
    for name, value in params.items():
        module, dot, parameter = name.replace("kvm-intel.", "kvm_intel.").rpartition(".")
        if not dot:
            module = "kvm" if parameter in known.get("kvm", ()) else "kvm_intel"
        if module not in kernels.MODULES:
            raise UsageError(f"{name}: the lab sets parameters of kvm and kvm_intel only")
        if module in known and parameter not in known[module]:
            raise UsageError(f"{module} of {where} has no parameter {parameter}")
        lines.setdefault(module, []).append(f"{parameter}={value}")
    return order, {module: " ".join(line) for module, line in lines.items()}


def _module_layer(order: Sequence[modules.Module]) -> bytes:
    contents = {m.name: m.path.read_bytes() for m in order}
    key = cache.digest([1, *(part for item in contents.items() for part in item)])

    def build(folder: Path) -> None:
        archive = Cpio()
        for module in order:
            archive.file(f"modules/{module.name}.ko", modules.lean(module.path))
        (folder / "layer.cpio").write_bytes(archive.finish())

    return (cache.entry("modules", key, build) / "layer.cpio").read_bytes()


class _Session:
    """Follows one running guest to its end."""

    def __init__(
        self, lab: Lab, on_event: Sink, on_output: Sink, on_error: Sink, on_kernel: Sink
    ) -> None:
        self._lab = lab
        self._sinks = {channel.STDOUT: on_output, channel.STDERR: on_error}
        self._on_event, self._on_kernel = on_event, on_kernel
        self._partial = b""
        self._started = time.monotonic()
        self._status: int | None = None
        self._decoder = channel.Decoder()

    def follow(self, emulator: bochs.Bochs, idle_limit: float | None, limit: float | None) -> int:
        """Dispatch frames until the exit status arrives."""
        self._emulator = emulator
        self._started = last_sign = time.monotonic()
        poll = select.poll()
        poll.register(emulator.output, select.POLLIN)
        console_size = 0
        self._lab.info, self._lab.kernel_log = {}, b""
        while self._status is None:
            data = b""
            if poll.poll(200):
                try:
                    data = os.read(emulator.output, 1 << 16)
                except OSError:  # EIO: the other side of the terminal is closed
                    data = b""
            now = time.monotonic()
            if data:
                self._receive(data)
                last_sign = now
                continue
            size = emulator.console_size()
            if size != console_size:
                console_size, last_sign = size, now
                self._check_panic()
            if emulator.ended():
                raise LabLost(f"the emulator ended: {emulator.verdict()}", self._tail())
            self._check_time(now, last_sign, idle_limit, limit)
        self._lab.times.total = time.monotonic() - self._started
        return os.waitstatus_to_exitcode(self._status)

    def _receive(self, data: bytes) -> None:
        try:
            for kind, payload in self._decoder.feed(data):
                self._dispatch(kind, payload)
        except channel.ChannelError as e:
            raise LabRunError(f"the lab's channel is damaged: {e}", self._tail()) from e

    def _dispatch(self, kind: int, payload: bytes) -> None:
        times = self._lab.times
        if kind in self._sinks:
            self._sinks[kind](payload)
        elif kind == channel.EVENT:
            times.first_event = times.first_event or time.monotonic() - self._started
            *lines, self._partial = (self._partial + payload).split(b"\n")
            for line in lines:
                self._on_event(line)
        elif kind == channel.KLOG:
            self._lab.kernel_log += payload
            self._on_kernel(payload)
        elif kind == channel.READY:
            times.boot, times.first_event = time.monotonic() - self._started, 0.0
            self._lab.info = marshal.loads(payload)
            self._emulator.drop_images()
        elif kind == channel.EXIT:
            self._status = marshal.loads(payload)
        elif kind == channel.MODULE_ERROR:
            name, error, log = marshal.loads(payload)
            lines = log.decode(errors="replace").strip().splitlines()
            raise LabModuleError(
                f"{name} did not load: {os.strerror(error)}", "\n".join(lines[-3:])
            )
        else:
            raise LabRunError(
                f"the lab's guest failed: {payload.decode(errors='replace')}", self._tail()
            )

    def _check_panic(self) -> None:
        console = self._emulator.console()
        at = console.find("Kernel panic - not syncing")
        if at < 0:
            return
        self._emulator.wait_end(1.0)  # let it print the rest
        lines = self._emulator.console()[console.rfind("\n", 0, at) + 1 :].splitlines()
        raise LabPanic("the guest kernel panicked", "\n".join(lines[:20]))

    def _check_time(
        self, now: float, last_sign: float, idle: float | None, limit: float | None
    ) -> None:
        if not self._lab.info and now - self._started > BOOT_LIMIT * self._lab.cpus:
            raise LabHang(f"the guest did not boot within {BOOT_LIMIT:.0f} s", self._tail())
        if idle is not None and now - last_sign > idle:
            raise LabHang(f"the guest said nothing for {idle:.0f} s", self._tail())
        if limit is not None and now - self._started > limit:
            raise LabHang(f"the run took longer than {limit:.0f} s", self._tail())

    def _tail(self) -> str:
        return "\n".join(self._emulator.console().splitlines()[-20:])
