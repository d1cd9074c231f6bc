"""Run one QEMU: the kernel under test as L1, by this machine's KVM at the speed of the CPU.

The same picture of memory and the same ROM as in Bochs: no disk, no network, no firmware. QEMU
has no monitor, no display and no socket; its sandbox takes the system calls that it needs not.
"""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from kvmnest.lab import tools
from kvmnest.lab.emulators import Picture, Running, version_text
from kvmnest.lab.errors import LabSetupError
from kvmnest.lab.image import INFO

PROGRAM = "qemu-system-x86_64"

# KVM says so when it cannot run the guest any more; QEMU then stops the guest and waits for ever.
_STUCK = re.compile(
    r"^(KVM: entry failed, .*|KVM internal error.*|error: kvm run failed .*)$", re.M
)
_SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"


@dataclass(frozen=True)
class Emulator:
    """A QEMU binary; ``accelerator`` is "kvm", or "tcg", whose CPU has no VMX."""

    path: str
    accelerator: str
    sandbox: bool
    boot = "qemu"
    where = "in QEMU"
    kernel_parameters = ""

    @property
    def cpu_emulator(self) -> str:
        """The CPU is the host's own, or one without VMX."""
        return ""

    def process(self) -> "Qemu":
        """A process of it, not yet started. Raises LabSetupError."""
        return Qemu(self)


def locate(path: str | None = None, accelerator: str = "kvm") -> Emulator:
    """Find QEMU (``path``, or ``qemu-system-x86_64`` in PATH).

    Raises LabSetupError if it is missing or does not run, or if it is to use a KVM that offers no
    VMX to its guests.
    """
    if accelerator == "kvm":
        from kvmnest.host import why_not_kvm

        reason = why_not_kvm()
        if reason:
            raise LabSetupError(
                f"--boot qemu: KVM offers no VMX to guests here: {reason}; --boot lab needs none"
            )
    found = shutil.which(path) if path else tools.find(PROGRAM)
    if found is None:
        raise LabSetupError(f"{path} not found: no such program")
    if "QEMU emulator" not in version_text(found, "--version"):
        raise LabSetupError(f"{found} is not QEMU")
    # A QEMU that was built without it refuses the option before it comes to the next.
    sandbox = "QEMU emulator" in version_text(found, "-sandbox", _SANDBOX, "--version")
    return Emulator(found, accelerator, sandbox)


def arguments(emulator: Emulator, memory: int, cpus: int) -> list[str]:
    """The command line, for a folder with ``boot.rom`` and ``memory.img``."""
    options = {
        "machine": f"pc,accel={emulator.accelerator}",
        "cpu": "host" if emulator.accelerator == "kvm" else "max",
        "m": str(memory),
        "smp": str(cpus),
        "bios": "boot.rom",
        "device": f"loader,file=memory.img,addr={INFO:#x},force-raw=on",
        "display": "none",
        "monitor": "none",
        "nic": "none",
        "serial": "file:console.log",
        "chardev": "stdio,id=guest,signal=off",
    }
    argv = ["-nodefaults", "-no-user-config", "-no-reboot"]
    for name, value in options.items():
        argv += [f"-{name}", value]
    argv += ["-device", "isa-debugcon,iobase=0xe9,chardev=guest"]
    if emulator.accelerator == "tcg" and cpus == 1:  # several would wait for each other's time
        # The guest's time is counted in instructions, as in Bochs: a busy host is not a lockup.
        argv += ["-icount", "shift=3"]
    if emulator.sandbox:
        argv += ["-sandbox", _SANDBOX]
    return argv


class Qemu(Running):
    """One QEMU in a private folder."""

    def __init__(self, emulator: Emulator) -> None:
        """Make the folder. Raises LabSetupError if that is impossible."""
        super().__init__(emulator.path)
        self._emulator = emulator

    def boot(self, memory: int, cpus: int, write: Picture) -> None:
        """Write ``memory.img`` and start; see ``Running.boot``."""
        with open(self.folder / "memory.img", "wb") as picture:
            write(picture)
        self.start(memory, cpus)

    def start(self, memory: int, cpus: int) -> None:
        """Start a machine of ``memory`` MiB and ``cpus`` CPUs with the ``memory.img`` there is.

        Raises LabSetupError if that fails.
        """
        self.output, inside = os.pipe()
        try:
            argv = arguments(self._emulator, memory, cpus)
            self._launch(argv, subprocess.DEVNULL, inside, {})
        finally:
            os.close(inside)

    def stuck(self) -> str:
        """What KVM said when it could not run the guest any more; "" if it runs."""
        found = _STUCK.search(self._text("stderr.log"))
        return found[0] if found else ""

    def verdict(self) -> str:
        """Why QEMU ended: its first error, or its status."""
        lines = self._text("stderr.log").strip().splitlines()
        errors = [line for line in lines if ": warning: " not in line]
        if errors:
            return errors[0].removeprefix(f"{Path(self._program).name}: ").removeprefix("error: ")
        if self._process is not None and self._process.poll() == 0:
            return "the guest reset itself (a triple fault, or a reboot)"
        return self._status()
