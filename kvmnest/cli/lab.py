"""``kvmnest lab``: run one command in the lab; build its emulator."""

import argparse
import json
import math
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from kvmnest.cli.numbers import seconds
from kvmnest.errors import UsageError
from kvmnest.lab import DEFAULT_KERNEL

if TYPE_CHECKING:
    from kvmnest.lab.bochs_build import Progress
    from kvmnest.lab.emulators import Choice
    from kvmnest.lab.fleet import Found
    from kvmnest.run.targets import Target


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
        type=seconds,
        default=120,
        metavar="SECONDS",
        help="give up after so long without output (default 120)",
    )
    parser.add_argument("--limit", type=seconds, metavar="SECONDS", help="give up after so long")
    parser.add_argument(
        "--cold", action="store_true", help="boot anew, do not continue from a saved boot"
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="kernel log and times")
    parser.add_argument("command", nargs="+", metavar="COMMAND")
    build = verbs.add_parser(
        "build",
        help="build an optimised Bochs for this CPU from Debian's source, once",
        description="Fetch Debian's source of Bochs (hash checked against the archive's signed"
        " index), mend its known faults, compile it for this CPU and keep it in the cache, where"
        " every verb that boots the lab finds it. An interrupted build goes on where it stopped.",
        epilog="exit codes: 0 built or had been built, 1 see --check, 3 cannot be built,"
        " 130 interrupted",
    )
    build.add_argument(
        "--smp", action="store_true", help="the variant for --cpus above 1, which is slower"
    )
    build.add_argument(
        "--check",
        action="store_true",
        help="build nothing: exit 0 if there is nothing to build, since it was built or /dev/kvm"
        " offers VMX to guests, else 1",
    )
    build.add_argument(
        "--jobs", type=int, metavar="N", help="compilers at once (default: one for each core)"
    )
    emulators = verbs.add_parser(
        "emulators",
        help="list the emulators at hand, their CPU models, and what these offer to kvm_intel",
        description="Each Bochs at hand, which one the lab uses and why, and for each CPU model"
        " of that one the VMX features that a kernel finds (+ and -: compared with the model"
        " above). Each model is booted once, some seconds each, and the answer kept.",
        epilog="exit codes: 0 listed, 2 usage, 3 no emulator can be used, 130 interrupted",
    )
    emulators.add_argument("--bochs", metavar="PATH", help="a Bochs of yours")
    emulators.add_argument(
        "--measure",
        action="store_true",
        help="do not list CPU models, but measure the speed of each Bochs",
    )
    emulators.add_argument(
        "--outcomes", action="store_true", help="what the suite gave on each CPU model"
    )
    emulators.add_argument(
        "--record",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="take results of kvmnest run --cpu-model or matrix --cpu-models (--json FILE) for"
        " --outcomes; files of the same model are parts of one run",
    )
    emulators.add_argument(
        "--kernel", metavar="SPEC", help=f"the kernel to ask (default: {DEFAULT_KERNEL})"
    )
    emulators.add_argument("--no-boot", action="store_true", help="names of the models only")
    emulators.add_argument("--json", action="store_true", help="print a JSON document")


