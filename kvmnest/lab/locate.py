"""Finds the emulator that is to boot a kernel."""

from kvmnest.lab import bochs, qemu
from kvmnest.lab.emulators import Choice, Installed


def locate(choice: Choice, cpus: int = 1) -> Installed:
    """Find one on this machine that emulates so many CPUs.

    Raises LabSetupError if it is not there, or cannot do its work here, UsageError if it has no
    such CPU model.
    """
    if choice.boot == "qemu":
        return qemu.locate(choice.program, choice.accelerator)
    return bochs.locate(choice.program, choice.cpu_model, cpus)
