"""What can go wrong with the lab, each with its own name and one clear line."""

from kvmnest.errors import LabError


class LabSetupError(LabError):
    """A tool or package is missing, or a file of the lab cannot be prepared."""


class KernelSpecError(LabSetupError):
    """A kernel SPEC that names nothing usable: unknown version, corrupt package, wrong file."""

    exit_code = 2


class PackageGone(LabSetupError):
    """The archive does not have a package of one kernel any more; others may be there."""


class LabRunError(LabError):
    """The lab ended without the command's exit status.

    ``console`` holds the last lines of the guest's kernel log.
    """

    def __init__(self, message: str, console: str = "") -> None:
        """Join the one-line ``message`` and the ``console`` tail."""
        super().__init__(message + (f"\n{console}" if console else ""))
        self.console = console


class LabPanic(LabRunError):
    """The guest kernel panicked."""


class LabHang(LabRunError):
    """Nothing came out for too long, or the overall limit passed."""


class LabLost(LabRunError):
    """The emulator died or was killed."""


class LabModuleError(LabRunError):
    """A kernel module did not load in the guest."""
