"""KVM's modules that tell which lines run, for the verbs that use them."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from kvmnest.errors import UsageError
from kvmnest.lab.debian import NEWEST

if TYPE_CHECKING:
    from kvmnest.coverage.collect import Collector
    from kvmnest.coverage.record import Record


def collector_for(
    options: argparse.Namespace, before: Record | None = None, old: Record | None = None
) -> Collector:
    """Build the modules, which the lab takes then.

    Raises UsageError if the files named are of another kernel, HarnessError if there is no source
    of the kernel or it cannot be built.
    """
    from kvmnest.coverage.build import build, full_names
    from kvmnest.coverage.collect import Collector
    from kvmnest.coverage.record import Record
    from kvmnest.lab import kernels

    if options.kvm_modules:
        raise UsageError("--kvm-modules: coverage builds the modules itself")
    options.kernel = options.kernel or NEWEST
    options.target = "lab"
    release = kernels.resolve(options.kernel).release
    built = build(full_names(getattr(options, "source", []), release), release)
    options.kvm_modules = str(built.folder)
    nothing = Record(built.release, built.version, {})
    for known in filter(None, (before, old)):
        # Before the run, which may take long.
        nothing.new_against(known)
    return Collector(built)
