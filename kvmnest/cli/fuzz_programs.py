"""``kvmnest fuzz programs``: sequences of VMX instructions on KVM and on the reference CPU."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvmnest import reading
from kvmnest.cli import fuzz_common
from kvmnest.errors import HarnessError, UsageError
from kvmnest.files import write_json, write_text

if TYPE_CHECKING:
    from kvmnest.fuzz.programs.campaign import Campaign, Finding, Report
    from kvmnest.fuzz.programs.generate import ProgramGenerator
    from kvmnest.fuzz.programs.journal import Journal
    from kvmnest.fuzz.programs.places import Place
    from kvmnest.fuzz.programs.program import Program

REFERENCE, MOVED = "reference", "moved"
#: Number of the first program of the corpus, behind those that are drawn.
_FIRST_OF_CORPUS = 1 << 32


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options that only programs have."""
    group = parser.add_argument_group("programs")
    group.add_argument(
        "--against",
        choices=(REFERENCE, MOVED),
        help="compare KVM with the reference CPU (default), or with KVM whose VM is saved and"
        " restored into a new one before each step",
    )
    group.add_argument(
        "--corpus",
        type=Path,
        metavar="DIR",
        help="run the programs of a folder first, and put what is found into it",
    )


def run(options: argparse.Namespace, seed: int) -> int:
    """Run the verb."""
    from kvmnest.fuzz.judge import Judge
    from kvmnest.fuzz.programs import known
    from kvmnest.fuzz.programs.campaign import Campaign
    from kvmnest.fuzz.programs.generate import ProgramGenerator

    if options.corpus and not options.corpus.is_dir():
        raise UsageError(f"{reading.shown(options.corpus)} is not a folder of programs")
    if options.jobs:
        raise UsageError("--jobs is for entries only: programs run in one lab")
    against = options.against or REFERENCE
    journal = _journal(options, seed, against)
    kvm, other = _places(options, against, journal)
    assumed = _assumed(kvm, other)
    entries = known.load(str(assumed["kernel"]), against)
    try:
        generator = ProgramGenerator(Judge(assumed, kvm.name))
    except ValueError as error:
        raise HarnessError(f"{kvm.name}: {error}") from error
    said = f"seed {seed}, {kvm.name} ({assumed['kernel']}) against {other.name}"
    print(f"{said}, journal {journal.path}", flush=True)
    campaign = Campaign(kvm, other, assumed, entries, _tell_batch, journal.add)
    programs = _programs(options, generator, seed)
    left = ((number, program) for number, program in programs if number not in journal.done)
    report = campaign.run(left, options.seconds)
    _print(report)
    findings = [_told(options, campaign, finding) for finding in report.findings.values()]
    _write(options, report, findings, f"--seed {seed} on {assumed['kernel']} against {other.name}")
    return 1 if findings else 0


def _journal(options: argparse.Namespace, seed: int, against: str) -> Journal:
    """The run's journal; what it knows of an earlier part is told."""
    from kvmnest.fuzz.programs.campaign import Verdict
    from kvmnest.fuzz.programs.journal import Journal

    chosen = {"programs": seed, "against": against, "target": options.target}
    chosen |= {"kernel": options.kernel, "kvm_modules": options.kvm_modules}
    chosen |= {"kvm_params": options.kvm_param, "corpus": str(options.corpus or "")}
    path = fuzz_common.journal_path(options, chosen)
    journal = Journal(path, chosen, go_on=options.go_on)
    if journal.crashed:
        number, what = journal.crashed
        journal.add(number, Verdict(crashed=what))
    for number, line in journal.done.items():
        if "shows" in line:
            print(f"program {number}, before: {line['shows']}")
    return journal


def _places(options: argparse.Namespace, against: str, journal: Journal) -> tuple[Place, Place]:
    from kvmnest.fuzz.machines import LocalMachine
    from kvmnest.fuzz.programs.places import Place
    from kvmnest.reference.emulator import find

    machine: Any = fuzz_common.machine(options)  # both do other tasks than entries, too
    kvm = Place(machine.name, machine, journal=journal.steps)
    if against == MOVED:
        name = f"{machine.name}, moved"
        return kvm, Place(name, machine, moved=True, journal=journal.steps)
    cpu = find(getattr(options, "bochs", None), getattr(options, "cpu_model", None))
    named = {"bochs": str(cpu.path), "model": cpu.model.name}
    return kvm, Place("the reference CPU", LocalMachine(), named)


def _assumed(kvm: Place, other: Place) -> Mapping[str, Any]:
    from kvmnest.fuzz.programs.places import common

    return common(kvm.ask(), other.ask())


def _programs(
    options: argparse.Namespace, generator: ProgramGenerator, seed: int
) -> Iterator[tuple[int, Program]]:
    if options.corpus:
        from kvmnest.fuzz.programs import corpus

        yield from enumerate(corpus.load(options.corpus), _FIRST_OF_CORPUS)
        if options.cases is None:
            return
    count = options.cases or (None if options.seconds else 1000)
    number = 0
    while count is None or number < count:
        yield number, generator.numbered(seed, number)
        number += 1


def _tell_batch(report: Report) -> None:
    kinds = report.kinds
    print(
        f"{report.programs} programs: {kinds['agree']} agree, {kinds['known']} known,"
        f" {kinds['disagree']} disagree, {kinds['crashed']} crashed",
        flush=True,
    )


def _print(report: Report) -> None:
    ends = ", ".join(f"{count} {name}" for name, count in report.ends.most_common(12))
    print(f"ends: {ends}")
    for reason, count in report.known.most_common():
        print(f"known, {count}: {reason}")


def _told(options: argparse.Namespace, campaign: Campaign, finding: Finding) -> Finding:
    """Say what a finding is, shrunk if that is wanted."""
    verdict = finding.verdict
    said = verdict.new or verdict.crashed
    print(f"program {finding.number} ({finding.count} like it): {said}", flush=True)
    if options.no_shrink or verdict.crashed:
        return finding
    from dataclasses import replace

    from kvmnest.fuzz.programs.shrink import shrink

    signature = verdict.signature

    def shows(programs: Sequence[Program]) -> list[bool]:
        return [each.signature == signature for each in campaign.verdicts(programs)]

    # What comes behind the difference has no part in it.
    steps = finding.program.steps[: verdict.new.step + 1] if verdict.new else ()
    small = shrink(replace(finding.program, steps=steps), shows)
    if small is None:
        print(f"program {finding.number} does not show it again")
        return finding
    (again,) = campaign.verdicts([small])
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

        said = str(finding.verdict.new or finding.verdict.crashed)
        print(f"program: {corpus.save(options.corpus, finding.program, said)}")
    if options.tests:
        from kvmnest.fuzz.programs import testfile

        for finding in findings:
            if finding.verdict.new is None:
                continue
            path = options.tests / f"test_program_{finding.number}.py"
            write_text(path, testfile.write(finding, where))
            print(f"test: {path}")
