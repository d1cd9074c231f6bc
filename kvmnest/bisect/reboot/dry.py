"""What a bisection by restarts would do, in the commands that it would run."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

from kvmnest import host
from kvmnest.bisect import git
from kvmnest.bisect.plan import Plan
from kvmnest.bisect.reboot import fitness
from kvmnest.bisect.reboot.candidates import tag
from kvmnest.bisect.reboot.commands import DryCommands
from kvmnest.bisect.reboot.debian_grub import DebianGrub
from kvmnest.bisect.reboot.session import parameters, unit_arguments

Say = Callable[[str], None]


class DryMachine(DebianGrub):
    """Prints; what would be there only after a command it prints is guessed."""

    def _read_menu(self) -> str:
        return super()._read_menu() if self._menu.exists() else ""

    def _entry(self, release: str) -> str:
        menu, home = self._read_menu(), self.running()
        if self.has(release):
            return super()._entry(release)
        if self.has(home):
            return super()._entry(home).replace(f"-{home}-", f"-{release}-")
        return f"gnulinux-advanced-UUID>gnulinux-{release}-advanced-UUID" if not menu else release

    def _require_menu(self) -> None:
        return

    def _require_room(self) -> None:
        return

    def _require_chosen(self, entry: str) -> None:
        return


def dry_run(plan: Plan, folder: Path, say: Say, *, root: Path = Path("/")) -> None:
    """Print all commands for the first kernel, and what else would be in the way."""
    machine = DryMachine(DryCommands(say), folder / "state.json", root)
    for problem in fitness.problems(root, own_kernels=bool(plan.git)):
        say(f"# refused: {problem}")
    say("# at the beginning")
    machine.install_unit(unit_arguments(folder))
    machine.prepare(host.kernel(), parameters(plan))
    say("# for each kernel; the first is")
    if plan.git:
        release = _commit(plan, say)
    else:
        release = plan.kernels[0]
        if not machine.has(release):
            machine.install_package(release)
    machine.choose(release)
    machine.reboot()
    say("# after each restart, by the unit")
    say(shlex.join(["kvmnest", *unit_arguments(folder)]))


def _commit(plan: Plan, say: Say) -> str:
    repository = git.Repository(Path(plan.git))
    commit = repository.commit(plan.good)
    say(f"cd {shlex.quote(plan.git)}")
    say(f"git checkout --quiet --detach {commit}")
    say(f"export LOCALVERSION={tag(commit)}")
    for text in (plan.build, plan.release, plan.install):
        say(text)
    return f"VERSION{tag(commit)}"
