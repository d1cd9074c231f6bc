"""Errors of the harness itself: never used for a wrong answer of the CPU or of KVM."""


class KvmnestError(Exception):
    """Base of every error that the command line reports as one line.

    ``exit_code`` is the process exit code of the command that ends with it (3: harness or
    environment error).
    """

    exit_code = 3


class UsageError(KvmnestError):
    """A wrong argument: bad kernel SPEC, bad NAME=VALUE, missing file (exit code 2)."""

    exit_code = 2


class HarnessError(KvmnestError):
    """Our own defect or an environment that cannot run the case."""


class NeedsHost(KvmnestError):
    """What a case asks for exists under a host only: the reference target skips it.

    ``what`` names it: "memory slots", "KVM_SET_NESTED_STATE".
    """

    def __init__(self, what: str) -> None:
        super().__init__(f"needs a host: {what}")
        self.what = what


class PayloadError(HarnessError):
    """The L1 payload is missing, truncated or does not match this package."""


class LabError(HarnessError):
    """The lab could not be prepared, did not boot, hung or was lost."""


def first_line(error: object) -> str:
    """The first line of a text or of an error's message, which says what happened."""
    return str(error).partition("\n")[0]
