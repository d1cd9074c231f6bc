"""``kvmnest fuzz programs``: sequences of VMX instructions on KVM and on other machines."""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvmnest import reading
from kvmnest.cli import fuzz_common
from kvmnest.cli.lab import emulator, parameters, use_host
from kvmnest.errors import HarnessError, UsageError
from kvmnest.files import write_json, write_text

if TYPE_CHECKING:
    from kvmnest.coverage.collect import Collector
    from kvmnest.coverage.guide import Guide
    from kvmnest.fuzz.programs.campaign import Campaign, Finding, Report
    from kvmnest.fuzz.programs.generate import ProgramGenerator
    from kvmnest.fuzz.programs.journal import Journal
    from kvmnest.fuzz.programs.places import Place
    from kvmnest.fuzz.programs.program import Program

REFERENCE, MOVED, QUIET = "reference", "moved", "quiet"
#: Number of the first program of the corpus, behind those that are drawn.
_FIRST_OF_CORPUS = 1 << 32


def add_machines(parser: argparse.ArgumentParser) -> None:
    """The option that names the machines to compare with."""
    parser.add_argument(
        "--against",
        dest="machines",
        action="append",
        metavar="MACHINE",
        help="compare KVM with this one (repeatable): reference, the reference CPU (default);"
        " moved, KVM whose VM is saved and restored into a new one before each step; quiet, KVM"
        " whose host does nothing between steps; NAME=VALUE, the lab's KVM with a module parameter,"
        " as ept=0; RELEASE, another kernel in the lab",
    )


def add_options(parser: argparse.ArgumentParser) -> None:
    """Other options that only programs have."""
    parser.set_defaults(machines=None)
    group = parser.add_argument_group("programs")
    group.add_argument(
        "--corpus",
        type=Path,
        metavar="DIR",
        help="run the programs of a folder first, and put what is found into it",
    )
    group.add_argument(
        "--guided",
        action="store_true",
        help="build KVM so that it tells which lines run, in the lab; put programs that reach new"
        " ones into --corpus, and make half of the others of those",
    )
    group.add_argument(
        "--minimize",
        action="store_true",
        help="with --guided: remove programs from --corpus whose lines others reach, and stop",
    )


def run(options: argparse.Namespace, seed: int, collector: Collector | None = None) -> int:
    """Run the verb; ``collector`` takes the coverage, and the lab has its modules then."""
    from kvmnest.coverage.guide import Guide
    from kvmnest.fuzz.judge import Judge
    from kvmnest.fuzz.model import capabilities
    from kvmnest.fuzz.programs import known
    from kvmnest.fuzz.programs.campaign import Campaign, Oracle
    from kvmnest.fuzz.programs.generate import ProgramGenerator
    from kvmnest.fuzz.programs.places import Place, common

    if options.corpus and not options.corpus.is_dir():
        raise UsageError(f"{reading.shown(options.corpus)} is not a folder of programs")
    if options.jobs:
        raise UsageError("--jobs is for entries only: programs run in one lab")
    if options.minimize and not options.guided:
        raise UsageError("--minimize needs --guided, which tells what programs reach")
    if options.guided:
        collector = _collector(options, collector)
    guide = Guide(collector, seed) if collector else None
    wanted = [*dict.fromkeys(options.machines or [REFERENCE])]
    _check_machines(options, wanted)
    journal = _journal(options, seed, wanted)
    machine: Any = fuzz_common.machine(options)  # it does other tasks than entries, too
    kvm = Place(machine.name, machine, journal=journal.steps)
    others = {name: _other(options, name, machine, journal) for name in wanted}
    assumed = functools.reduce(common, (each.ask() for each in others.values()), kvm.ask())
    kernel = str(assumed["kernel"])
    oracles = [Oracle(name, place, known.load(kernel, name)) for name, place in others.items()]
    try:
        machines = [capabilities(each.facts) for each in (kvm, *others.values())]
        judge, host = Judge(assumed, kvm.name), REFERENCE not in wanted
        generator = ProgramGenerator(judge, host=host, others=machines)
    except ValueError as error:
        raise HarnessError(f"{kvm.name}: {error}") from error
    against = ", ".join(place.name for place in others.values())
    print(f"seed {seed}, {kvm.name} ({kernel}) against {against}, journal {journal.path}")
    sys.stdout.flush()
    watching: dict[str, Any] = {"watch": guide.take} if guide else {}
    if options.minimize and guide:
        return _minimize(options, Campaign(kvm, [], assumed, **watching), guide)
    if options.guided and guide:
        watching["on_program"] = functools.partial(_keep, options, guide)
    tell = functools.partial(_tell_batch, guide)
    campaign = Campaign(kvm, oracles, assumed, tell, journal.add, **watching)
    programs = _programs(options, generator, seed)
    left = ((number, program) for number, program in programs if number not in journal.done)
    try:
        report = campaign.run(left, options.seconds)
    except BaseException:
        # What was found must not be lost with the rest.
        for finding in campaign.report.findings.values():
            print(f"program {finding.number} ({finding.count} like it): {finding.verdict}")
        raise
    _print(report)
    findings = [_told(options, campaign, finding) for finding in report.findings.values()]
    _write(options, report, findings, f"--seed {seed} on {kernel} against {against}")
    return 1 if findings else 0


