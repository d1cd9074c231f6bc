"""``kvmnest matrix``: the suite on many kernels and settings."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from kvmnest.cli.lab import parameters
from kvmnest.errors import HarnessError, UsageError


def add_parser(subparsers: Any) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "matrix",
        help="run the suite on many kernels and settings, and show what differs",
        epilog="exit codes: 0 no case failed, 1 a case failed somewhere, 2 usage, 3 a kernel"
        " could not be run or another error of the environment, 130 interrupted",
    )
    parser.add_argument("selected", nargs="*", metavar="CASE", help="cases (default: all)")
    parser.add_argument("--kernels", nargs="+", required=True, metavar="SPEC", help="in order")
    parser.add_argument("-k", dest="keyword", default="", metavar="EXPR", help="as in pytest")
    parser.add_argument(
        "--setting",
        action="append",
        default=[],
        metavar="NAME=VALUE[,NAME=VALUE]",
        help="run each kernel with these parameters too (repeatable)",
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, metavar="N")
    parser.add_argument("--state", type=Path, metavar="DIR", help="where results are kept")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all outcomes")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page")
    parser.add_argument("--bochs", metavar="PATH", help="the Bochs to use")


def run(options: argparse.Namespace) -> int:
    """Run the verb."""
    from kvmnest.lab import cache
    from kvmnest.matrix.page import page
    from kvmnest.matrix.run import Cell, Matrix, changes

    if options.jobs < 1:
        raise UsageError(f"--jobs must be at least 1, not {options.jobs}")
    settings = [(), *(tuple(parameters(text.split(",")).items()) for text in options.setting)]
    cells = [Cell(kernel, setting) for setting in settings for kernel in options.kernels]
    matrix = Matrix(
        options.state or cache.root() / "matrix",
        options.selected,
        options.keyword,
        options.bochs,
        lambda line: print(line, flush=True),
    )
    documents = matrix.run(cells, options.jobs)
    print()
    found = changes(documents)
    for left, right, lines in found:
        print(f"{left} -> {right}:")
        for line in lines:
            print(f"  {line}")
    if not found:
        print("every case has the same outcome everywhere")
    for path, text in (
        (options.json, json.dumps({"schema": 1, "columns": documents}, indent=1)),
        (options.html, page(documents)),
    ):
        if path:
            try:
                path.write_text(f"{text}\n", encoding="utf-8")
            except OSError as error:
                raise HarnessError(f"cannot write {path}: {error.strerror or error}") from error
    if any(d["summary"]["failed"] or d["summary"]["error"] for d in documents.values()):
        return 1
    return 3 if any(d["problems"] or not d["cases"] for d in documents.values()) else 0
