"""The real machine: Debian with GRUB and systemd."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from kvmnest import host
from kvmnest.bisect.probe import SKIP, Answer, Question
from kvmnest.bisect.reboot import fitness, grub, unit
from kvmnest.bisect.reboot.commands import CommandFailed, Commands
from kvmnest.errors import HarnessError
from kvmnest.lab.debian import SECURE

_NEEDED_IN_BOOT = 200 << 20
_SAFE = re.compile(r"\d[0-9A-Za-z.+~_-]*")


class DebianGrub:
    """See ``kvmnest.bisect.reboot.host.Host``.

    ``state`` is the file that the unit waits for. ``root`` is where the system's files are, for
    tests on others than this system's.
    """

    def __init__(self, commands: Commands, state: Path, root: Path = Path("/")) -> None:
        self._do = commands
        self._state = state
        self._root = root
        self._boot = root / "boot"
        self._menu = self._boot / "grub" / "grub.cfg"
        self._grubenv = self._boot / "grub" / "grubenv"
        # The last in the alphabet has the last word.
        self._settings = root / "etc/default/grub.d/zz-kvmnest-bisect.cfg"
        self._unit = root / "etc/systemd/system" / unit.NAME

    def check(self, *, own_kernels: bool) -> None:
        """Raise HarnessError with the first thing that is in the way."""
        problem = next(fitness.problems(self._root, own_kernels=own_kernels), None)
        if problem:
            raise HarnessError(problem)
        self._entry(self.running())

    def boot_id(self) -> str:
        """From the kernel, which makes a new one at each boot."""
        return (self._root / "proc/sys/kernel/random/boot_id").read_text().strip()

    def running(self) -> str:
        """As uname -r has it."""
        return host.kernel()

    # --- kernels ---

    def has(self, release: str) -> bool:
        """Whether grub.cfg has an entry of its own for it."""
        return grub.entry(self._read_menu(), release) is not None

    def install_package(self, release: str) -> str:
        """By apt-get, from signed archives only; the package may be half installed already."""
        self._require_room()
        self._do.run("dpkg", "--configure", "-a")
        package = f"linux-image-{release}"
        try:
            self._do.run(
                "apt-get", *SECURE, "-q", "install", "-y", "--no-install-recommends", package
            )
        except CommandFailed as error:
            gone = ("Unable to locate package", "has no installation candidate")
            if any(text in error.output for text in gone):
                return f"this system's apt has no {package} any more"
            raise
        return ""

    def _require_room(self) -> None:
        free = shutil.disk_usage(self._boot).free
        if free < _NEEDED_IN_BOOT:
            raise HarnessError(
                f"{self._boot} has {free >> 20} MiB free, a kernel and its initrd need"
                f" {_NEEDED_IN_BOOT >> 20}: remove old kernels (apt-get autoremove --purge)"
            )

    def update_menu(self) -> None:
        """By Debian's update-grub."""
        self._do.run("update-grub")

    def remove(self, release: str) -> None:
        """The package, or the files that no package owns."""
        if not _SAFE.fullmatch(release) or release == self.running():
            raise HarnessError(f"{release!r} is not removed")
        package = f"linux-image-{release}"
        if has_traces(package):
            # Unlike apt-get, this removes nothing that depends on it.
            self._do.run("dpkg", "--purge", "--force-remove-reinstreq", package)
            return
        self._do.run("update-initramfs", "-d", "-k", release)
        for name in ("vmlinuz", "System.map", "config", "initrd.img"):
            self._do.delete(self._boot / f"{name}-{release}")
        self._do.delete(self._root / "lib/modules" / release)
        self.update_menu()

    # --- the menu ---

    def _read_menu(self) -> str:
        try:
            return self._menu.read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            raise HarnessError(f"cannot read {self._menu}: {error.strerror}") from error

    def _entry(self, release: str) -> str:
        found = grub.entry(self._read_menu(), release)
        if found is None:
            raise HarnessError(f"{self._menu} has no entry for {release}")
        return found

    def _saved(self, name: str) -> str:
        """A variable in GRUB's environment block, "" if it is not set."""
        words = ["grub-editenv", str(self._grubenv), "list"]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            raise HarnessError(f"cannot read {self._grubenv}: {done.stderr.strip()}")
        for line in done.stdout.splitlines():
            key, _, value = line.partition("=")
            if key == name:
                return value
        return ""

    def default(self) -> str:
        """From GRUB's environment block."""
        return self._saved("saved_entry")

    def prepare(self, home: str, parameters: Sequence[str]) -> None:
        """With a file of our own for grub-mkconfig. Raises HarnessError if the menu ignores it."""
        self._do.write(self._settings, grub.settings(list(parameters)))
        self.update_menu()
        self._require_menu()
        self._do.run("grub-set-default", f"--boot-directory={self._boot}", self._entry(home))

    def _require_menu(self) -> None:
        grub.require_one_time_choice(self._read_menu(), self._menu)

    def restore(self, default: str) -> None:
        """Remove that file again."""
        self._do.delete(self._settings)
        if default:
            self._do.run("grub-set-default", f"--boot-directory={self._boot}", default)
        else:
            self._do.run("grub-editenv", str(self._grubenv), "unset", "saved_entry")
        self.update_menu()

    def choose(self, release: str) -> None:
        """By grub-reboot; read back, since all hangs on it."""
        entry = self._entry(release)
        self._do.run("grub-reboot", f"--boot-directory={self._boot}", entry)
        self._require_chosen(entry)

    def _require_chosen(self, entry: str) -> None:
        if self._saved("next_entry") != entry:
            raise HarnessError(f"grub-reboot did not put {entry} into {self._grubenv}")

    def still_chosen(self) -> bool:
        """Whether GRUB has not cleared what grub-reboot wrote."""
        return bool(self._saved("next_entry"))

    def forget_choice(self) -> None:
        """Clear it."""
        if self.still_chosen():
            self._do.run("grub-editenv", str(self._grubenv), "unset", "next_entry")

    # --- restarts ---

    def install_unit(self, arguments: Sequence[str]) -> None:
        """In /etc/systemd/system."""
        self._do.write(self._unit, unit.text(arguments, self._state))
        self._do.run("systemctl", "daemon-reload")
        self._do.run("systemctl", "enable", unit.NAME)

    def remove_unit(self) -> None:
        """Also from within the unit: it ends as it likes."""
        if self._unit.exists():
            self._do.run("systemctl", "disable", unit.NAME)
            self._do.delete(self._unit)
            self._do.run("systemctl", "daemon-reload")

    def reboot(self) -> None:
        """Through systemd, so that all services end in order."""
        self._do.run("systemctl", "--no-block", "reboot")

    # --- the case ---

    def test(self, question: Question) -> Answer:
        """Load kvm_intel unless it is built in; where that fails the answer says why."""
        if not host.PARAMETERS.is_dir():
            try:
                self._do.run("modprobe", "kvm_intel")
            except CommandFailed as error:
                return Answer(SKIP, str(error), self.running(), "no start")
        return question.ask_here()


def has_traces(package: str) -> bool:
    """Whether dpkg knows anything of a package, be it half of it."""
    words = ["dpkg-query", "-W", "-f", "${db:Status-Status}", package]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return done.returncode == 0 and done.stdout.strip() != "not-installed"
