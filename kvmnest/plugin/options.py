"""The options of ``kvmnest run`` that act inside the pytest process."""

from __future__ import annotations

import pytest

from kvmnest.kmsg import LEVELS, WARNING


def add(parser: pytest.Parser) -> None:
    """Add them all, in one group."""
    group = parser.getgroup("kvmnest", "nested VMX under KVM")
    _add_machine(group)
    _add_cases(group)
    _add_events(group)


def _add_machine(group: pytest.OptionGroup) -> None:
    """What the cases run on: see ``kvmnest.plugin.fixtures``."""
    group.addoption(
        "--nested-roundtrip",
        action="store_true",
        help="save, destroy, rebuild and restore the VM between the commands of every case",
    )
    group.addoption(
        "--fresh-vm",
        action="store_true",
        help="make a new VM for each case instead of resetting the one before",
    )
    group.addoption(
        "--kvmnest-budget",
        type=float,
        default=5.0,
        metavar="SECONDS",
        help="time after which a vCPU that does not come back counts as hung (default: 5)",
    )
    group.addoption(
        "--require-kvm", action="store_true", help="an error, not a skip, without /dev/kvm"
    )
    group.addoption(
        "--kvmnest-target",
        default="kvm",
        metavar="NAME",
        help="kvm, lab or qemu, for known deviations, or reference, which has no /dev/kvm",
    )
    group.addoption("--kvmnest-bochs", metavar="PATH", help="the Bochs of the reference target")
    group.addoption(
        "--kvmnest-cpu-model", metavar="NAME", help="the CPU model of the reference target"
    )


def _add_cases(group: pytest.OptionGroup) -> None:
    """Which cases, in which order."""
    group.addoption(
        "--kvmnest-shuffle", type=int, metavar="SEED", help="run the cases in a seeded random order"
    )
    group.addoption(
        "--kvmnest-part",
        metavar="K/N",
        help="keep every Nth case only, from case K on (from 0)",
    )
    group.addoption(
        "--kvmnest-deselect",
        action="append",
        default=[],
        metavar="ID",
        help="leave out cases whose id begins so",
    )
    group.addoption(
        "--kvmnest-only",
        action="append",
        default=[],
        metavar="ID",
        help="of the cases that ship with kvmnest, leave out those with other ids",
    )
    group.addoption(
        "--kvmnest-from", type=int, default=0, metavar="N", help="leave out the first N cases"
    )


def _add_events(group: pytest.OptionGroup) -> None:
    """What the parent process is told: see ``kvmnest.plugin.stream``."""
    group.addoption(
        "--kvmnest-trace",
        action="store_true",
        help="with --kvmnest-events: send every command of L1 as an event",
    )
    group.addoption(
        "--kernel-log",
        choices=LEVELS[WARNING:],
        default=LEVELS[WARNING],
        help="with --kvmnest-events: kernel messages to keep with each case, of this level and"
        " more severe ones (default: warning)",
    )
    group.addoption(
        "--kvmnest-events", metavar="PATH", help="write events as JSON lines to PATH or fd:N"
    )
    group.addoption(
        "--kvmnest-list", action="store_true", help="with --kvmnest-events: say what cases need"
    )
