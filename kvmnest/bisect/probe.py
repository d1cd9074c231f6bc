"""One step of a bisection: is this kernel good or bad, or can it not be told?"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kvmnest.errors import KvmnestError, UsageError
from kvmnest.lab.emulators import BOCHS, Choice
from kvmnest.lab.errors import LabSetupError
from kvmnest.results.lab_target import LabTarget
from kvmnest.results.model import Run
from kvmnest.results.progress import Progress
from kvmnest.results.reporter import Reporter
from kvmnest.results.runner import Plan, pytest_arguments, run_cases, split_selection

GOOD, BAD, SKIP = "good", "bad", "skip"
#: What ``git bisect run`` makes of an exit code.
EXIT_CODES = {GOOD: 0, BAD: 1, SKIP: 125}


@dataclass(frozen=True)
class Answer:
    """``verdict`` is good, bad or skip; ``evidence`` is one line.

    ``kind`` tells skips and deaths apart: "build" (does not compile), "no start" (the kernel does
    not boot or run cases), "hang", "crash", "flaky"; "" otherwise.
    """

    verdict: str
    evidence: str
    kernel: str = ""
    kind: str = ""


@dataclass(frozen=True)
class Question:
    """What is asked of each kernel: does this case pass?

    ``repeat`` runs must agree; ``params`` are module parameters.
    """

    case: str
    params: Mapping[str, str]
    repeat: int = 1
    emulator: Choice = BOCHS

    def ask(self, kernel: str | None, kvm_modules: Path | None = None) -> Answer:
        """Boot a kernel in the lab and run the case.

        A failure, also one that is a known deviation, is bad, and so is a kernel that dies in the
        case. A kernel that does not boot, lacks what the case needs, or gives different answers
        is skipped. Raises UsageError if there is no such case, LabSetupError if the machine itself
        cannot test any kernel (a missing tool, a full disk).
        """
        modules, paths = split_selection([self.case])
        if paths:
            raise UsageError(f"{self.case} is no case of the suite")
        answers = []
        for _ in range(self.repeat):
            try:
                answer = self._once(modules, kernel, kvm_modules)
            except UsageError:
                raise
            except KvmnestError as error:
                if _is_environment(error):
                    raise
                answer = Answer(SKIP, str(error).partition("\n")[0], kind="no start")
            answers.append(answer)
            if answer.verdict == SKIP:
                return answer
        verdicts = [answer.verdict for answer in answers]
        if len(set(verdicts)) > 1:
            return Answer(SKIP, f"flaky: {', '.join(verdicts)}", answers[0].kernel, "flaky")
        return answers[0]

    def _once(self, modules: list[str], kernel: str | None, kvm_modules: Path | None) -> Answer:
        target = LabTarget(
            kernel=kernel,
            kvm_modules=kvm_modules,
            kvm_params=self.params,
            emulator=self.emulator,
        )
        progress = Progress(io.StringIO(), quiet=True)
        reporter = Reporter(Run(target.name), progress, own_clock=True)
        run_cases(target, pytest_arguments(Plan(), target.name, modules, []), reporter)
        return judge(reporter.run)


def _is_environment(error: KvmnestError) -> bool:
    """Whether the next kernel would fail in the same way, which is no reason to skip this one."""
    # A package that left the archive is this kernel's own trouble, and so is a wrong SPEC.
    return type(error) is LabSetupError and not str(error).startswith("apt cannot download")


def judge(run: Run) -> Answer:
    """The answer of one run: bad if any of its cases failed, skip if none of them could run."""
    for case in run.cases:
        if case.outcome in ("failed", "error", "known"):
            text = case.summary or case.detail.partition("\n")[0]
            kind = ""
            if case.outcome == "error":
                kind = "hang" if "said nothing for" in f"{text} {case.detail}" else "crash"
            return Answer(BAD, f"{case.id}: {text}", run.kernel, kind)
    if any(case.outcome == "passed" for case in run.cases):
        passed = sum(case.outcome == "passed" for case in run.cases)
        return Answer(GOOD, f"{passed} passed", run.kernel)
    text = run.cases[0].detail.partition("\n")[0] if run.cases else "nothing ran"
    problem = run.problems[0] if run.problems else text
    return Answer(SKIP, problem, run.kernel)
