"""Does this kernel have that bug? Runs reproducers and judges what they show."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvmnest.errors import HarnessError
from kvmnest.known import same_parameter
from kvmnest.repro.corpus import Bug
from kvmnest.results.model import Case, Run
from kvmnest.results.progress import Progress
from kvmnest.results.reporter import CRASHED, Reporter
from kvmnest.results.runner import Plan, pytest_arguments, run_cases, split_selection
from kvmnest.results.targets import Target

VULNERABLE, FIXED, NOT_APPLICABLE = "VULNERABLE", "FIXED", "NOT APPLICABLE"

#: Gives a target for kernel parameters.
MakeTarget = Callable[[Mapping[str, str]], Target]


@dataclass(frozen=True)
class Verdict:
    """What a kernel showed: ``verdict`` is one of the three, ``evidence`` one or more lines."""

    bug: Bug
    verdict: str
    kernel: str
    evidence: str

    @property
    def exit_code(self) -> int:
        """1 VULNERABLE, 0 FIXED, 4 NOT APPLICABLE."""
        return {VULNERABLE: 1, FIXED: 0, NOT_APPLICABLE: 4}[self.verdict]


def check(
    bugs: Sequence[Bug], make_target: MakeTarget, corpus: Sequence[Bug] = ()
) -> list[Verdict]:
    """Run the reproducers of bugs, those with the same parameters together.

    ``corpus`` holds all bugs, of which some share a case and differ in what they show. Raises
    UsageError, HarnessError or what the target raises if they cannot be run at all.
    """
    groups: dict[tuple[tuple[str, str], ...], list[Bug]] = {}
    for bug in bugs:
        groups.setdefault(tuple(sorted(bug.params.items())), []).append(bug)
    found: dict[str, Verdict] = {}
    for params, group in groups.items():
        target = make_target(dict(params))
        run = _run(target, list(dict.fromkeys(bug.case for bug in group)))
        cases = {case.id: case for case in run.cases}
        for bug in group:
            found[bug.id] = judge(bug, cases.get(bug.case), run, corpus)
    return [found[bug.id] for bug in bugs]


_NUMBER = re.compile(r"0x[0-9a-f]{5,}|\b\d{4,}\b|\[ *\d+\.\d+\]")


def symptom(text: str) -> str:
    """What a failure shows, without addresses and times, which differ between kernels."""
    return _NUMBER.sub("#", text.partition("\n")[0]).strip()


def judge(bug: Bug, case: Case | None, run: Run, corpus: Sequence[Bug] = ()) -> Verdict:
    """A case that fails, or in which the kernel dies, shows the bug; one that passes, the fix.

    A failure that looks like that of another bug with the same case is not this bug's; one that
    looks like none is taken for it, and said to be different from the recorded one.

    Raises HarnessError if the case did not run, or broke for a reason that is not the kernel's.
    """
    if case is None:
        problem = run.problems[0] if run.problems else "it did not run"
        raise HarnessError(f"{bug.id}: {problem}")
    text = case.summary or case.detail.partition("\n")[0]
    crashed = case.summary.startswith(CRASHED)
    if case.outcome == "error" and not crashed:
        raise HarnessError(f"{bug.id}: {text}")
    wrong = _other_parameters(bug, run)
    if wrong:
        return Verdict(bug, NOT_APPLICABLE, run.kernel, wrong)
    if case.outcome in ("failed", "error"):
        seen = symptom(text)
        alike = [other.id for other in corpus if _shows(other, bug.case, seen)]
        if bug.id not in alike and alike:
            same = f"fails as with {', '.join(alike)}: {text}"
            return Verdict(bug, NOT_APPLICABLE, run.kernel, same)
        if corpus and bug.id not in alike:
            text += f" (recorded for this bug: {bug.vulnerable})"
        elif len(alike) > 1:
            others = ", ".join(name for name in alike if name != bug.id)
            text += f" (as with {others})"
        return Verdict(bug, VULNERABLE, run.kernel, text)
    if case.outcome == "passed":
        return Verdict(bug, FIXED, run.kernel, f"{case.id} passes")
    return Verdict(bug, NOT_APPLICABLE, run.kernel, text)


def _shows(bug: Bug, case: str, seen: str) -> bool:
    return bug.case == case and symptom(bug.vulnerable) == seen


def _other_parameters(bug: Bug, run: Run) -> str:
    """Why a machine whose modules were loaded otherwise cannot show the bug, "" if it can."""
    have = run.facts.get("kvm_params", {})
    wrong = [
        f"{name}={value} (it is {have[name]})"
        for name, value in bug.params.items()
        if name in have and not same_parameter(have[name], value)
    ]
    return f"needs kvm_intel with {', '.join(wrong)}" if wrong else ""


class _Quiet(Reporter):
    def __init__(self, target: Target) -> None:
        progress = Progress(io.StringIO(), quiet=True)
        super().__init__(Run(target.name), progress, own_clock=target.guest_clock)


def _run(target: Target, cases: list[str]) -> Run:
    modules, _ = split_selection(cases)
    reporter = _Quiet(target)
    run_cases(target, pytest_arguments(Plan(), target.name, modules, []), reporter)
    return reporter.run


def document(verdicts: Sequence[Verdict]) -> list[dict[str, Any]]:
    """As a JSON document."""
    return [
        {
            "id": verdict.bug.id,
            "verdict": verdict.verdict,
            "kernel": verdict.kernel,
            "case": verdict.bug.case,
            "evidence": verdict.evidence,
        }
        for verdict in verdicts
    ]
