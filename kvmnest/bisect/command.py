"""Commands of the user that build, install or name a kernel, each in a session of its own."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from kvmnest.errors import HarnessError, UsageError

_GRACE = 5.0
_NO_SPACE = b"No space left on device"


@dataclass(frozen=True)
class Done:
    """How a command ended: ``why`` is "" for success, else one line; ``output`` is its stdout."""

    why: str
    output: str


def split(text: str, option: str) -> list[str]:
    """Words of a command. Raises UsageError for unbalanced quotes and for no word at all."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UsageError(f"{option} {text!r}: {error}") from error
    if not words:
        raise UsageError(f"{option} needs a command")
    return words


def run(
    words: list[str],
    folder: Path,
    *,
    limit: float | None = None,
    environment: Mapping[str, str] | None = None,
) -> Done:
    """Run a command in ``folder`` to its end, or for ``limit`` seconds.

    On Ctrl-C, and when the time is over, whatever it started ends with it. Raises UsageError
    if there is no such program, HarnessError when the disk is full, which is no fault of what is
    built.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        try:
            process = subprocess.Popen(
                words, cwd=folder, stdin=subprocess.DEVNULL, stdout=out, stderr=errors,
                env={**os.environ, **(environment or {})}, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise UsageError(f"cannot run {words[0]}: {error.strerror}") from error
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            _end(process)
            return Done(f"did not end in {limit:g} s", "")
        except BaseException:
            _end(process)
            raise
        said = [_read(errors), _read(out)]
    if process.returncode == 0:
        return Done("", said[1].decode(errors="replace"))
    if any(_NO_SPACE in data for data in said):
        free = shutil.disk_usage(folder).free >> 20
        raise HarnessError(f"no space left for the build in {folder} ({free} MiB free)")
    return Done(_reason(said, process.returncode), "")


def _read(file: IO[bytes]) -> bytes:
    file.seek(0)
    return file.read()


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the command's whole group, first politely: make removes what is half written."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE)
            if number == signal.SIGKILL or not _alive(process.pid):
                return


def _alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def _reason(said: list[bytes], status: int) -> str:
    """The compiler's first error, else the last line."""
    lines = [line.strip() for data in said for line in data.decode(errors="replace").splitlines()]
    lines = [line for line in lines if line]
    told = [line for line in lines if "error:" in line] or lines[-1:]
    if not told and status < 0:
        return f"killed by {signal.Signals(-status).name}"
    return told[0] if told else f"exit status {status}"
