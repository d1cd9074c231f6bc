"""``kvmnest build``: kvm.ko and kvm-intel.ko of a source tree, for a Debian kernel."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from kvmnest.errors import UsageError
from kvmnest.files import require_folder
from kvmnest.lab import DEFAULT_KERNEL


def add_parser(subparsers: Any) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "build",
        help="build KVM's modules of a source tree for a Debian kernel of the lab",
        description="Compile arch/x86/kvm and virt/kvm of TREE against a Debian kernel's headers"
        " and put kvm.ko and kvm-intel.ko into DIR, for --kvm-modules DIR. Headers and build tools"
        " come from Debian's archive. The compiler is the kernel's own, or else gcc; 12 was tried.",
        epilog="exit codes: 0 built, 1 it does not compile, 2 usage, 3 a package or tool is"
        " missing",
    )
    parser.add_argument("tree", type=Path, metavar="TREE")
    parser.add_argument("to", type=Path, metavar="DIR")
    parser.add_argument(
        "--kernel", metavar="SPEC", help=f"Debian version (default: {DEFAULT_KERNEL})"
    )


def run(options: argparse.Namespace) -> int:
    """Run the verb."""
    import sys

    from kvmnest.kernel.build import BuildError, build_tree, require_source
    from kvmnest.lab import kernels

    # What can be wrong at once comes before a kernel that may have to be fetched.
    tree = Path(os.path.realpath(options.tree))
    if not os.path.isdir(tree):
        raise UsageError(f"{options.tree}: no such directory")
    require_source(tree)
    require_folder(options.to)
    release = kernels.resolve(options.kernel).release
    try:
        build_tree(tree, release, options.to)
    except BuildError as error:
        print(f"kvmnest: {error}", file=sys.stderr)
        return 1
    print(f"{options.to}: kvm.ko and kvm-intel.ko for {release}")
    return 0
