"""``kvmnest bench``: how fast L1 works, as ratios to a bare KVM_RUN."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from kvmnest import reading
from kvmnest.cli.lab import add_options, emulator, lab_only, parameters
from kvmnest.errors import UsageError
from kvmnest.files import require_writable, write_json


def add_parser(subparsers: Any) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "bench",
        help="measure L1s, resets, commands and VM entries against a bare KVM_RUN",
        description="Times in Bochs are those of its guest: 100 million instructions a second.",
        epilog="exit codes: 0 measured, 2 usage, 3 harness or environment error",
    )
    parser.add_argument(
        "--target",
        choices=("kvm", "lab"),
        default="kvm",
        help="this machine's /dev/kvm, which needs no VMX for the first figures, or the lab",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="figures of an earlier run")
    add_options(parser)


def run(options: argparse.Namespace) -> int:
    """Run the verb."""
    require_writable(options.json)
    old = load(options.compare)["seconds"] if options.compare else {}
    in_lab = options.target == "lab" or options.boot
    found = _in_lab(options) if in_lab else _here(options)
    if options.json:
        write_json(options.json, found)
    print(f"kernel {found['kernel']}, {found['cpu']}")
    bare = next(iter(found["seconds"].values()))
    for name, seconds in found["seconds"].items():
        line = f"{name:38} {seconds * 1e6:10.2f} us {seconds / bare:9.2f} x {1 / seconds:10.0f} /s"
        if name in old:
            line += f"   {seconds / old[name]:.2f} of before"
        print(line)
    return 0


def _here(options: argparse.Namespace) -> dict[str, Any]:
    from kvmnest.bench.measure import measure

    if given := lab_only(options):
        raise UsageError(f"{given} needs --target lab")
    return measure()


def _in_lab(options: argparse.Namespace) -> dict[str, Any]:
    from kvmnest.lab.machine import Lab

    lab = Lab(
        options.kernel,
        kvm_params=parameters(options.kvm_param),
        kvm_modules=options.kvm_modules,
        emulator=emulator(options),
    )
    output = lab.output(["python3", "-m", "kvmnest.bench.measure"], "the benchmark", idle_limit=300)
    found: dict[str, Any] = reading.value(output, "JSON", {}, "the lab's answer")
    return found


def load(path: Path) -> dict[str, Any]:
    """Read what --json wrote. Raises KvmnestError for anything else."""
    from kvmnest.bench.measure import SCHEMA

    schema = {
        "type": "object",
        "required": ["schema", "seconds"],
        "properties": {
            "schema": {"const": SCHEMA},
            "seconds": {
                "type": "object",
                "additionalProperties": {"type": "number", "minimum": 1e-12, "maximum": 1e12},
            },
        },
    }
    return reading.document(path, "file of kvmnest bench --json", schema)
