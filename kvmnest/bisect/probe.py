"""One step of a bisection: is this kernel good or bad, or can it not be told?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kvmnest import host
from kvmnest.errors import KvmnestError, UsageError, first_line
from kvmnest.host import why_not_kvm
from kvmnest.known import same_parameter
from kvmnest.lab.emulators import BOCHS, Choice
from kvmnest.lab.errors import KernelSpecError, LabSetupError, PackageGone
from kvmnest.reports.model import Run
from kvmnest.run.lab_target import LabTarget
from kvmnest.run.loop import outcome
from kvmnest.run.selection import Selection, split_selection
from kvmnest.run.targets import LocalTarget, Target

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

    @property
    def text(self) -> str:
        """The evidence, after its kind."""
        return f"{self.kind}: {self.evidence}" if self.kind else self.evidence


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
        self.check()
        answers = []
        for _ in range(self.repeat):
            try:
                answer = self._once(kernel, kvm_modules)
            except UsageError:
                raise
            except KvmnestError as error:
                if _is_environment(error):
                    raise
                answer = Answer(SKIP, first_line(error), kind="no start")
            answers.append(answer)
            if answer.verdict == SKIP:
                return answer
        verdicts = [answer.verdict for answer in answers]
        if len(set(verdicts)) > 1:
            return Answer(SKIP, ", ".join(verdicts), answers[0].kernel, "flaky")
        return answers[0]

    def _once(self, kernel: str | None, kvm_modules: Path | None) -> Answer:
        target = LabTarget(
            kernel=kernel,
            kvm_modules=kvm_modules,
            kvm_params=self.params,
            emulator=self.emulator,
        )
        return self._run(target)

    def ask_here(self) -> Answer:
        """Run the case once on this machine's /dev/kvm, in a process of its own.

        Where KVM offers no VMX, or has not the parameters asked for, the kernel is skipped.
        """
        self.check()
        reason = why_not_kvm() or other_parameters(self.params)
        if reason:
            return Answer(SKIP, reason, host.kernel(), "no start")
        return self._run(LocalTarget())

    def check(self) -> None:
        """Raise UsageError if the case is none of the suite's."""
        if split_selection([self.case])[1]:
            raise UsageError(f"{self.case} is not a case of the suite")

    def _run(self, target: Target) -> Answer:
        return judge(outcome(target, Selection([self.case])))


def other_parameters(wanted: Mapping[str, str]) -> str:
    """Which parameter of the loaded modules is not as wanted, in one line; "" if none."""
    for name, value in wanted.items():
        module, _, parameter = name.replace("-", "_").rpartition(".")
        path = host.PARAMETERS.parents[1] / (module or "kvm_intel") / "parameters" / parameter
        try:
            found = path.read_text(encoding="ascii", errors="replace").strip()
        except OSError:
            return f"{module or 'kvm_intel'} has no parameter {parameter}"
        if not same_parameter(found, value):
            return f"{module or 'kvm_intel'} has {parameter}={found}, not {value}"
    return ""


def _is_environment(error: KvmnestError) -> bool:
    """Whether the next kernel would fail in the same way, which is no reason to skip this one."""
    of_this_kernel = isinstance(error, KernelSpecError | PackageGone)
    return isinstance(error, LabSetupError) and not of_this_kernel


def judge(run: Run) -> Answer:
    """The answer of one run: bad if any of its cases failed, skip if none of them could run."""
    if run.running in run.lost:
        return Answer(BAD, f"{run.running}: {run.problems[-1]}", run.kernel, "hang")
    for case in run.cases:
        if case.id in run.interrupted:
            continue
        if case.outcome in ("failed", "error", "known"):
            kind = ""
            if case.outcome == "error":
                kind = run.lost.get(case.id, "crash")
            return Answer(BAD, f"{case.id}: {case.headline}", run.kernel, kind)
    if not run.interrupted and any(case.outcome == "passed" for case in run.cases):
        passed = sum(case.outcome == "passed" for case in run.cases)
        return Answer(GOOD, f"{passed} passed", run.kernel)
    text = first_line(run.cases[0].detail) if run.cases else "nothing ran"
    problem = run.problems[0] if run.problems else text
    return Answer(SKIP, problem, run.kernel)