def _check_machines(options: argparse.Namespace, wanted: Sequence[str]) -> None:
    """Raise UsageError for a machine that only the lab can be, where KVM is this machine's."""
    labs = [name for name in wanted if name not in (REFERENCE, MOVED, QUIET)]
    if labs and (options.target == "kvm" or use_host(options)):
        raise UsageError(f"--against {labs[0]}: other kernels and parameters are for the lab")


def _journal(options: argparse.Namespace, seed: int, against: list[str]) -> Journal:
    """The run's journal; what it knows of an earlier part is told."""
    from kvmnest.fuzz.programs.campaign import Verdict
    from kvmnest.fuzz.programs.journal import Journal

    chosen = {"programs": seed, "against": ", ".join(against), "target": options.target}
    chosen |= {"kernel": options.kernel, "kvm_modules": options.kvm_modules}
    chosen |= {"kvm_params": options.kvm_param, "corpus": str(options.corpus or "")}
    if options.guided:
        chosen["guided"] = True
    path = fuzz_common.journal_path(options, chosen)
    journal = Journal(path, chosen, go_on=options.go_on)
    if journal.crashed:
        number, what = journal.crashed
        journal.add(number, Verdict(crashed=what))
    for number, line in journal.done.items():
        if "shows" in line:
            print(f"program {number}, before: {line['shows']}")
    return journal


def _other(options: argparse.Namespace, name: str, machine: Any, journal: Journal) -> Place:
    """The machine that ``--against`` names."""
    from kvmnest.fuzz.machines import LabMachine
    from kvmnest.fuzz.programs.places import Place, reference

    if name in (MOVED, QUIET):
        moved = name == MOVED
        called = f"{machine.name}, {name}"
        return Place(called, machine, moved=moved, quiet=not moved, journal=journal.steps)
    if name == REFERENCE:
        return reference(options.bochs, options.cpu_model)
    params = {**(parameters(options.kvm_param) or {})}
    kernel = options.kernel
    if "=" in name:
        params |= parameters([name]) or {}
    else:
        kernel = name
        if options.kvm_modules:
            raise UsageError(f"--against {name}: --kvm-modules are of one kernel")
    lab = LabMachine(kernel, params, options.kvm_modules, emulator(options))
    return Place(f"{lab.name} with {name}", lab)


def _programs(
    options: argparse.Namespace, generator: ProgramGenerator, seed: int
) -> Iterator[tuple[int, Program]]:
    if options.corpus:
        from kvmnest.fuzz.programs import corpus

        yield from enumerate(corpus.load(options.corpus), _FIRST_OF_CORPUS)
        if options.cases is None and options.seconds is None:
            return
    from kvmnest.fuzz.programs import corpus, guided
    from kvmnest.fuzz.programs.campaign import Campaign

    count = options.cases or (None if options.seconds else 1000)

    def kept() -> Sequence[Program]:
        return [*corpus.load(options.corpus)] if options.guided else ()

    drawn = guided.programs(generator, seed, kept, Campaign.batch)
    yield from itertools.islice(drawn, count)


