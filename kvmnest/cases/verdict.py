"""What the end of a case means: failed (KVM or the CPU is wrong), error (we or the machine are)."""

from __future__ import annotations

from kvmnest.errors import first_line

#: Outcomes of a case that fail a run.
FAILED = ("failed", "error")


def kind(error: BaseException, when: str) -> str:
    """Classify what a phase of a case raised: "failed" or "error".

    ``when`` is "setup", "call" or "teardown". The loss of the VM is a failure of the case in any
    phase, an assertion or anything else that the case itself raises too; errors of the harness
    and of the environment, and whatever else happens in setup and teardown, are errors.
    """
    from kvmnest.errors import HarnessError
    from kvmnest.kvm.errors import KvmUnavailable
    from kvmnest.l1.lost import VmLost

    if isinstance(error, VmLost):
        return "failed"
    if isinstance(error, HarnessError | KvmUnavailable) or when != "call":
        return "error"
    return "failed"


def raised(error: BaseException) -> str:
    """Name of the exception, "" if it was a failed assertion."""
    name = type(error).__name__
    return "" if isinstance(error, AssertionError) or name == "Failed" else name


def summary(error: BaseException) -> str:
    """One line that says what happened."""
    first = first_line(str(error).strip())
    name = raised(error)
    if not name:
        return first or type(error).__name__
    return f"{name}: {first}" if first else name
