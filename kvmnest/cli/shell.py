"""``kvmnest shell``: a Python prompt with a live L1."""

from __future__ import annotations

import argparse
from typing import Any

from kvmnest.cli.lab import add_options, emulator, parameters, use_host


def add_parser(subparsers: Any) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "shell",
        help="a Python prompt with a live L1",
        description="Instructions of L1 one at a time, the VMCS decoded, L2 in single steps. Type"
        " help for what there is. Statements are also read from a pipe.",
        epilog="exit codes: 0 ended, 2 usage, 3 harness or environment error, 130 interrupted",
    )
    parser.add_argument("--target", choices=("auto", "kvm", "lab"), default="auto")
    add_options(parser)


def run(options: argparse.Namespace) -> int:
    """Run the verb."""
    from kvmnest.lab.machine import Lab
    from kvmnest.shell import prompt

    if use_host(options):
        return prompt.here()
    return prompt.in_lab(
        Lab(
            options.kernel,
            kvm_params=parameters(options.kvm_param),
            kvm_modules=options.kvm_modules,
            emulator=emulator(options),
        )
    )
