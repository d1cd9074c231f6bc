"""``kvmnest caps``: VMX capability MSRs as an L1 sees them, bit by bit."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from kvmnest.cli.lab import add_options, emulator, parameters, use_host
from kvmnest.errors import UsageError


def add_parser(subparsers: Any) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "caps",
        help="show the VMX capability MSRs bit by bit, or compare two kernels",
        usage="kvmnest caps [options] | kvmnest caps [options] diff A B",
        description="Show what VMX offers to an L1. A and B are files written by --json, or"
        " kernels as for --kernel.",
        epilog="exit codes: 0 shown (diff: no difference), 1 diff: they differ, 2 usage, 3 no VMX"
        " or another error of the environment",
    )
    parser.add_argument("words", nargs="*", metavar="diff A B", help="compare A with B")
    parser.add_argument("--target", choices=("auto", "kvm", "lab"), default="auto")
    parser.add_argument("--json", action="store_true", help="print a JSON document")
    add_options(parser)


def run(options: argparse.Namespace) -> int:
    """Run the verb."""
    from kvmnest.doctor import capabilities
    from kvmnest.lab import kernels

    if options.words and (options.words[0] != "diff" or len(options.words) != 3):
        raise UsageError("expected nothing, or: diff A B")
    if options.words:
        # What is wrong with either is told before the first boot.
        named = options.words[1:]
        files = [capabilities.load(Path(word)) if _is_file(word) else None for word in named]
        for word in named:
            if not _is_file(word):
                kernels.resolve(word)
        old, new = (
            file or _document(options, word) for word, file in zip(named, files, strict=True)
        )
        lines = capabilities.compare(old, new)
        if options.json:
            print(json.dumps(lines, indent=1))
        else:
            for msr, name, before, after in lines:
                print(f"{msr:30} {name:40} {before} -> {after}")
            print(f"{len(lines)} differences" if lines else "no difference")
        return 1 if lines else 0
    document = _document(options, None)
    if options.json:
        print(json.dumps(document, indent=1))
        return 0
    print(f"{document['kernel']}, {document['cpu']}")
    last = ""
    for msr, name, text in capabilities.decoded(document):
        if msr != last:
            print(msr)
            last = msr
        print(f"  {name:44} {text}")
    return 0


def _is_file(word: str) -> bool:
    return word.endswith(".json")


def _document(options: argparse.Namespace, word: str | None) -> dict[str, Any]:
    from kvmnest.doctor import capabilities

    if not word and use_host(options):
        return capabilities.here()
    return capabilities.in_lab(
        word or options.kernel,
        parameters(options.kvm_param),
        options.kvm_modules,
        emulator(options),
    )
