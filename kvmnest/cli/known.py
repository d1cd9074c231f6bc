"""``kvmnest known``: the known deviations, and whose they are."""

from __future__ import annotations

import argparse
import fnmatch
import json
import textwrap
from dataclasses import asdict
from pathlib import Path
from typing import Any

_NAMES = {"kvm": "KVM", "both": "BOTH", "none": "NONE"}


def add_parser(subparsers: Any) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "known",
        help="list the known deviations from the SDM, with the verdict of the reference CPU",
        description="List the entries of known.toml. A case that fails under KVM and passes on"
        " the reference CPU (kvmnest run --target reference) is KVM's; one that fails on both is"
        " ours or the emulator's; one that needs a host gets no verdict.",
        epilog="exit codes: 0 listed, 2 usage, 3 a file cannot be used, 4 no such entry",
    )
    parser.add_argument("pattern", nargs="?", default="*", metavar="PATTERN", help="of case ids")
    parser.add_argument("--verdict", choices=_NAMES, help="only those with this verdict")
    parser.add_argument(
        "--contradicted",
        action="store_true",
        help="only those that the reference CPU contradicts: it fails too, and the entry names"
        " KVM, or it passes, and the entry names the emulator",
    )
    parser.add_argument(
        "--results",
        type=Path,
        metavar="FILE",
        help="judge by the results of this run on the reference target, not by the record",
    )
    parser.add_argument(
        "--record", type=Path, metavar="FILE", help="make the record from the results of a run"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON document")


def run(options: argparse.Namespace) -> int:
    """Run the verb."""
    from kvmnest.reports import jsonfile, verdicts

    if options.record:
        count = verdicts.record(jsonfile.load(options.record))
        print(f"{verdicts.FILE}: {count} cases")
        return 0
    if options.results:
        outcomes = verdicts.of_results(jsonfile.load(options.results))
    else:
        outcomes = verdicts.recorded()
    found = [
        judged
        for judged in verdicts.judged(outcomes)
        if fnmatch.fnmatchcase(judged.deviation.case.replace("[", ""), _plain(options.pattern))
    ]
    if options.verdict:
        wanted = verdicts.Verdict[_NAMES[options.verdict]]
        found = [judged for judged in found if judged.verdict is wanted]
    if options.contradicted:
        found = [judged for judged in found if judged.contradicted]
    if options.json:
        print(json.dumps([_document(judged) for judged in found], indent=1))
    else:
        for judged in found:
            print("\n".join(_lines(judged)))
        print(_counted(found))
    return 0 if found else 4


def _plain(pattern: str) -> str:
    return f"*{pattern.replace('[', '').strip('*')}*"


def _lines(judged: Any) -> list[str]:
    deviation = judged.deviation
    conditions = [] if deviation.kernels == "any" else [f"kernels {deviation.kernels}"]
    conditions += [f"target {deviation.target}"] if deviation.target != "any" else []
    conditions += [deviation.emulator] if deviation.emulator else []
    conditions += [f"CPU without {deviation.cpu_lacks}"] if deviation.cpu_lacks else []
    conditions += [f"CPU with {deviation.cpu_has}"] if deviation.cpu_has else []
    conditions += [f"{name}={value}" for name, value in deviation.params.items()]
    lines = [deviation.case + (f"  ({', '.join(conditions)})" if conditions else "")]
    lines.append(
        textwrap.fill(deviation.text, 100, initial_indent="    ", subsequent_indent="    ")
    )
    verdict = "; ".join(
        each.value + (f" ({number} cases)" if number > 1 else "")
        for each, number in judged.counts.items()
    )
    why = ", ".join(dict.fromkeys((*judged.there, *judged.why)))
    text = (verdict or "no verdict: no such case") + (f": {why}" if why else "")
    lines.append(textwrap.fill(text, 100, initial_indent="  > ", subsequent_indent="    "))
    return lines


def _counted(found: list[Any]) -> str:
    verdicts = [judged.verdict.value if judged.verdict else "differs by case" for judged in found]
    counts = {text: verdicts.count(text) for text in dict.fromkeys(verdicts)}
    shown = "; ".join(f"{number} {text}" for text, number in counts.items())
    return f"{len(found)} entries" + (f": {shown}" if shown else "")


def _document(judged: Any) -> dict[str, Any]:
    return {
        **asdict(judged.deviation),
        "verdict": judged.verdict.name.lower() if judged.verdict else "differs",
        "cases": {verdict.name.lower(): number for verdict, number in judged.counts.items()},
        "contradicted": judged.contradicted,
        "no_verdict": list(judged.why),
        "there": list(judged.there),
    }
