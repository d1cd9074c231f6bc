"""``kvmnest report``: turn a results file into what other programs and people read."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kvmnest.errors import HarnessError, UsageError
from kvmnest.files import require_writable, write_text


def add_parser(subparsers: Any) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "report",
        help="make an HTML page, KTAP or GitHub annotations of a results file",
        epilog="FILE may be - for standard output. Exit codes: 0 written, 2 usage or a"
        " name that cannot be written, 3 a file that cannot be read, a full disk",
    )
    parser.add_argument("results", type=Path, metavar="RESULTS.json")
    parser.add_argument("--html", metavar="FILE", help="one page that needs nothing else")
    parser.add_argument("--compare", type=Path, metavar="OLD.json", help="a run to compare with")
    parser.add_argument("--ktap", metavar="FILE", help="KTAP version 1")
    parser.add_argument(
        "--github",
        action="store_true",
        help="print error annotations, and add a table to $GITHUB_STEP_SUMMARY if it is set",
    )


def run(options: argparse.Namespace) -> int:
    """Run the verb."""
    from kvmnest.reports import github, html, jsonfile, ktap

    if not (options.html or options.ktap or options.github):
        raise UsageError("say what to make: --html, --ktap or --github")
    require_writable(*(Path(n) for n in (options.html, options.ktap) if n not in (None, "-")))
    run = jsonfile.read(options.results)
    old = jsonfile.read(options.compare) if options.compare else None
    if options.html:
        _write(options.html, [html.page(run, old)])
    if options.ktap:
        _write(options.ktap, ktap.lines(run))
    if options.github:
        _write("-", github.error_lines(run))
        if os.environ.get("GITHUB_STEP_SUMMARY"):
            _append(os.environ["GITHUB_STEP_SUMMARY"], github.summary(run))
    return 0


def _write(name: str, lines: Iterable[str]) -> None:
    text = "".join(f"{line}\n" for line in lines)
    if name == "-":
        sys.stdout.write(text)
    else:
        write_text(Path(name), text)


def _append(name: str, lines: Iterable[str]) -> None:
    try:
        with open(name, "a", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)
    except OSError as error:
        raise HarnessError(f"cannot write {name}: {error.strerror or error}") from error
