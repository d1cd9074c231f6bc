"""Run the commands that pages show again, and put their output there: `ci/docs transcripts`.

A transcript is a line ``% transcript [OPTION...]: COMMAND`` and the ``console`` block behind it.
Commands begin with ``kvmnest`` and run without a shell, those of a page one after the other in one
empty folder, so that one may use the file that another wrote. Both output streams are shown where
the exit code is not 0, else stdout alone; the user's home folder is shown as ``~``. Options:

``exit=N``
    The exit code that the command must have, shown as ``echo $?``. Without it, it must be 0.
``head=N``, ``tail=N``
    Only so many lines from the start and from the end; what is cut is one line, ``...``.
``times=no``
    Seconds are shown as ``N s``, since they are never twice the same, and progress lines are left
    out.

A code block behind a line ``% file: NAME`` is put into the folder under that name first.

With --check nothing is written; exit code 1 says that a page shows something else than the command
prints.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PAGES = Path(__file__).parents[1]
_MARK = re.compile(r"^% transcript\b.*$", re.M)
_BLOCK = re.compile(
    r"^% transcript([^:\n]*): (kvmnest [^\n]+)\n```console\n(.*?)^```$", re.M | re.S
)
_FILE = re.compile(r"^% file: ([\w.-]+)\n```\w+\n(.*?)^```$", re.M | re.S)
_PROGRESS = re.compile(r"\[\d+/\d+\] ")
_SECONDS = re.compile(r"\b\d+(\.\d+)? s\b")


class TranscriptError(Exception):
    """A transcript that cannot be read, or whose command ended otherwise than it says."""


@dataclass(frozen=True)
class Transcript:
    """A command and how to show it; ``head`` and ``tail`` of -1: all lines."""

    command: str
    exit_code: int = 0
    head: int = -1
    tail: int = -1
    times: bool = True

    def output(self, folder: Path) -> str:
        """Run it in ``folder``; the block's content. Raises TranscriptError."""
        words = shlex.split(self.command)
        done = subprocess.run(
            [sys.executable, "-m", "kvmnest", *words[1:]],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(PAGES.parents[1]), "COLUMNS": "98"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT if self.exit_code else None,
            text=True,
            check=False,
        )
        if done.returncode != self.exit_code:
            raise TranscriptError(f"{self.command} exits with {done.returncode}\n{done.stdout}")
        text = done.stdout.replace(os.path.expanduser("~"), "~").replace(f"{folder}/", "")
        lines = [line.rstrip() for line in text.splitlines()]
        if not self.times:
            lines = [_SECONDS.sub("N s", line) for line in lines if not _PROGRESS.match(line)]
        lines = self._cut(lines)
        status = ["$ echo $?", str(self.exit_code)] if self.exit_code else []
        return "".join(f"{line}\n" for line in [f"$ {self.command}", *lines, *status])

    def _cut(self, lines: list[str]) -> list[str]:
        if self.head < 0 and self.tail < 0:
            return lines
        head, tail = max(self.head, 0), max(self.tail, 0)
        if head + tail >= len(lines):
            return lines
        return [*lines[:head], "...", *lines[len(lines) - tail :]]


def parse(options: str, command: str) -> Transcript:
    """Read what stands between ``% transcript`` and the colon. Raises TranscriptError."""
    numbers: dict[str, int] = {}
    times = True
    for word in options.split():
        name, _, value = word.partition("=")
        if word == "times=no":
            times = False
        elif name in ("exit", "head", "tail") and value.isdecimal():
            numbers["exit_code" if name == "exit" else name] = int(value)
        else:
            raise TranscriptError(f"{command}: unknown option {word}")
    return Transcript(command, times=times, **numbers)


def transcripts(text: str) -> Iterator[tuple[Transcript, str]]:
    """The transcripts of a page with what it shows. Raises TranscriptError for a broken one."""
    found = list(_BLOCK.finditer(text))
    if len(found) != len(_MARK.findall(text)):
        broken = set(_MARK.findall(text)) - {block[0].partition("\n")[0] for block in found}
        raise TranscriptError(f"no command or no console block: {'; '.join(sorted(broken))}")
    for block in found:
        yield parse(block[1], block[2]), block[3]


def renewed(text: str) -> str:
    """A page with every transcript as it is now. Raises TranscriptError."""
    list(transcripts(text))
    with tempfile.TemporaryDirectory(prefix="kvmnest-docs-") as folder:
        for file in _FILE.finditer(text):
            (Path(folder) / file[1]).write_text(file[2], encoding="utf-8")

        def block(found: re.Match[str]) -> str:
            transcript = parse(found[1], found[2])
            print(f"  {found[2]}", file=sys.stderr)
            first = found[0].partition("\n")[0]
            return f"{first}\n```console\n{transcript.output(Path(folder))}```"

        return _BLOCK.sub(block, text)


def main() -> int:
    """Renew the pages named, or all; returns an exit code."""
    parser = argparse.ArgumentParser(prog="ci/docs transcripts")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("pages", nargs="*", type=Path, metavar="PAGE")
    options = parser.parse_args()
    stale = []
    for page in options.pages or sorted(PAGES.rglob("*.md")):
        try:
            old = page.read_text(encoding="utf-8")
            new = renewed(old)
            if new != old:
                # A command that fills the cache says so, once.
                new = renewed(old)
        except (OSError, TranscriptError) as error:
            print(f"{page}: {error}", file=sys.stderr)
            return 3
        if new != old:
            stale.append(page.name)
            if options.check:
                lines = difflib.unified_diff(old.splitlines(), new.splitlines(), lineterm="", n=1)
                print(*lines, sep="\n")
            else:
                page.write_text(new, encoding="utf-8")
    print(f"{'out of date' if options.check else 'renewed'}: {', '.join(stale) or 'nothing'}")
    return 1 if stale and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
