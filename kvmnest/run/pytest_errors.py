"""What pytest says when it does not collect or run: one line of it, and whose fault it is."""

from __future__ import annotations

from kvmnest.errors import HarnessError, KvmnestError, UsageError, first_line

_CONFTEST = "ImportError while loading conftest '"
_ERROR = "ERROR: "


def why_broken(text: str) -> str:
    """The line of what pytest says of a file that it cannot collect that tells why."""
    # pytest ends a traceback with lines that start with E.
    lines = [line[2:].strip() for line in text.splitlines() if line.startswith("E ")]
    return lines[-1] if lines else first_line(text.strip())


def last_error(output: str) -> str:
    """The last line that names an error, else the last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line.removeprefix(_ERROR) for line in lines if line.startswith(_ERROR)]
    return errors[-1] if errors else lines[-1] if lines else "it said nothing"


def refusal(output: str) -> KvmnestError | None:
    """The error of which pytest's output tells, None if it names none.

    UsageError for an argument that pytest does not take, HarnessError for a conftest.py that
    cannot be loaded: pytest's exit status is that of a usage error for both.
    """
    _, found, rest = output.partition(_CONFTEST)
    if found:
        where, _, traceback = rest.partition("'.\n")
        return HarnessError(f"cannot load {where}: {why_broken(traceback)}")
    if any(line.startswith(_ERROR) for line in output.splitlines()):
        return UsageError(last_error(output))
    return None
