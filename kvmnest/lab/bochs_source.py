"""Bochs' source: Debian's tarball, as the signed index of sources describes it, with changes.

``kvmnest/data/bochs-repairs.toml`` names the package and lists the repairs of faults,
``bochs-additions.toml`` what the reference target needs.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
from dataclasses import dataclass, replace
from functools import cache as once
from pathlib import Path

from kvmnest import reading
from kvmnest.errors import HarnessError
from kvmnest.lab import archive, cache, debian, tools
from kvmnest.lab.errors import LabSetupError

REPAIRS_FILE = Path(__file__).parent.parent / "data" / "bochs-repairs.toml"
ADDITIONS_FILE = REPAIRS_FILE.with_name("bochs-additions.toml")
_APT_HELPER = Path("/usr/lib/apt/apt-helper")


@dataclass(frozen=True)
class Repair:
    """A replacement in one file of the source, why, and what upstream did about it."""

    file: str
    old: str
    new: str
    reason: str
    upstream: str = ""

    def apply(self, tree: Path) -> None:
        """Make it in ``tree``. Raises LabSetupError unless ``old`` occurs exactly once."""
        path = tree / self.file
        text = path.read_text(encoding="utf-8", errors="surrogateescape") if path.is_file() else ""
        if text.count(self.old) != 1:
            raise LabSetupError(
                f"a repair of Bochs does not fit: {self.old!r} occurs {text.count(self.old)} times"
                f" in {self.file}, not once"
            )
        text = text.replace(self.old, self.new)
        path.write_text(text, encoding="utf-8", errors="surrogateescape")


@dataclass(frozen=True)
class Source:
    """Which source: Debian's package, its upstream version, the suite that holds it."""

    package: str
    upstream: str
    suite: str
    repairs: tuple[Repair, ...]
    additions: tuple[Repair, ...] = ()

    @property
    def changes(self) -> tuple[Repair, ...]:
        """All of them, in the order in which they are made."""
        return self.repairs + self.additions

    @property
    def version(self) -> str:
        """Bochs' own version number ("3.0")."""
        return self.upstream.partition("+")[0]

    @property
    def tarball(self) -> str:
        """Name of the file in the archive."""
        return f"{self.package}_{self.upstream}.orig.tar.xz"

    @property
    def key(self) -> str:
        """What the result depends on; not the reasons."""
        return self._digest(self.changes)

    @property
    def key_for_the_lab(self) -> str:
        """The same for a build without the additions, which the lab has no use for."""
        return self._digest(self.repairs)

    def _digest(self, made: tuple[Repair, ...]) -> str:
        changes = [part for r in made for part in (r.file, r.old, r.new)]
        return cache.digest([self.package, self.upstream, *changes])


@once
def source() -> Source:
    """What the data says. Raises HarnessError if a file is damaged."""
    file = REPAIRS_FILE
    try:
        data = reading.toml(file)
        found = Source(**data["source"], repairs=tuple(Repair(**r) for r in data["repair"]))
        file = ADDITIONS_FILE
        added = reading.toml(file)["addition"]
        return replace(found, additions=tuple(Repair(**r) for r in added))
    except (ValueError, KeyError, TypeError) as error:
        raise HarnessError(f"{file} cannot be used: {error}") from error


def fetch(wanted: Source, to: Path) -> None:
    """Download the tarball to ``to``, its hash checked against the archive's signed index.

    Raises LabSetupError without a connection, a Debian mirror or its keyring, or if the file is
    another one.
    """
    apt, mirror = _sources(wanted.suite)
    directory, sha256 = _record(apt, wanted)
    if not _APT_HELPER.exists():
        raise LabSetupError(f"{_APT_HELPER} not found: apt-get install apt")
    partial = to.with_name(f"{to.name}.partial")
    argv = [str(_APT_HELPER), *apt.options, "download-file", f"{mirror}/{directory}/{to.name}"]
    done = subprocess.run(
        [*argv, str(partial), f"SHA256:{sha256}"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
    )
    if done.returncode:
        errors = re.findall(r"^E: (.*)$", done.stderr.decode(errors="replace"), re.MULTILINE)
        raise LabSetupError(errors[0] if errors else f"downloading {to.name} failed")
    if hashlib.sha256(partial.read_bytes()).hexdigest() != sha256:
        partial.unlink()
        raise LabSetupError(f"{to.name}: the downloaded file is not the one of the signed index")
    partial.replace(to)


def unpack(tarball: Path, wanted: Source, to: Path) -> None:
    """Unpack the source to ``to``, which must not exist, and repair it. Raises LabSetupError."""
    work = to.with_name(f"{to.name}.partial")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    tools.find("xz")
    argv = ["tar", "-xf", str(tarball), "-C", str(work), "--strip-components=1", "--no-same-owner"]
    tools.run(argv, f"unpacking {tarball.name}")
    for change in wanted.changes:
        change.apply(work)
    work.rename(to)


def _sources(suite: str) -> tuple[debian.Apt, str]:
    """An apt of our own that knows the sources of ``suite`` only, and the mirror's address."""
    folder = cache.root() / "apt-sources"
    with cache.locked("apt-sources"):
        mirror, _ = archive.mirrors()["main"]
        archive.write_sources(folder, "deb-src", [(mirror, suite)])
        apt = debian.Apt(archive.private_options(folder))
        tools.run(["apt-get", *apt.options, "-q", "update"], "apt-get update")
    return apt, mirror


def _record(apt: debian.Apt, wanted: Source) -> tuple[str, str]:
    """Folder of the tarball below the mirror, and its SHA-256."""
    asked = ["apt-cache", *apt.options, "showsrc", wanted.package]
    done = tools.run(asked, f"apt-cache showsrc {wanted.package}")
    for text in done.stdout.decode(errors="replace").split("\n\n"):
        directory = re.search(r"^Directory: (\S+)$", text, re.MULTILINE)
        sums = text.partition("\nChecksums-Sha256:")[2]
        file = re.search(
            rf"^ ([0-9a-f]{{64}}) \d+ {re.escape(wanted.tarball)}$", sums, re.MULTILINE
        )
        if directory and file:
            return directory[1], file[1]
    raise LabSetupError(f"Debian's {wanted.suite} has no {wanted.tarball} any more")
