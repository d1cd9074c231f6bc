"""A whole search, over kernels or over commits, and its result in lines for people."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from kvmnest.bisect import git, journal, search
from kvmnest.bisect.journal import Journal
from kvmnest.bisect.plan import Plan
from kvmnest.bisect.probe import Answer
from kvmnest.errors import UsageError
from kvmnest.lab.kernels import package_version

Say = Callable[[str], None]


def kernels(
    plan: Plan, path: Path, ask: Callable[[str], Answer], say: Say, *, go_on: bool
) -> list[str]:
    """Search the plan's list; returns the lines of the result, the first bad one last.

    Raises UsageError if there is nothing to continue, NotBisectable, HarnessError.
    """
    names = plan.kernels
    steps = journal.load(path, plan.asked) if go_on else None
    if go_on and steps is None:
        raise UsageError(f"nothing to continue: there is no {path}")
    steps = steps or journal.start(path, journal.Header(plan.asked, names[0], names[-1]))
    say(f"{len(names)} kernels from {names[0]} to {names[-1]}")
    found = search.search(
        names, lambda name: plan.judge(ask(name)), steps, lambda step: say(step.line)
    )
    versions = [package_version(name) for name in (found.last_good, found.first_bad)]
    lines = []
    for word, name, version in (
        ("before:", found.last_good, versions[0]),
        ("since: ", found.first_bad, versions[1]),
    ):
        package = f" ({version})" if version else ""
        lines.append(f"{word} {name}{package}: {steps.answers[name].text}")
    if found.skipped:
        lines.append(f"not tested in between: {', '.join(found.skipped)}")
    if all(versions):
        low, high = (version.partition("-")[0] for version in versions)
        span = f"v{low}..v{high}"
        lines.append(f"changes, in the stable tree: git log {span} -- arch/x86/kvm virt/kvm")
    return [*lines, *_end(steps), f"{plan.what}: {found.first_bad}"]


def commits(
    plan: Plan, path: Path | None, ask: Callable[[], Answer], say: Say, *, go_on: bool
) -> list[str]:
    """Search the plan's work tree; as ``kernels``."""
    repository = git.Repository(Path(plan.git))
    found, steps = git.bisect(
        repository,
        plan.good,
        plan.bad,
        lambda: plan.judge(ask()),
        lambda step: say(step.line),
        question=plan.asked,
        state=path,
        go_on=go_on,
    )
    lines = []
    for word, commit in (("before:", found.last_good), ("since: ", found.first_bad)):
        if commit:
            lines.append(f"{word} {repository.describe(commit)}: {steps.answers[commit].text}")
    lines += [f"changed: {line}" for line in repository.files_changed(found.first_bad)]
    return [*lines, *_end(steps), f"{plan.what}: {repository.describe(found.first_bad)}"]


def _end(steps: Journal) -> list[str]:
    return [steps.summary, f"all steps: {steps.path}"]
