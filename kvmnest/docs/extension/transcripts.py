"""Run the commands that pages show again, and put their output there: `ci/docs transcripts`.

A transcript is a line ``% transcript: COMMAND`` and the ``console`` block behind it. Commands begin
with ``kvmnest`` and run without a shell. With --check nothing is written; exit code 1 says that a
page shows something else than the command prints.
"""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
from pathlib import Path

PAGES = Path(__file__).parents[1]
_BLOCK = re.compile(r"^% transcript: (kvmnest .+)\n```console\n(.*?)^```$", re.M | re.S)


def output_of(command: str) -> str:
    """What ``command`` prints on stdout, with the command itself above it."""
    words = shlex.split(command)
    done = subprocess.run(
        [sys.executable, "-m", "kvmnest", *words[1:]],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    lines = [f"$ {command}", *done.stdout.splitlines()]
    return "".join(f"{line.rstrip()}\n" for line in lines)


def renewed(text: str) -> str:
    """A page with every transcript as it is now. Raises CalledProcessError."""

    def block(found: re.Match[str]) -> str:
        return f"% transcript: {found[1]}\n```console\n{output_of(found[1])}```"

    return _BLOCK.sub(block, text)


def main() -> int:
    """Renew the pages named, or all; returns an exit code."""
    parser = argparse.ArgumentParser(prog="ci/docs transcripts")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("pages", nargs="*", type=Path, metavar="PAGE")
    options = parser.parse_args()
    stale = []
    for page in options.pages or sorted(PAGES.rglob("*.md")):
        old = page.read_text(encoding="utf-8")
        try:
            new = renewed(old)
        except subprocess.CalledProcessError as error:
            print(f"{page}: {shlex.join(error.cmd[3:])} exits with {error.returncode}")
            return 3
        if new != old:
            stale.append(page.name)
            if not options.check:
                page.write_text(new, encoding="utf-8")
    print(f"{'out of date' if options.check else 'renewed'}: {', '.join(stale) or 'nothing'}")
    return 1 if stale and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