def add_options(parser: argparse.ArgumentParser, boots: Sequence[str] = ("lab", "qemu")) -> None:
    """Options that say what to boot, and where; shared by all verbs that boot kernels."""
    parser.add_argument(
        "--kernel",
        metavar="SPEC",
        help="Debian version (6.1.0-56, 6.12, newest, rc), .deb files (A.deb,B.deb), or folder",
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
    parser.add_argument(
        "--bochs",
        metavar="PATH",
        help="the Bochs to use (default: the one of kvmnest lab build, else bochs in PATH)",
    )
    parser.add_argument(
        "--cpu-model",
        metavar="NAME",
        help="the CPU that Bochs emulates (kvmnest lab emulators lists them)",
    )
    parser.add_argument("--qemu", metavar="PATH", help="the qemu-system-x86_64 to use")


def emulator(options: argparse.Namespace) -> "Choice":
    """The emulator that the options mean. Raises UsageError if they contradict each other."""
    from kvmnest.lab.emulators import Choice

    boot = options.boot or "lab"
    programs = {"lab": "bochs", "qemu": "qemu"}
    for needs, name in programs.items():
        if getattr(options, name) and boot != needs:
            raise UsageError(f"--{name} needs --boot {needs}")
    if options.cpu_model and boot != "lab":
        raise UsageError("--cpu-model needs --boot lab")
    return Choice(boot, getattr(options, programs[boot]), cpu_model=options.cpu_model)


def lab_only(options: argparse.Namespace) -> str:
    """The first of the given options that this machine's /dev/kvm has no use for; "" if none."""
    return first_given(
        options, "kernel", "kvm_modules", "kvm_param", "boot", "bochs", "cpu_model", "qemu"
    )


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
        if "," in value and "=" in value:
            raise UsageError(
                f"--kvm-param {setting!r}: one parameter each (--kvm-param {name}=...)"
            )
        found[name] = value
    return found


def use_host(options: argparse.Namespace) -> bool:
    """Whether --target and the options of the lab mean this machine's /dev/kvm.

    Raises UsageError if they contradict each other, KvmUnavailable or HarnessError for --target
    kvm where /dev/kvm cannot run L1.
    """
    from kvmnest.host import require_kvm, why_not_kvm

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
    from kvmnest.run.lab_target import LabTarget
    from kvmnest.run.targets import LocalTarget

    if use_host(options):
        return LocalTarget()
    return LabTarget(
        kernel=options.kernel,
        kvm_modules=Path(options.kvm_modules) if options.kvm_modules else None,
        kvm_params={**(params or {}), **parameters(options.kvm_param)},
        emulator=emulator(options),
    )


def run(args: argparse.Namespace) -> int:
    """Run the verb below ``lab``."""
    return {"run": _run, "build": _build, "emulators": _emulators}[args.lab_verb](args)


def _build(args: argparse.Namespace) -> int:
    """Build Bochs."""
    from kvmnest.lab import bochs_build

    if args.jobs is not None and args.jobs < 1:
        raise UsageError(f"--jobs must be at least 1, not {args.jobs}")
    if args.check:
        from kvmnest.host import why_not_kvm

        return int(bochs_build.built(args.smp) is None and bool(why_not_kvm()))
    show = _BuildProgress(sys.stdout)
    try:
        program = bochs_build.build(args.smp, show.line, show.progress, args.jobs)
    finally:
        show.line("")
    show.line(str(program))
    return 0


def _emulators(args: argparse.Namespace) -> int:
    """List the emulators."""
    if args.outcomes or args.record:
        return _outcomes(args.record)
    from kvmnest.lab import bochs_build, cpu_models, fleet
    from kvmnest.lab.errors import LabSetupError

    found = fleet.emulators(args.bochs)
    used = next((entry.emulator for entry in found if entry.used), None)
    if used is None:
        raise LabSetupError(found[0].why)
    if args.measure:
        return _measure([entry for entry in found if entry.emulator], args.kernel)
    models = cpu_models.usable(used.version, used.models)
    if args.json:
        offers = [] if args.no_boot else list(fleet.offers(used, args.kernel))
        rows = [
            {
                "origin": entry.origin,
                "path": entry.path,
                "version": entry.emulator.version if entry.emulator else None,
                "used": entry.used,
                "why": entry.why,
                "build": bochs_build.notes(Path(entry.path)),
            }
            for entry in found
        ]
        names = [model.name for model in models]
        told = [{**asdict(offer), "params": dict(offer.params)} for offer in offers]
        document = {"emulators": rows, "models": names, "default": used.model.name}
        print(json.dumps({**document, "offered": told}, indent=1))
        return 0
    for entry in found:
        name = f"Bochs {entry.emulator.version}" if entry.emulator else "unusable"
        mark, state = ("*", "used") if entry.used else (" ", "not used")
        print(f"{mark} {name}, {entry.origin}, {entry.path}: {state}: {entry.why}")
    print(f"CPU models with VMX of {used.path}:")
    before: tuple[str, ...] = ()
    for offer in (
        (fleet.Offered(model.name) for model in models)
        if args.no_boot
        else fleet.offers(used, args.kernel)
    ):
        default = " (default)" if offer.model == used.model.name else ""
        print(f"  {offer.model}{default}" + (f": {offer.cpu}" if offer.cpu else ""))
        has = (*offer.vmx_flags, *offer.features)
        words = [f"+{name}" for name in has if name not in before]
        words += [f"-{name}" for name in before if name not in has]
        text = f"cannot be used: {offer.problem}" if offer.problem else " ".join(words)
        for line in textwrap.wrap(text, 92, break_on_hyphens=False):
            print(f"      {line}")
        before = has or before
        sys.stdout.flush()
    return 0


def _outcomes(record: Sequence[Path] | None) -> int:
    """Print the suite's outcomes on each CPU model, or those that come into the record."""
    from kvmnest.reports import by_cpu_model

    rows = by_cpu_model.record(record) if record else by_cpu_model.recorded()
    print("\n".join(by_cpu_model.lines(rows)))
    return 0


def _measure(found: "Sequence[Found]", kernel: str | None) -> int:
    """Print a table of CPU seconds, a row for each emulator as soon as it is measured."""
    from kvmnest.lab.measure import ROUNDS, speeds

    print(f"seconds of CPU, the least of {ROUNDS}: a cold boot; VM entries and exits of an L1")
    print(f"{'boot':>6} {'L1':>6}  emulator", flush=True)
    for entry, speed in zip(found, speeds([entry.path for entry in found], kernel), strict=True):
        assert entry.emulator is not None
        name = f"Bochs {entry.emulator.version}, {entry.origin}, {entry.path}"
        print(f"{speed.boot:6.2f} {speed.work:6.2f}  {name}", flush=True)
    return 0


class _BuildProgress:
    """One line, rewritten, on a terminal; in a log a line at times."""

    def __init__(self, out: TextIO) -> None:
        self._out, self._terminal = out, out.isatty()
        self._pending, self._shown = False, -math.inf

    def line(self, text: str) -> None:
        """Write a line that stays ("": only end the one that does not)."""
        if self._pending:
            self._out.write("\r\x1b[K")
            self._pending = False
        if text:
            self._out.write(f"{text}\n")
        self._out.flush()

    def progress(self, at: "Progress") -> None:
        """Show how far it is."""
        every = 0.1 if self._terminal else 20.0
        if at.done and (at.done < at.total or self._terminal) and at.seconds - self._shown < every:
            return
        self._shown = at.seconds
        left = ""
        if at.total and at.done > 20:
            left = f", about {at.step_seconds * (at.total - at.done) / at.done:.0f} s to go"
        files = f" {at.done} of {at.total} files" if at.total else ""
        text = f"building Bochs: {at.step}{files}, {at.seconds:.0f} s{left}"
        if self._terminal:
            self._out.write(f"\r\x1b[K{text}")
            self._pending = True
            self._out.flush()
        else:
            self.line(text)


def _run(args: argparse.Namespace) -> int:
    """Run the command; returns its exit status (128 + signal if a signal killed it)."""
    from kvmnest.lab.machine import Lab, write_error

    lab = Lab(
        args.kernel,
        kvm_params=parameters(args.kvm_param),
        kvm_modules=args.kvm_modules,
        cpus=args.cpus,
        emulator=emulator(args),
        snapshots=not args.cold,
    )
    status = lab.run(
        args.command,
        on_error=write_error,
        on_kernel=write_error if args.verbose else lambda _: None,
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
