"""Does this kernel have that bug? Runs reproducers and judges what they show."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvmnest.cases.events import Event
from kvmnest.known import same_parameter
from kvmnest.reports.model import Case, Run
from kvmnest.repro.corpus import Reproducer
from kvmnest.repro.evidence import Record, Shown
from kvmnest.run.loop import outcome
from kvmnest.run.selection import Selection
from kvmnest.run.targets import Target

VULNERABLE, FIXED, NOT_APPLICABLE = "VULNERABLE", "FIXED", "NOT APPLICABLE"
#: The harness, the script or the machine is in trouble, so nothing is known of the bug.
NO_VERDICT = "NO VERDICT"

EXIT_CODES = {VULNERABLE: 1, FIXED: 0, NOT_APPLICABLE: 4, NO_VERDICT: 3}

#: Gives a target for kernel parameters.
MakeTarget = Callable[[Mapping[str, str]], Target]


@dataclass(frozen=True)
class Verdict:
    """What a kernel showed: ``evidence`` is one line."""

    reproducer: Reproducer
    verdict: str
    kernel: str
    evidence: str


@dataclass(frozen=True)
class Ended:
    """How the case of a reproducer ended; ``raised`` names the exception if it was no assertion."""

    case: Case
    raised: str = ""


def exit_code(verdicts: Sequence[Verdict]) -> int:
    """1 if anything is VULNERABLE, else 3 if anything has no verdict, else 0 if any is FIXED, 4."""
    seen = {verdict.verdict for verdict in verdicts}
    return next(
        (EXIT_CODES[each] for each in (VULNERABLE, NO_VERDICT, FIXED) if each in seen),
        EXIT_CODES[NOT_APPLICABLE],
    )


def check(
    reproducers: Sequence[Reproducer],
    make_target: MakeTarget,
    shown: Record | None = None,
) -> Iterator[Verdict]:
    """Run reproducers, those with the same parameters together, and yield a verdict for each.

    ``shown`` is the record of what they show, to compare with. Raises UsageError, HarnessError
    or what the target raises if they cannot be run at all.
    """
    groups: dict[object, list[Reproducer]] = {}
    for reproducer in reproducers:
        # A user's script runs by itself: what is broken in it is not the others' trouble.
        alone = "" if reproducer.shipped else reproducer.case
        groups.setdefault((alone, *sorted(reproducer.params.items())), []).append(reproducer)
    for group in groups.values():
        run, ended = _run(make_target(group[0].params), [each.case for each in group])
        for each in group:
            own = [
                case
                for case in ended
                if not each.shipped or case.case.id.startswith(f"{each.path.name}::")
            ]
            yield judge(each, own, run, (shown or {}).get(each.id, ()) if each.shipped else ())


_NUMBER = re.compile(r"0x[0-9a-f]{5,}|\b\d{4,}\b|\[ *\d+\.\d+\]")


def symptom(text: str) -> str:
    """What a failure shows, without addresses and times, which differ between kernels."""
    return _NUMBER.sub("#", text.partition("\n")[0]).strip()


def judge(
    reproducer: Reproducer, ended: Sequence[Ended], run: Run, shown: Sequence[Shown] = ()
) -> Verdict:
    """What the cases of one reproducer say.

    An assertion that fails shows the bug, and so does the VM's or the kernel's death if it is the
    one that the script names. One that passes shows the fix. A failure that does not look like
    one of those recorded in ``shown`` is said to be different.
    """

    def verdict(kind: str, evidence: str) -> Verdict:
        return Verdict(reproducer, kind, run.kernel, evidence)

    if not ended:
        return verdict(NO_VERDICT, run.problems[0] if run.problems else "it did not run")
    wrong = _other_parameters(reproducer, run)
    if wrong:
        return verdict(NOT_APPLICABLE, wrong)
    order = ("failed", "error", "passed", "skipped", "known")
    last = min(ended, key=lambda each: order.index(each.case.outcome))
    case, death = last.case, reproducer.bug.death
    text = _one_line(case)
    if case.outcome == "passed":
        return verdict(FIXED, f"{reproducer.bug.correct} ({case.id} passes)")
    if case.outcome in ("skipped", "known"):
        return verdict(NOT_APPLICABLE, text)
    expected = bool(death) and text.startswith(death)
    if not expected and (last.raised or case.outcome == "error"):
        crashed = last.raised == "VmLost" or case.id in run.lost
        why = " (not the way in which this bug kills)" if crashed else _where(reproducer, case)
        return verdict(NO_VERDICT, f"{text}{why}")
    recorded = [each.put_back.evidence for each in shown]
    if recorded and symptom(text) not in map(symptom, recorded):
        text += f" (recorded for this bug: {recorded[-1]})"
    return verdict(VULNERABLE, text)


def _one_line(case: Case) -> str:
    # What the registers of a lost VM were is in the case's detail.
    return case.headline.partition("; rip=")[0]


def _where(reproducer: Reproducer, case: Case) -> str:
    """The line of the script at which something was raised, "" if it is not in the traceback."""
    name = re.escape(reproducer.path.name)
    found = re.search(rf"^(?:.*/)?({name}:\d+): in ", case.detail, re.M)
    return f" ({found[1]})" if found else ""


def _other_parameters(reproducer: Reproducer, run: Run) -> str:
    """Why a machine whose modules were loaded otherwise cannot show the bug, "" if it can."""
    have = run.facts.get("kvm_params", {})
    wrong = [
        f"{name}={value} (it is {have[name]})"
        for name, value in reproducer.params.items()
        if name in have and not same_parameter(have[name], value)
    ]
    return f"needs kvm_intel with {', '.join(wrong)}" if wrong else ""


def _run(target: Target, cases: list[str]) -> tuple[Run, list[Ended]]:
    raised: dict[str, str] = {}

    def take(event: Event) -> None:
        if event["e"] == "result":
            raised[event["id"]] = event.get("raised", "")

    run = outcome(target, Selection(cases), on_event=take)
    return run, [Ended(case, raised.get(case.id, "")) for case in run.cases]


def document(verdicts: Sequence[Verdict]) -> list[dict[str, Any]]:
    """As a JSON document."""
    return [
        {
            "id": verdict.reproducer.id,
            "cve": verdict.reproducer.bug.cve,
            "fixed": verdict.reproducer.bug.fixed,
            "verdict": verdict.verdict,
            "kernel": verdict.kernel,
            "script": str(verdict.reproducer.path),
            "evidence": verdict.evidence,
        }
        for verdict in verdicts
    ]
