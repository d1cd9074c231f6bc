"""``kvmnest man``: the manual page, made from the options of all verbs."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from typing import Any

import kvmnest
from kvmnest.errors import HarnessError

_SECTIONS = {
    "exit status": """.TP
.B 0
all cases passed, or failed in a way that is known
.TP
.B 1
a case failed
.TP
.B 2
usage
.TP
.B 3
the harness or the environment
.TP
.B 4
nothing ran
.TP
.B 130
interrupted""",
    "files": r""".TP
.I ~/.cache/kvmnest
kernels, module trees and saved boots of the lab; may be removed at any time
(below
.B $XDG_CACHE_HOME
if that is set)
.TP
.I /dev/kvm
where cases run if it offers VMX to guests""",
    "see also": r""".BR modprobe (8),
.BR pytest (1),
Intel 64 and IA\-32 Architectures Software Developer's Manual, volume 3, part VMX""",
}


def add_parser(subparsers: Any) -> None:
    """Add the verb."""
    subparsers.add_parser(
        "man",
        help="show the manual page",
        description="Show the manual page; into a file or a pipe, its source:"
        " kvmnest man >~/.local/share/man/man1/kvmnest.1",
    )


def run(options: argparse.Namespace) -> int:
    """Run the verb. Raises HarnessError without argparse-manpage."""
    text = page()
    viewer = shutil.which("man") if sys.stdout.isatty() else None
    if viewer is None:
        print(text, end="")
        return 0
    return subprocess.run([viewer, "-l", "-"], input=text, text=True, check=False).returncode


def page() -> str:
    """The manual page as troff source. Raises HarnessError without argparse-manpage."""
    try:
        from argparse_manpage.manpage import Manpage
    except ImportError as error:
        raise HarnessError(
            "the manual page needs the package argparse-manpage: pip install 'kvmnest[completion]'"
        ) from error
    from kvmnest.cli.main import parser

    # argparse wraps usage lines to the terminal, which is not the page's business.
    os.environ["COLUMNS"] = "100"
    top: Any = parser([])
    top._manpage = [{"heading": head, "content": text} for head, text in _SECTIONS.items()]
    made = Manpage(
        top,
        {
            "project_name": "kvmnest",
            "version": kvmnest.__version__,
            "description": "test nested VMX of KVM",
            "manual_title": "kvmnest manual",
        },
    )
    return str(made)
