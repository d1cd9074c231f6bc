"""``kvmnest found``: defects of KVM that kvmnest shows on kernels of today."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvmnest.cli.lab import add_options, emulator, parameters
from kvmnest.errors import HarnessError, UsageError
from kvmnest.files import require_writable

if TYPE_CHECKING:
    from kvmnest.found import Defect
    from kvmnest.found.record import Shown

_TEXTS = ("seen", "right", "reach", "loss", "fix", "limits", "public", "witness")
_WORDS = {
    "VULNERABLE": "seen on",
    "FIXED": "not seen on",
    "NOT APPLICABLE": "cannot be asked on",
    "NO VERDICT": "no verdict on",
}


def add_parser(subparsers: Any) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "found",
        help="list the defects of KVM that kvmnest shows on kernels of today",
        description="List defects of KVM: what is seen, what the SDM says, which kernels have it,"
        " where it is in the source, what mends it. --verify runs their reproducers in the lab on"
        " a kernel as it is and on one whose KVM is built with the fixes.",
        epilog="exit codes: 0 listed or built (--verify: each is seen, and gone with its fix), 1"
        " --verify: one is not, --build: a fix does not fit, 2 usage, 3 harness or environment"
        " error, 130 interrupted",
    )
    parser.add_argument("ids", nargs="*", metavar="ID", help="only these, in full")
    parser.add_argument("--json", action="store_true", help="print a JSON document")
    parser.add_argument("--verify", action="store_true", help="have a kernel show them")
    parser.add_argument(
        "--build",
        type=Path,
        metavar="DIR",
        help="put kvm.ko and kvm-intel.ko with the fixes into DIR, for --kvm-modules DIR",
    )
    parser.add_argument(
        "--as-it-is", action="store_true", help="--verify: without building any fix"
    )
    parser.add_argument(
        "--record", type=Path, metavar="FILE", help="--verify: add what was shown to FILE"
    )
    add_options(parser)


def run(options: argparse.Namespace) -> int:
    """Run the verb."""
    from kvmnest import found
    from kvmnest.found import record

    defects = found.load()
    unknown = set(options.ids) - {defect.id for defect in defects}
    if unknown:
        raise UsageError(f"no such defect: {sorted(unknown)[0]} (kvmnest found lists them)")
    chosen = [defect for defect in defects if not options.ids or defect.id in options.ids]
    if options.verify and options.build:
        raise UsageError("--verify builds for itself: no --build")
    if options.verify:
        return _verify(chosen, options)
    for name in ("as_it_is", "record", "kvm_modules", "kvm_param", "boot", "kernel"):
        if getattr(options, name) and not (options.build and name == "kernel"):
            raise UsageError(f"--{name.replace('_', '-')} is for kvmnest found --verify")
    if options.build:
        return _build(chosen, options)
    shown = record.load()
    if options.json:
        entries = [
            {
                **asdict(defect),
                "title": defect.reproducer.title,
                "script": str(defect.reproducer.path),
                "shown": {r: asdict(each) for r, each in shown.get(defect.id, {}).items()},
            }
            for defect in chosen
        ]
        print(json.dumps(entries, indent=1))
        return 0
    if options.ids:
        for defect in chosen:
            _tell(defect, shown.get(defect.id, {}), in_full=True)
        return 0
    minor = [defect for defect in defects if defect.weight]
    for defect in defects:
        if defect in minor[:1]:
            print("\nMinor: no software that keeps to the SDM is known to lose by these.\n")
        _tell(defect, shown.get(defect.id, {}), in_full=False)
    print(f"{len(defects)} defects, {len(minor)} of them minor; kvmnest found ID tells more of one")
    return 0


def _tell(defect: Defect, shown: Mapping[str, Shown], *, in_full: bool) -> None:
    from kvmnest.found.record import short

    print(f"{defect.id}: {defect.reproducer.title}")
    kernels: dict[str, list[str]] = {}
    for release, each in shown.items():
        kernels.setdefault(each.stock.verdict, []).append(short(release))
    for verdict, words in _WORDS.items():
        if verdict in kernels:
            _wrapped(f"{words} {', '.join(kernels[verdict])}")
    if not in_full:
        _wrapped(f"loss: {defect.loss}")
        return
    for name in ("weight", *_TEXTS):
        if getattr(defect, name):
            _wrapped(f"{name}: {getattr(defect, name)}")
    places = [(release, each) for release, each in shown.items() if each.line]
    for release, each in places[-1:]:
        _wrapped(f"source: {each.line} in {defect.function}(), {short(release)}")
        _wrapped(f"    {defect.line}")
        if each.alone:
            _wrapped(f"with the fix {short(release)} says {each.alone.verdict}")
    model = f" --cpu-model {defect.cpu_model}" if defect.cpu_model else ""
    print(f"    run: kvmnest repro {defect.id} --target lab --kernel newest{model}")
    print("    cases: " + " ".join(dict.fromkeys(map(_function, defect.cases))))


def _wrapped(text: str) -> None:
    print(textwrap.indent(textwrap.fill(text, 92, subsequent_indent="    "), "    "))


def _function(case: str) -> str:
    """The case without its parameters, which kvmnest run takes as it is."""
    return case.partition("[")[0].rstrip("*")


def _build(defects: Sequence[Defect], options: argparse.Namespace) -> int:
    from kvmnest.found.verify import fixed_modules
    from kvmnest.kernel.build import BuildError
    from kvmnest.kernel.edits import EditError
    from kvmnest.lab import kernels

    release = kernels.resolve(options.kernel).release
    try:
        modules = fixed_modules(defects, release)
    except (BuildError, EditError) as error:
        print(f"kvmnest: the fixes do not fit {release}: {error}", file=sys.stderr)
        return 1
    try:
        options.build.mkdir(parents=True, exist_ok=True)
        for name in ("kvm.ko", "kvm-intel.ko"):
            shutil.copyfile(modules / name, options.build / name)
    except OSError as error:
        raise HarnessError(f"cannot write to {options.build}: {error.strerror}") from error
    fixes = f"{len(defects)} fix{'' if len(defects) == 1 else 'es'}"
    print(f"{options.build}: kvm.ko and kvm-intel.ko for {release} with {fixes}")
    return 0


def _verify(defects: Sequence[Defect], options: argparse.Namespace) -> int:
    from kvmnest.found import record, verify
    from kvmnest.lab import kernels
    from kvmnest.repro.verify import Verifier

    if options.kvm_modules:
        raise UsageError("kvmnest found --verify builds the modules itself: no --kvm-modules")
    require_writable(options.record)
    kept = record.load(options.record) if options.record and options.record.exists() else {}
    release = kernels.resolve(options.kernel).release
    verifier = Verifier(options.kernel, release, emulator(options), parameters(options.kvm_param))
    entries, good = [], True
    if options.as_it_is:
        shown = verify.as_it_is(defects, verifier)
        found: Iterator[tuple[Defect, Shown]] = ((each, shown[each.id]) for each in defects)
    else:
        found = verify.verify(defects, verifier, lambda line: print(line, file=sys.stderr))
    try:
        for defect, each in found:
            good &= _is_good(each, as_it_is=options.as_it_is)
            entries.append({"id": defect.id, "kernel": release, **asdict(each)})
            if options.record:
                record.add(kept, defect.id, release, each)
                record.save(options.record, kept)
            if not options.json:
                _tell_shown(defect, each)
    finally:  # what was found before Ctrl-C or an error counts
        if options.json:
            print(json.dumps(entries, indent=1))
    return 0 if good else 1


def _is_good(shown: Shown, *, as_it_is: bool) -> bool:
    from kvmnest.found.record import NEEDED

    if as_it_is:
        return shown.stock.verdict == NEEDED[0]
    return shown.verdicts == NEEDED and bool(shown.line)


def _tell_shown(defect: Defect, shown: Shown) -> None:
    print(f"{defect.id}: {defect.reproducer.title}")
    for words, seen in (
        ("as it is", shown.stock),
        ("with all fixes", shown.together),
        ("with its fix alone", shown.alone),
    ):
        if seen:
            print(f"    {words}: {seen.verdict}: {seen.evidence}")
    if shown.alone:
        print(f"    at fault: {shown.line or 'not found in this source: ' + defect.line}")
    sys.stdout.flush()
