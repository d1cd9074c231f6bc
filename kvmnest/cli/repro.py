"""``kvmnest repro``: does this kernel have that bug?"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvmnest import reading
from kvmnest.cli.lab import add_options, emulator, parameters, target
from kvmnest.errors import UsageError
from kvmnest.files import require_writable

if TYPE_CHECKING:
    from kvmnest.repro.check import Verdict
    from kvmnest.repro.corpus import Reproducer
    from kvmnest.repro.evidence import Shown
    from kvmnest.repro.ladder import Ladder

_USAGE = """kvmnest repro [options] ID... (ids, CVE numbers, files of yours, all, or unfixed)
       kvmnest repro [options] ID... --kernels SPEC... [--html FILE] [--record FILE]
       kvmnest repro list [--json]
       kvmnest repro show ID
       kvmnest repro new ID
       kvmnest repro verify [options] ID..."""


def add_parser(subparsers: Any) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "repro",
        help="say whether a kernel has a known bug of nested VMX",
        usage=_USAGE,
        description="Run reproducers of real bugs. list: all there are, and what was seen on a"
        " fixed kernel and on one with the bug. show: the script of one. new: write a script to"
        " start from. verify: run reproducers on a kernel as it is and on the same one with the"
        " bug put back (or mended, if nobody has fixed it), in the lab. all: those that were fixed"
        " upstream; unfixed: those that were not. With all or unfixed the answer is a table,"
        " VULNERABLE first, with the versions that have the fix; --kernels asks several kernels"
        " in the lab and prints bugs by kernels.",
        epilog="exit codes: 0 FIXED (verify: shown both ways), 1 VULNERABLE (any of them; verify:"
        " not shown both ways), 2 usage, 3 harness or environment error, 4 NOT APPLICABLE,"
        " 130 interrupted",
    )
    parser.add_argument("words", nargs="+", metavar="ID", help="see above")
    parser.add_argument("--target", choices=("auto", "kvm", "lab"), default="auto")
    parser.add_argument("--json", action="store_true", help="print a JSON document")
    parser.add_argument(
        "--kernels", nargs="+", metavar="SPEC", help="ask each of these kernels, in the lab"
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="--kernels: write a page")
    parser.add_argument(
        "--record",
        type=Path,
        metavar="FILE",
        help="verify: add what was shown to FILE; --kernels: add the verdicts to FILE",
    )
    add_options(parser)


def run(options: argparse.Namespace) -> int:
    """Run the verb."""
    from kvmnest.repro import corpus

    verb, *names = options.words
    asking = verb not in ("list", "show", "new", "verify")
    if options.record and verb != "verify" and not (asking and options.kernels):
        raise UsageError("--record is for kvmnest repro verify, and for --kernels")
    if options.html and not options.kernels:
        raise UsageError("--html is for --kernels")
    if options.kernels and not asking:
        raise UsageError(f"kvmnest repro {verb} takes no --kernels")
    if verb == "list":
        if names:
            raise UsageError("kvmnest repro list takes no id; kvmnest repro show ID shows one")
        _list(corpus.load(), as_json=options.json)
        return 0
    if asking and options.kernels:
        return _climb(corpus.select(options.words), options)
    if asking:
        return _check(corpus.select(options.words), options)
    if not names:
        raise UsageError(f"say which: kvmnest repro {verb} ID")
    if verb == "verify":
        return _verify(corpus.select(names), options)
    for name in names:
        if verb == "new":
            _new(name)
        else:
            _show(name)
    return 0


def _check(reproducers: list[Reproducer], options: argparse.Namespace) -> int:
    from kvmnest.repro import check, evidence, ladder, table

    verdicts = []
    as_table = not options.json and bool({"all", "unfixed"} & set(options.words))
    try:
        for verdict in check.check(
            reproducers, lambda params: target(options, params), evidence.load()
        ):
            verdicts.append(verdict)
            if as_table:
                print(f"{verdict.reproducer.id}: {verdict.verdict}", file=sys.stderr)
            elif not options.json:
                _tell(verdict)
    finally:  # what was found before Ctrl-C or an error counts
        if options.json:
            print(json.dumps(check.document(verdicts), indent=1))
        elif as_table:
            for line in table.lines(verdicts, ladder.load()):
                print(line)
    return check.exit_code(verdicts)


def _climb(reproducers: list[Reproducer], options: argparse.Namespace) -> int:
    """Ask several kernels."""
    import copy
    import functools

    from kvmnest.files import require_writable, write_text
    from kvmnest.lab import kernels
    from kvmnest.repro import check, ladder, page, table

    if options.kernel or options.kvm_modules:
        raise UsageError("--kernels names the kernels: no --kernel and no --kvm-modules")
    if options.target == "kvm":
        raise UsageError("--kernels boots kernels in the lab: no --target kvm")
    own = [each.path for each in reproducers if not each.shipped]
    if options.record and own:
        raise UsageError(f"--record is for kvmnest's own reproducers, not for {own[0]}")
    require_writable(options.html, options.record)
    found, every = ladder.Ladder(), []
    try:
        for spec in options.kernels:
            release = kernels.resolve(spec).release
            here = copy.copy(options)
            here.kernel, here.target = spec, "lab"
            verdicts = []
            for verdict in check.check(reproducers, functools.partial(target, here)):
                verdicts.append(verdict)
                print(f"{release}: {verdict.reproducer.id}: {verdict.verdict}", file=sys.stderr)
            found.add(verdicts, release)
            every += verdicts
    finally:  # what was found before Ctrl-C or an error counts
        if options.json:
            print(json.dumps({"verdicts": found.verdicts}, indent=1))
        else:
            for line in table.grid(reproducers, found):
                print(line)
        if options.html:
            write_text(options.html, page.page(reproducers, found))
        if options.record:
            before = ladder.load(options.record) if options.record.exists() else ladder.Ladder()
            ladder.save(options.record, ladder.merge(before, found))
    return check.exit_code(every)


def _tell(verdict: Verdict) -> None:
    bug, each = verdict.reproducer.bug, verdict.reproducer
    print(f"{verdict.verdict:14} {each.id}: {each.title} ({verdict.kernel})")
    print(f"{'':14} {verdict.evidence}")
    print(f"{'':14} upstream: {_upstream(each)}{f', fixed in {bug.fixed}' if bug.fixed else ''}")
    sys.stdout.flush()


def _upstream(each: Reproducer) -> str:
    bug = each.bug
    if not bug.subject:
        return f"not fixed (kvmnest found {each.id})" if each.shipped else "not fixed"
    commit = f'{bug.hash} ("{bug.subject}")' if bug.hash else f'"{bug.subject}"'
    return f"{commit}{f', {bug.cve}' if bug.cve else ''}"


def _list(reproducers: tuple[Reproducer, ...], *, as_json: bool) -> None:
    from kvmnest.repro import corpus, evidence, ladder

    record, asked = evidence.load(), ladder.load()
    if as_json:
        print(json.dumps([_entry(each, record.get(each.id, ())) for each in reproducers], indent=1))
        return
    for each in reproducers:
        shown = record.get(each.id, [])
        print(f"{each.id}: {each.title}")
        print(f"    {_upstream(each)}")
        fixed = each.bug.fixed or "unknown"
        print(f"    since {_since(each, asked)}, fixed in {fixed}{_needs(each)}")
        for seen in shown:
            for kernel, what in (
                (seen.kernel, seen.stock),
                (f"{seen.kernel} with the bug put back", seen.put_back),
            ):
                print(f"    {kernel}: {what.verdict}: {what.evidence}")
        bad, good = asked.seen(each.id)
        if bad:
            print(f"    VULNERABLE as Debian built it: {', '.join(bad)}")
        if bad and good:
            print(f"    FIXED as Debian built it: {', '.join(good)}")
        if not shown and not (bad and good):
            print("    not shown yet: kvmnest repro verify", each.id)
    by_edit = sum(any(seen.both_ways for seen in record.get(each.id, ())) for each in reproducers)
    by_kernels = sum(all(asked.seen(each.id)) for each in reproducers)
    known = sum(bool(each.bug.since) for each in reproducers)
    print(f"{len(reproducers)} bugs, of {known} it is known since when")
    print(f"{by_edit} shown both ways with the bug put back (kvmnest repro verify)")
    print(f"{by_kernels} shown both ways by kernels of Debian (kvmnest repro all --kernels)")
    print(f"{len(corpus.load(corpus.UNFIXED))} more are not fixed upstream (kvmnest found)")


def _since(each: Reproducer, asked: Ladder) -> str:
    """Since when a bug is there, and how that is known."""
    if each.bug.since:
        return f"{each.bug.since} (by {each.bug.since_by})"
    seen = asked.since(each.id)
    return f"{seen} (by kernels of Debian)" if seen else "unknown"


def _needs(each: Reproducer) -> str:
    wanted = [*each.needs, *(f"{name}={value}" for name, value in each.params.items())]
    return f", needs {', '.join(wanted)}" if wanted else ""


def _entry(each: Reproducer, shown: Sequence[Shown]) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "id": each.id,
        "title": each.title,
        **asdict(each.bug),
        "needs": list(each.needs),
        "script": str(each.path),
        "shown": [asdict(seen) for seen in shown],
    }


def _show(name: str) -> None:
    """Print scripts; a file of the user is not executed for that."""
    from kvmnest.repro import corpus

    files = [Path(name)] if corpus.is_file(name) else [e.path for e in corpus.select([name])]
    for path in files:
        print(f"# {path}\n{reading.text(path)}", end="")


def _new(bug_id: str) -> None:
    from kvmnest.repro import new

    path = new.write(bug_id, Path())
    print(f"{path}: change it, then")
    print(f"  kvmnest repro ./{path}           does this kernel have the bug?")
    print(f"  kvmnest repro verify ./{path}    is it shown both ways?")


def _verify(reproducers: list[Reproducer], options: argparse.Namespace) -> int:
    from dataclasses import asdict

    from kvmnest.lab import kernels
    from kvmnest.repro import evidence
    from kvmnest.repro.verify import Verifier, verify

    if options.target == "kvm":
        raise UsageError("kvmnest repro verify runs in the lab: the host's kernel stays as it is")
    if options.kvm_modules:
        raise UsageError("kvmnest repro verify builds the modules itself: no --kvm-modules")
    own = [each.path for each in reproducers if not each.shipped]
    if options.record and own:
        raise UsageError(f"--record is for kvmnest's own reproducers, not for {own[0]}")
    unfixed = [each.id for each in reproducers if each.fix]
    if options.record and unfixed:
        raise UsageError(f"{unfixed[0]} is recorded by kvmnest found --verify --record")
    require_writable(options.record)
    record = evidence.start(options.record) if options.record else {}
    release = kernels.resolve(options.kernel).release
    verifier = Verifier(options.kernel, release, emulator(options), parameters(options.kvm_param))
    entries = []
    try:
        for each, seen in verify(reproducers, verifier, lambda line: print(line, file=sys.stderr)):
            entries.append({"id": each.id, "both_ways": seen.both_ways, **asdict(seen)})
            if options.record:
                evidence.add(record, each.id, seen)
                evidence.save(options.record, record)
            if not options.json:
                _tell_shown(each, seen)
    finally:
        if options.json:
            print(json.dumps(entries, indent=1))
    return 0 if all(entry["both_ways"] for entry in entries) else 1


def _tell_shown(each: Reproducer, seen: Shown) -> None:
    print(f"{'BOTH WAYS' if seen.both_ways else 'NOT SHOWN'}  {each.id}: {each.title}")
    print(f"           {seen.kernel}: {seen.stock.verdict}: {seen.stock.evidence}")
    change = "with its fix" if seen.mended else "bug put back"
    print(f"           {change}: {seen.put_back.verdict}: {seen.put_back.evidence}")
    sys.stdout.flush()
