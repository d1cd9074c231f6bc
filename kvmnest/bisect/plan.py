"""What is searched for, between what, and how kernels come about: a value that fits into a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from kvmnest.bisect import command
from kvmnest.bisect.probe import BAD, GOOD, SKIP, Answer, Question
from kvmnest.errors import UsageError
from kvmnest.lab import cache, kernels
from kvmnest.lab.emulators import Choice


@dataclass(frozen=True)
class Plan:
    """A bisection as the user asked for it.

    ``find`` is "bug" or "fix"; ``kernels`` is the list to search, ``git`` the work tree to search
    in instead. ``build`` and the commands of ``--boot reboot`` are run there; ``limit`` is for
    ``build``, in seconds. ``boot`` is where kernels are booted, ``emulator`` the program for that.
    """

    case: str
    params: Mapping[str, str]
    find: str = "bug"
    repeat: int = 1
    good: str = ""
    bad: str = ""
    kernels: list[str] = field(default_factory=list)
    git: str = ""
    build: str = ""
    limit: float | None = None
    kernel: str | None = None
    kvm_modules: str | None = None
    boot: str = "lab"
    emulator: str | None = None
    install: str = ""
    release: str = ""

    @property
    def question(self) -> Question:
        """What is asked of each kernel."""
        return Question(self.case, self.params, self.repeat, Choice(self.boot, self.emulator))

    @property
    def asked(self) -> str:
        """What makes answers comparable, as text."""
        words = f"{self.find} {self.case} {sorted(self.params.items())}"
        if self.boot != "lab":
            words += f" {self.boot}"
        if self.git:
            return f"{words} {self.build}"
        return f"{words} from {self.kernels[0]} to {self.kernels[-1]}"

    @property
    def journal(self) -> Path:
        """Where the steps of a search over kernels are kept unless told otherwise."""
        return folder() / f"{cache.digest([self.asked])}.jsonl"

    @property
    def what(self) -> str:
        """What the result is called."""
        if self.git:
            return "fixed by" if self.find == "fix" else "first bad commit"
        return "fixed" if self.find == "fix" else "first bad"

    def judge(self, answer: Answer) -> Answer:
        """The answer as the search takes it: to find a fix, "bad" is what passes."""
        if self.find == "bug":
            return answer
        other = {GOOD: BAD, BAD: GOOD}
        return replace(answer, verdict=other.get(answer.verdict, answer.verdict))

    def build_commit(self, environment: Mapping[str, str] | None = None) -> Answer | None:
        """Build what is checked out; the answer if it does not build. Raises as ``command.run``."""
        words = command.split(self.build, "--build")
        done = command.run(words, Path(self.git), limit=self.limit, environment=environment)
        return Answer(SKIP, done.why, kind="build") if done.why else None


def folder() -> Path:
    """The folder of the journals of searches over kernels, made if it is not there."""
    path = cache.root() / "bisect"
    path.mkdir(mode=0o700, exist_ok=True)
    return path


def choose_kernels(given: str | None, good: str, bad: str, *, here: bool = False) -> list[str]:
    """The kernels to search: those ``given`` ("A,B,C"), or Debian's, from ``good`` to ``bad``.

    ``here``: those that this system can install and boot. Raises UsageError.
    """
    if given:
        names = given.split(",")
        if not {good, bad} <= set(names):
            raise UsageError("--kernels must hold --good and --bad")
        names = names[names.index(good) : names.index(bad) + 1]
    else:
        names = kernels.between(good, bad, here=here)
    if len(names) < 2:
        raise UsageError(f"no kernels from {good} to {bad}: are they swapped?")
    return names
