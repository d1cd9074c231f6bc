"""``kvmnest kernels``: Debian kernels that the lab can boot; fetch or forget one."""

from __future__ import annotations

import argparse
import json
from typing import Any

from kvmnest.errors import UsageError


def add_parser(subparsers: Any) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "kernels",
        help="list the kernels that the lab can boot; fetch or forget some",
        usage="kvmnest kernels [--all] [--json] | kvmnest kernels fetch SPEC... |"
        " kvmnest kernels forget RELEASE...",
        epilog="exit codes: 0 done, 2 usage, 3 apt cannot be asked or a kernel not be fetched",
    )
    parser.add_argument("words", nargs="*", metavar="fetch|forget SPEC...")
    parser.add_argument("--all", action="store_true", help="other flavours than cloud too")
    parser.add_argument("--json", action="store_true", help="print a JSON document")


def run(options: argparse.Namespace) -> int:
    """Run the verb."""
    from kvmnest.lab import kernels

    if options.words:
        verb, *specs = options.words
        if verb not in ("fetch", "forget") or not specs:
            raise UsageError("expected nothing, fetch SPEC..., or forget RELEASE...")
        for spec in specs:
            if verb == "fetch":
                kernel = kernels.resolve(spec)
                print(f"{kernel.release}: ready")
            else:
                print(f"{kernels.forget(spec)}: forgotten")
        return 0
    found = kernels.available()
    if not options.all:
        found = [entry for entry in found if "cloud" in entry.release or entry.cached]
    if options.json:
        print(json.dumps([vars(entry) for entry in found], indent=1))
    else:
        for entry in found:
            print(f"{'cached' if entry.cached else '':6}  {entry.release}")
        print("also: a .deb, a folder with bzImage or vmlinux and modules, a kernel build tree")
    return 0
