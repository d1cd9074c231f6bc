"""Where the kernels that are booted come from: Debian's archive, or commits that are built."""

from __future__ import annotations

import re
from pathlib import Path

from kvmnest.bisect import command
from kvmnest.bisect.plan import Plan
from kvmnest.bisect.probe import SKIP, Answer
from kvmnest.bisect.reboot.host import Host
from kvmnest.bisect.reboot.state import State
from kvmnest.errors import HarnessError, UsageError

#: What a commit's kernel is installed with, and what then names its release.
INSTALL = "make INSTALL_MOD_STRIP=1 modules_install install"
RELEASE = "make -s kernelrelease"

_RELEASE = re.compile(r"\d[0-9A-Za-z.+~_-]*")


class DebianKernels:
    """Packages of Debian; a kernel's name is its release."""

    def __init__(self, host: Host) -> None:
        self._host = host

    def install(self, name: str, state: State) -> str | Answer:
        """See ``trial.Candidates``; one that is there already stays as it is."""
        if name not in state.installed and self._host.has(name):
            return name
        state.note_installed(name)
        why = self._host.install_package(name)
        if why:
            return Answer(SKIP, why, name, "no start")
        return _in_menu(self._host, name)


def tag(commit: str) -> str:
    """What makes a commit's release its own; the kernel's makefiles take it from LOCALVERSION."""
    return f"-kvmnest-{commit[:12]}"


class Commits:
    """The commit that is checked out; a kernel's name is its hash."""

    def __init__(self, host: Host, plan: Plan) -> None:
        self._host = host
        self._plan = plan

    def install(self, name: str, state: State) -> str | Answer:
        """See ``trial.Candidates``. Raises UsageError if the release is not the commit's own."""
        plan, folder = self._plan, Path(self._plan.git)
        environment = {"LOCALVERSION": tag(name)}
        failed = plan.build_commit(environment)
        if failed:
            return failed
        words = command.split(plan.release, "--release")
        done = command.run(words, folder, environment=environment)
        release = done.output.strip()
        if done.why or not _RELEASE.fullmatch(release):
            raise UsageError(f"{plan.release} does not say the release: {done.why or release!r}")
        if tag(name) not in release:
            raise UsageError(
                f"the release {release} is not this commit's own: {plan.build} and {plan.release}"
                f" must take LOCALVERSION={tag(name)} from the environment"
            )
        state.note_installed(release)
        words = command.split(plan.install, "--install")
        done = command.run(words, folder, environment=environment)
        if done.why:
            raise HarnessError(f"{plan.install} failed: {done.why}")
        return _in_menu(self._host, release)


def _in_menu(host: Host, release: str) -> str:
    if not host.has(release):
        host.update_menu()
    if not host.has(release):
        raise HarnessError(f"{release} was installed but is not in the boot menu")
    return release
