"""What a bisection by restarts needs of the machine. The tests have one that only acts it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from kvmnest.bisect.probe import Answer, Question


class RebootNeeded(Exception):
    """Control flow: all is written down, the machine has to restart, and then we are started again.

    ``into`` is the kernel that comes next.
    """

    def __init__(self, into: str) -> None:
        super().__init__(into)
        self.into = into


class Host(Protocol):
    """The machine. Everything may be done twice: the power can fail before we note it as done.

    All raise HarnessError, in one line, for what no other kernel would do better.
    """

    def check(self, *, own_kernels: bool) -> None:
        """Raise if this machine cannot be bisected; ``own_kernels`` are built, not Debian's."""
        ...

    def boot_id(self) -> str:
        """A name of the present boot that no other boot has."""
        ...

    def running(self) -> str:
        """Release of the running kernel."""
        ...

    def has(self, release: str) -> bool:
        """Whether a kernel is in the boot menu."""
        ...

    def install_package(self, release: str) -> str:
        """Install Debian's package of a kernel; why there is none, or ""."""
        ...

    def update_menu(self) -> None:
        """Make the boot menu anew."""
        ...

    def remove(self, release: str) -> None:
        """Remove a kernel that does not run."""
        ...

    def default(self) -> str:
        """The entry that the menu has saved as its default, "" for none."""
        ...

    def prepare(self, home: str, parameters: Sequence[str]) -> None:
        """Boot ``home`` from now on unless chosen otherwise, everything with the parameters."""
        ...

    def restore(self, default: str) -> None:
        """Undo ``prepare``; ``default`` is what ``default()`` was before it."""
        ...

    def choose(self, release: str) -> None:
        """Boot this kernel the next time only."""
        ...

    def still_chosen(self) -> bool:
        """Whether a choice for the next boot is pending."""
        ...

    def forget_choice(self) -> None:
        """Take the choice back."""
        ...

    def install_unit(self, arguments: Sequence[str]) -> None:
        """Have ``kvmnest ARGUMENTS`` started after each boot."""
        ...

    def remove_unit(self) -> None:
        """Undo ``install_unit``."""
        ...

    def reboot(self) -> None:
        """Restart the machine; returns before it goes down."""
        ...

    def test(self, question: Question) -> Answer:
        """Run the case once on the running kernel, in a process of its own."""
        ...
