"""``kvmnest completion``: words of the command line, for the shell to complete."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from kvmnest.errors import HarnessError

SHELLS = ("bash", "zsh", "fish", "tcsh")
_HOW = {
    "bash": "kvmnest completion bash >~/.local/share/bash-completion/completions/kvmnest",
    "zsh": "kvmnest completion zsh >FOLDER/_kvmnest, with FOLDER in $fpath",
    "fish": "kvmnest completion fish >~/.config/fish/completions/kvmnest.fish",
    "tcsh": "kvmnest completion tcsh >>~/.tcshrc",
}
# How the options here spell "a file" and "a folder" in their help.
_FILES = {"FILE", "PATH", "SPEC", "CASE|PATH"}
_FOLDERS = {"DIR", "FOLDER"}


def add_parser(subparsers: Any) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "completion",
        help="print the completion script of a shell",
        description="Print what lets a shell complete verbs, options and files.",
        epilog="for good: " + "; ".join(_HOW.values()),
    )
    parser.add_argument("shell", choices=SHELLS, help="the shell")


def run(options: argparse.Namespace) -> int:
    """Run the verb. Raises HarnessError without shtab."""
    try:
        import shtab
    except ImportError as error:
        raise HarnessError(
            "completion needs the package shtab: pip install 'kvmnest[completion]'"
        ) from error
    from kvmnest.cli.main import parser

    top = parser([])
    _mark_files(top, shtab)
    print(shtab.complete(top, shell=options.shell), file=sys.stdout)
    return 0


def _mark_files(parser: argparse.ArgumentParser, shtab: Any) -> None:
    """Tell shtab, which does not look at types, where a file name is wanted."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                _mark_files(child, shtab)
        elif action.metavar in _FOLDERS:
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
        elif action.type is Path or action.metavar in _FILES:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
