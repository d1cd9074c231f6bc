"""What ``kvmnest fuzz`` needs for entries and for programs: where they run, and their journal."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvmnest.cli.lab import emulator, parameters, use_host

if TYPE_CHECKING:
    from kvmnest.fuzz.machines import FuzzMachine


def machine(
    options: argparse.Namespace, lab: Callable[..., FuzzMachine] | None = None
) -> FuzzMachine:
    """This machine, or one that boots the lab, made by ``lab`` (LabMachine unless given)."""
    from kvmnest.fuzz.machines import LabMachine, LocalMachine

    if use_host(options):
        return LocalMachine()
    return (lab or LabMachine)(
        kernel=options.kernel,
        params=parameters(options.kvm_param),
        modules=options.kvm_modules,
        emulator=emulator(options),
    )


def journal_path(options: argparse.Namespace, run: dict[str, Any]) -> Path:
    """``--journal``, else a place in the cache that belongs to what the run is.

    An earlier journal there is removed unless ``--continue`` goes on with it.
    """
    from kvmnest.lab import cache

    if options.journal:
        return Path(options.journal)
    path = cache.root() / "fuzz" / f"{cache.digest([run])[:16]}.jsonl"
    if not options.go_on:
        path.unlink(missing_ok=True)
    return path
