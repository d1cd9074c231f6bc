"""Bisection over git: ``git bisect`` chooses the commits and keeps its own state on disk."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kvmnest.bisect import journal as journal_file
from kvmnest.bisect.journal import Header, Journal, Step
from kvmnest.bisect.probe import BAD, GOOD, SKIP, Answer
from kvmnest.bisect.search import NotBisectable
from kvmnest.errors import HarnessError, UsageError

_FIRST_BAD = " is the first bad commit"


class Repository:
    """A git work tree that is bisected."""

    def __init__(self, folder: Path) -> None:
        """Raises UsageError if ``folder`` is not a work tree of git."""
        self.folder = folder
        try:
            inside = self._git("rev-parse", "--is-inside-work-tree")
        except OSError as error:
            raise UsageError(f"git cannot be run in {folder}: {error}") from error
        except HarnessError as error:
            raise UsageError(f"{folder} is not a git work tree ({error})") from error
        if inside.strip() != "true":
            raise UsageError(f"{folder} is not a git work tree")

    def _git(self, *arguments: str, check: bool = True) -> str:
        # A checkout that Ctrl-C cuts in the middle leaves a tree that git then refuses to leave.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
        try:
            done = subprocess.run(
                ["git", *arguments],
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                check=False,
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if check and done.returncode:
            lines = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
            told = [line for line in lines if line.startswith(("fatal:", "error:"))] or lines[-1:]
            raise HarnessError(f"git {arguments[0]} failed: {told[0]}")
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

    def subject(self, revision: str = "HEAD") -> str:
        """Subject of a commit."""
        return self._git("log", "-1", "--format=%s", revision).strip()

    def require_clean(self) -> None:
        """Raise UsageError if tracked files are changed: they would be part of every build."""
        if self._git("status", "--porcelain", "--untracked-files=no").strip():
            raise UsageError(f"{self.folder} has uncommitted changes: commit or stash them")

    @property
    def place(self) -> str:
        """The branch that is checked out, or the hash of a detached HEAD."""
        branch = self._git("symbolic-ref", "--short", "--quiet", "HEAD", check=False).strip()
        return branch or self.commit("HEAD")

    @property
    def journal(self) -> Path:
        """Where the steps are kept unless told otherwise: inside the git directory."""
        path = self._git("rev-parse", "--git-path", "kvmnest-bisect.jsonl").strip()
        return self.folder / path

    def require_order(self, good: str, bad: str) -> None:
        """Raise UsageError if good is not an ancestor of bad."""
        if self._git("merge-base", good, bad, check=False).strip() != self.commit(good):
            raise UsageError(f"{good} is not an ancestor of {bad}: are good and bad swapped?")

    def start(self, good: str, bad: str) -> None:
        """Begin: checks the middle out. Raises UsageError if good is not an ancestor of bad."""
        self.require_order(good, bad)
        self._git("bisect", "start", bad, good)

    def mark(self, verdict: str) -> str:
        """Tell git the verdict on HEAD; returns the first bad commit's hash once it is known.

        Raises NotBisectable if only skipped commits are left, HarnessError if git cannot go on,
        as when the build changed a tracked file.
        """
        before = self.commit("HEAD")
        said = self._git("bisect", verdict, check=False)
        for line in said.splitlines():
            if line.endswith(_FIRST_BAD):
                return line.removesuffix(_FIRST_BAD)
        if "only 'skip'ped commits left" in said:
            hashes = [line for line in said.splitlines() if len(line) == 40]
            raise NotBisectable(
                f"only skipped commits are left: {', '.join(h[:12] for h in hashes)}"
            )
        if self.commit("HEAD") == before:
            raise HarnessError(
                f"git bisect cannot leave {before[:12]}: does the build change tracked files?"
            )
        return ""

    def checkout(self, revision: str) -> None:
        """Check a revision out, detached."""
        self._git("checkout", "--quiet", "--detach", revision)

    def checkout_place(self, place: str) -> None:
        """Check a branch, or a detached HEAD, out again."""
        self._git("checkout", "--quiet", place)

    def files_changed(self, revision: str) -> list[str]:
        """Which files a commit changed and by how much, as ``git show --stat`` has it."""
        return self._git("show", "--stat=90,60,12", "--format=", revision).split("\n")[:-1]

    def parents(self, revision: str) -> list[str]:
        """Hashes of the parents of a commit."""
        return self._git("log", "-1", "--format=%P", revision).split()

    def repair(self) -> None:
        """Undo what a loss of power left of a git that was writing: its lock, half a checkout.

        For a tree that was clean when the bisection began, in which nobody else works.
        """
        lock = self.folder / self._git("rev-parse", "--git-path", "index.lock").strip()
        if lock.exists() and lock.stat().st_mtime < _boot_time():
            lock.unlink()
            self._git("reset", "--hard", "--quiet")

    def reset(self, place: str) -> None:
        """End the bisection, if there is one, and check ``place`` out."""
        self._git("bisect", "reset", place)


def _boot_time() -> int:
    """When this system was started, in seconds since the epoch."""
    lines = Path("/proc/stat").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("btime "))


@dataclass(frozen=True)
class FoundCommit:
    """Hashes: the first bad commit, and its last parent that was tested good ("" if none was)."""

    first_bad: str
    last_good: str


def bisect(
    repository: Repository,
    good: str,
    bad: str,
    ask: Callable[[], Answer],
    on_step: Callable[[Step], None],
    *,
    question: str = "",
    state: Path | None = None,
    go_on: bool = False,
) -> tuple[FoundCommit, Journal]:
    """Find the first bad commit; the bisection is ended then and HEAD where it was before.

    ``ask`` builds and tests what is checked out; each answer is in the journal (``state``, or in
    the git directory) before git is told. After Ctrl-C, or when the machine went down, ``go_on``
    continues, and tests no commit again. Whatever ends the check of good and bad puts HEAD back;
    later HEAD stays on the commit that git chose. Raises UsageError, NotBisectable, HarnessError.
    """
    path = state or repository.journal
    if go_on:
        loaded = journal_file.load(path, question)
        if loaded is None:
            raise UsageError(f"nothing to continue in {repository.folder}")
        journal = loaded
    else:
        check_start(repository, good, bad)
        journal = journal_file.start(
            path,
            Header(question, repository.commit(good), repository.commit(bad), repository.place),
        )
    header = journal.header

    def answer() -> Answer:
        commit = repository.commit("HEAD")
        if commit not in journal.answers:
            journal.add(commit, repository.subject(), ask())
        step = next(step for step in journal.steps if step.name == commit)
        on_step(step)
        return step.answer

    if not repository.bisecting:
        try:
            ends = []
            for revision in (header.good, header.bad):
                repository.checkout(revision)
                ends.append(answer())
            _check_ends(repository, header, ends)
        except BaseException:
            repository.checkout_place(header.came_from)
            raise
        repository.start(header.good, header.bad)
    while True:
        try:
            first = repository.mark(answer().verdict)
        except NotBisectable:
            repository.reset(header.came_from)
            raise
        if first:
            tested = {c for c, a in journal.answers.items() if a.verdict == GOOD}
            parents = [p for p in repository.parents(first) if p in tested]
            repository.reset(header.came_from)
            return FoundCommit(first, parents[-1] if parents else ""), journal


def check_start(repository: Repository, good: str, bad: str) -> None:
    """Raise UsageError where a bisection cannot begin."""
    if repository.bisecting:
        raise UsageError(f"{repository.folder} is being bisected: --continue, or git bisect reset")
    repository.require_clean()
    repository.require_order(good, bad)


def _check_ends(repository: Repository, header: Header, ends: list[Answer]) -> None:
    if [end.verdict for end in ends] == [BAD, GOOD]:
        raise NotBisectable(
            f"good and bad are swapped: {repository.describe(header.good)} is bad and"
            f" {repository.describe(header.bad)} is good (--find fix looks for a fix)"
        )
    pairs = ((header.good, GOOD, ends[0]), (header.bad, BAD, ends[1]))
    for revision, wanted, end in pairs:
        if end.verdict != wanted:
            shown = "cannot be tested" if end.verdict == SKIP else f"is {end.verdict}"
            raise NotBisectable(
                f"{repository.describe(revision)} {shown}, expected {wanted}: {end.text}"
            )
