"""Bisection over git: ``git bisect`` chooses the commits and keeps its own state on disk."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

from kvmnest.bisect.probe import BAD, GOOD, SKIP, Answer
from kvmnest.bisect.search import NotBisectable
from kvmnest.errors import HarnessError, UsageError

_FIRST_BAD = " is the first bad commit"


class Repository:
    """A git work tree that is bisected."""

    def __init__(self, folder: Path) -> None:
        """Raises UsageError if ``folder`` is no work tree of git."""
        self.folder = folder
        try:
            inside = self._git("rev-parse", "--is-inside-work-tree", check=False)
        except (OSError, HarnessError) as error:
            raise UsageError(f"git cannot be run in {folder}: {error}") from error
        if inside.strip() != "true":
            raise UsageError(f"{folder} is no git work tree")

    def _git(self, *arguments: str, check: bool = True) -> str:
        done = subprocess.run(
            ["git", *arguments],
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        if check and done.returncode:
            lines = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
            raise HarnessError(f"git {arguments[0]} failed: {lines[-1]}")
        return done.stdout

    @property
    def bisecting(self) -> bool:
        """Whether a bisection is going on there."""
        return bool(self._git("bisect", "log", check=False).strip())

    def commit(self, revision: str) -> str:
        """Hash of a revision. Raises UsageError if there is none."""
        found = self._git("rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}", check=False)
        if not found.strip():
            raise UsageError(f"{self.folder} has no revision {revision}")
        return found.strip()

    def describe(self, revision: str = "HEAD") -> str:
        """Short hash and subject."""
        return self._git("log", "-1", "--format=%h %s", revision).strip()

    def require_clean(self) -> None:
        """Raise UsageError if tracked files are changed: they would be part of every build."""
        if self._git("status", "--porcelain", "--untracked-files=no").strip():
            raise UsageError(f"{self.folder} has uncommitted changes: commit or stash them")

    def start(self, good: str, bad: str) -> None:
        """Begin: checks the middle out. Raises UsageError if good is no ancestor of bad."""
        if self._git("merge-base", good, bad).strip() != self.commit(good):
            raise UsageError(f"{good} is no ancestor of {bad}: are good and bad swapped?")
        self._git("bisect", "start", bad, good)

    def mark(self, verdict: str) -> str:
        """Tell git the verdict on HEAD; returns the first bad commit's hash once it is known.

        Raises NotBisectable if only skipped commits are left.
        """
        said = self._git("bisect", verdict, check=False)
        for line in said.splitlines():
            if line.endswith(_FIRST_BAD):
                return line.removesuffix(_FIRST_BAD)
        if "only 'skip'ped commits left" in said:
            hashes = [line for line in said.splitlines() if len(line) == 40]
            raise NotBisectable(
                f"only skipped commits are left: {', '.join(h[:12] for h in hashes)}"
            )
        return ""

    def checkout(self, revision: str) -> None:
        """Check a revision out, detached."""
        self._git("checkout", "--quiet", "--detach", revision)

    def reset(self) -> None:
        """End the bisection and go back to where it began."""
        self._git("bisect", "reset")


def bisect(
    repository: Repository,
    good: str,
    bad: str,
    ask: Callable[[], Answer],
    on_answer: Callable[[str, Answer], None],
    *,
    go_on: bool = False,
) -> str:
    """Find the first bad commit; returns its hash, with the bisection ended.

    ``ask`` builds and tests what is checked out. After Ctrl-C, or when the machine went down, git
    still knows what was found: ``go_on`` continues. Raises UsageError, NotBisectable.
    """
    if repository.bisecting and not go_on:
        raise UsageError(f"{repository.folder} is being bisected: --continue, or git bisect reset")
    if not go_on:
        repository.require_clean()
        good, bad = repository.commit(good), repository.commit(bad)
        for revision, wanted in ((good, GOOD), (bad, BAD)):
            repository.checkout(revision)
            answer = ask()
            on_answer(repository.describe(), answer)
            if answer.verdict != wanted:
                shown = "cannot be tested" if answer.verdict == SKIP else f"is {answer.verdict}"
                raise NotBisectable(
                    f"{repository.describe(revision)} {shown}, expected {wanted}: {answer.evidence}"
                )
        repository.start(good, bad)
    elif not repository.bisecting:
        raise UsageError(f"nothing to continue in {repository.folder}")
    while True:
        answer = ask()
        on_answer(repository.describe(), answer)
        found = repository.mark(answer.verdict)
        if found:
            repository.reset()
            return found