def _collector(options: argparse.Namespace, collector: Collector | None) -> Collector:
    """That of ``kvmnest coverage fuzz``, or a new one, whose modules the lab takes."""
    from kvmnest.cli.coverage_modules import collector_for

    if not options.corpus:
        raise UsageError("--guided needs --corpus DIR, where programs are kept")
    if options.target == "kvm":
        raise UsageError("--guided builds KVM's modules, which is for the lab")
    return collector or collector_for(options)


def _keep(options: argparse.Namespace, guide: Guide, number: int, program: Program) -> None:
    """Put a program that reached new blocks into the corpus."""
    from kvmnest.fuzz.programs import corpus

    new = guide.new.get(number, 0)
    if new and number < _FIRST_OF_CORPUS:
        corpus.save(options.corpus, program, f"{corpus.REACHES}{new} blocks first")


def _minimize(options: argparse.Namespace, campaign: Campaign, guide: Guide) -> int:
    from kvmnest.fuzz.programs import corpus

    def reached(programs: Sequence[Program]) -> list[int]:
        campaign.run(enumerate(programs))
        return [guide.new.get(number, 0) for number in range(len(programs))]

    left, before = corpus.smaller(options.corpus, reached)
    print(f"{left} of {before} programs are left; {guide.told()}")
    return 0


def _tell_batch(guide: Guide | None, report: Report) -> None:
    kinds = report.kinds
    told = guide.told() if guide else ""
    print(
        f"{report.programs} programs: {kinds['agree']} agree, {kinds['known']} known,"
        f" {kinds['disagree']} disagree, {kinds['crashed']} crashed" + f"; {told}" * bool(told),
        flush=True,
    )


def _print(report: Report) -> None:
    for name, each in report.by.items():
        said = ", ".join(f"{count} {kind}" for kind, count in each.most_common())
        print(f"against {name}: {said}")
    ends = ", ".join(f"{count} {name}" for name, count in report.ends.most_common(12))
    print(f"ends: {ends}")
    for reason, count in report.known.most_common():
        print(f"known, {count}: {reason}")


def _told(options: argparse.Namespace, campaign: Campaign, finding: Finding) -> Finding:
    """Say what a finding is, shrunk if that is wanted."""
    verdict = finding.verdict
    print(f"program {finding.number} ({finding.count} like it): {verdict}", flush=True)
    if options.no_shrink or verdict.crashed:
        return finding
    from dataclasses import replace

    from kvmnest.fuzz.programs.shrink import shrink

    signature = verdict.signature

    def shows(programs: Sequence[Program]) -> list[bool]:
        return [
            any(each.signature == signature for each in verdicts)
            for verdicts in campaign.verdicts(programs)
        ]

    # What comes behind the difference has no part in it.
    steps = finding.program.steps[: verdict.new.step + 1] if verdict.new else ()
    small = shrink(replace(finding.program, steps=steps), shows)
    if small is None:
        print(f"program {finding.number} does not show it again")
        return finding
    (verdicts,) = campaign.verdicts([small])
    again = next((each for each in verdicts if each.signature == signature), verdict)
    for step in small.steps:
        print(f"    {_step(step)}")
    print(f"  {again.new}", flush=True)
    return replace(finding, program=small, verdict=again)


def _step(step: Mapping[str, Any]) -> str:
    rest = " ".join(f"{name}={_short(value)}" for name, value in step.items() if name != "do")
    return f"{step['do']} {rest}"


def _short(value: Any) -> str:
    if isinstance(value, int):
        return hex(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {_short(each)}" for name, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_short, value)) + "]"
    return str(value)


def _write(
    options: argparse.Namespace, report: Report, findings: list[Finding], where: str
) -> None:
    if options.json:
        report.findings = {f"{f.number}: {f.verdict.signature}": f for f in findings}
        write_json(options.json, report.document())
    for finding in findings if options.corpus else ():
        from kvmnest.fuzz.programs import corpus

        said = str(finding.verdict)
        print(f"program: {corpus.save(options.corpus, finding.program, said)}")
    if options.tests:
        from kvmnest.fuzz.programs import testfile

        for finding in findings:
            if finding.verdict.new is None:
                continue
            path = options.tests / f"test_program_{finding.number}.py"
            write_text(path, testfile.write(finding, where))
            print(f"test: {path}")
