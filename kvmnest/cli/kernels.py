"""``kvmnest kernels``: Debian kernels that the lab can boot; fetch or forget one."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import Any

from kvmnest.errors import UsageError


def add_parser(subparsers: Any) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "kernels",
        help="list the kernels that the lab can boot; fetch or forget some",
        description="Kernels of Debian's archive (all suites that have amd64 kernels), installed on"
        " this machine, or in the lab's cache. Each release is a SPEC for --kernel; newest is the"
        " newest that was released, rc the newest release candidate.",
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
        found = [e for e in found if "cloud" in e.release or e.cached or e.installed]
    if options.json:
        print(json.dumps([asdict(entry) for entry in found], indent=1))
        return 0
    width = max((len(entry.release) for entry in found), default=0)
    for entry in found:
        here = "cached" if entry.cached else "installed" if entry.installed else ""
        origin = f"{', '.join(entry.suites)}  {entry.version}" if entry.version else "not in Debian"
        size = f"{entry.size / 1e6:4.0f} MB" if entry.size and not here else ""
        print(f"{here:9}  {entry.release:{width}}  {size:7}  {origin}")
    print("also: .deb files, a folder with bzImage or vmlinux and modules, a kernel build tree")
    return 0
