"""How the machine is changed: commands and files. A dry run prints them instead."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from kvmnest.bisect import disk
from kvmnest.errors import HarnessError


class CommandFailed(HarnessError):
    """A command that failed; ``output`` is all it said."""

    def __init__(self, message: str, output: str) -> None:
        super().__init__(message)
        self.output = output


class Commands:
    """Does it."""

    def run(self, *words: str) -> str:
        """Run a command; returns what it printed. Raises CommandFailed with its last line."""
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C"}
        try:
            done = subprocess.run(
                words, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                errors="replace", env=environment, check=False,
            )  # fmt: skip
        except OSError as error:
            raise CommandFailed(f"cannot run {words[0]}: {error.strerror}", "") from error
        if done.returncode:
            said = done.stdout + done.stderr
            lines = [line.strip() for line in said.splitlines() if line.strip()]
            told = [line for line in lines if line.startswith("E: ")] or lines[-1:]
            reason = told[0] if told else f"exit status {done.returncode}"
            raise CommandFailed(f"{words[0]} failed: {reason}", said)
        return done.stdout

    def write(self, path: Path, text: str) -> None:
        """Write a file, whole or not at all, that everyone may read."""
        disk.replace(path, text, 0o644)

    def delete(self, path: Path) -> None:
        """Remove a file or a folder, if it is there."""
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            disk.remove(path)


class DryCommands(Commands):
    """Says it: commands as one types them, files with their content."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say

    def run(self, *words: str) -> str:
        """Print a command."""
        self._say(shlex.join(words))
        return ""

    def write(self, path: Path, text: str) -> None:
        """Print what would be in a file."""
        self._say(f"cat > {shlex.quote(str(path))} <<'END'\n{text}END")

    def delete(self, path: Path) -> None:
        """Print the removal."""
        self.run("rm", "-rf", str(path))


def first_line(words: Sequence[str]) -> str | None:
    """What a command that may fail prints first; None if it does fail."""
    try:
        done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    except OSError:
        return None
    lines = done.stdout.decode(errors="replace").splitlines()
    return None if done.returncode else (lines[0].strip() if lines else "")
