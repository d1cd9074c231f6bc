"""``kvmnest lab run``: boot the lab and run one command in it."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kvmnest.errors import UsageError

if TYPE_CHECKING:
    from kvmnest.lab.emulators import Choice
    from kvmnest.results.targets import Target


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the ``lab`` verb."""
    lab = subparsers.add_parser("lab", help="run a command on a real KVM in the software lab")
    verbs = lab.add_subparsers(dest="lab_verb", required=True, metavar="VERB")
    parser = verbs.add_parser(
        "run",
        help="boot a kernel with nested KVM and run COMMAND in it",
        usage="kvmnest lab run [options] -- COMMAND...",
    )
    add_options(parser)
    parser.add_argument("--cpus", type=int, default=1, metavar="N", help="CPUs of the guest")
    parser.add_argument(
        "--idle-limit",
        type=float,
        default=120,
        metavar="SECONDS",
        help="give up after so long without output (default 120)",
    )
    parser.add_argument("--limit", type=float, metavar="SECONDS", help="give up after so long")
    parser.add_argument(
        "--cold", action="store_true", help="boot anew, do not continue from a saved boot"
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="kernel log and times")
    parser.add_argument("command", nargs="+", metavar="COMMAND")


def add_options(parser: argparse.ArgumentParser, boots: Sequence[str] = ("lab", "qemu")) -> None:
    """Options that say what to boot, and where; shared by all verbs that boot kernels."""
    parser.add_argument(
        "--kernel", metavar="SPEC", help="Debian version (6.1.0-56, 6.12), .deb, or folder"
    )
    parser.add_argument("--kvm-modules", metavar="DIR", help="take kvm*.ko from DIR")
    parser.add_argument(
        "--kvm-param",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="module parameter of kvm_intel or kvm (repeatable)",
    )
    add_emulator_options(parser, boots)


def add_emulator_options(
    parser: argparse.ArgumentParser, boots: Sequence[str] = ("lab", "qemu")
) -> None:
    """Options that say where a kernel is booted."""
    restart = "; reboot restarts this machine into each kernel" if "reboot" in boots else ""
    parser.add_argument(
        "--boot",
        choices=boots,
        help="where: lab is Bochs, which emulates VT-x (default); qemu is QEMU with this machine's"
        f" KVM, which must offer VMX to its guests{restart}",
    )
    parser.add_argument("--bochs", metavar="PATH", help="the Bochs to use")
    parser.add_argument("--qemu", metavar="PATH", help="the qemu-system-x86_64 to use")


def emulator(options: argparse.Namespace) -> "Choice":
    """The emulator that the options mean. Raises UsageError if they contradict each other."""
    from kvmnest.lab.emulators import Choice

    boot = options.boot or "lab"
    programs = {"lab": "bochs", "qemu": "qemu"}
    for needs, name in programs.items():
        if getattr(options, name) and boot != needs:
            raise UsageError(f"--{name} needs --boot {needs}")
    return Choice(boot, getattr(options, programs[boot]))


def lab_only(options: argparse.Namespace) -> str:
    """The first of the given options that this machine's /dev/kvm has no use for; "" if none."""
    return first_given(options, "kernel", "kvm_modules", "kvm_param", "boot", "bochs", "qemu")


def first_given(options: argparse.Namespace, *names: str) -> str:
    """The first of these options that is given, as one writes it; "" if none is."""
    given = (f"--{name.replace('_', '-')}" for name in names if getattr(options, name))
    return next(given, "")


def parameters(settings: list[str]) -> dict[str, str]:
    """Parse NAME=VALUE settings. Raises UsageError."""
    found = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not (name and equals) or not value or any(c.isspace() for c in setting):
            raise UsageError(f"--kvm-param {setting!r}: expected NAME=VALUE")
        found[name] = value
    return found


def use_host(options: argparse.Namespace) -> bool:
    """Whether --target and the options of the lab mean this machine's /dev/kvm.

    Raises UsageError if they contradict each other, KvmUnavailable or HarnessError for --target
    kvm where /dev/kvm does not do.
    """
    from kvmnest.results.environment import require_kvm, why_not_kvm

    given = lab_only(options)
    if options.target == "kvm":
        if given:
            raise UsageError(f"{given} needs --target lab: the host's kernel stays as it is")
        require_kvm()
        return True
    return options.target == "auto" and not given and not why_not_kvm()


def target(options: argparse.Namespace, params: Mapping[str, str] | None = None) -> "Target":
    """The target that --target and the options of the lab mean; ``params`` are defaults.

    Raises as ``use_host`` does, and what the lab raises.
    """
    from kvmnest.results.lab_target import LabTarget
    from kvmnest.results.targets import LocalTarget

    if use_host(options):
        return LocalTarget()
    return LabTarget(
        kernel=options.kernel,
        kvm_modules=Path(options.kvm_modules) if options.kvm_modules else None,
        kvm_params={**(params or {}), **parameters(options.kvm_param)},
        emulator=emulator(options),
    )


def run(args: argparse.Namespace) -> int:
    """Run the command; returns its exit status (128 + signal if a signal killed it)."""
    from kvmnest.lab.machine import Lab

    def show_error(data: bytes) -> None:
        sys.stderr.buffer.write(data)
        sys.stderr.buffer.flush()

    settings = parameters(args.kvm_param)
    with Lab(
        args.kernel,
        settings,
        args.kvm_modules,
        args.cpus,
        emulator(args),
        snapshots=not args.cold,
    ) as lab:
        status = lab.run(
            args.command,
            on_error=show_error,
            on_kernel=show_error if args.verbose else lambda _: None,
            idle_limit=args.idle_limit,
            limit=args.limit,
        )
    if args.verbose:
        times = lab.times
        print(
            f"kernel {lab.info['release']}: prepared in {times.prepare:.2f} s, booted in "
            f"{times.boot:.2f} s, total {times.total:.2f} s",
            file=sys.stderr,
        )
    return status if status >= 0 else 128 - status
