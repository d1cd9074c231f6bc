"""Debian's kernel packages: which exist, fetching one with its signature checked by apt."""

import hashlib
import re
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from kvmnest.lab import tools
from kvmnest.lab.errors import KernelSpecError, LabSetupError

_NAME = re.compile(r"linux-image-(\d+\.\d+\.\d+\S*?-(?:cloud-|rt-)?amd64)$")
SECURE = (
    "-oAPT::Get::AllowUnauthenticated=false",
    "-oAcquire::AllowInsecureRepositories=false",
    "-oAcquire::AllowWeakRepositories=false",
    "-oAcquire::AllowDowngradeToInsecureRepositories=false",
    "-oAcquire::Retries=2",
)


def version_key(release: str) -> tuple[int, ...]:
    """Sort key of a kernel release: its numbers in order."""
    return tuple(int(number) for number in re.findall(r"\d+", release.partition("-amd64")[0]))


def match(spec: str, releases: Iterable[str]) -> str | None:
    """The release that ``spec`` names: exact, or the newest that it is a prefix of.

    ``6.1.0-56`` and ``6.12`` stand for all flavours; cloud is preferred, then the plain one.
    """
    known = set(releases)
    if spec in known:
        return spec
    found = []
    for release in known:
        base, flavour = release.removesuffix("amd64").rstrip("-"), 1
        if base.endswith("-cloud"):
            base, flavour = base.removesuffix("-cloud"), 2
        elif base.endswith("-rt"):
            continue
        rest = base.removeprefix(spec)
        if base.startswith(spec) and (not rest or not rest[0].isdigit()):
            found.append((version_key(base), flavour, release))
    # All of one version first: a newer plain kernel does not win over an older cloud one.
    cloud = [entry for entry in found if entry[1] == 2]
    return max(cloud or found)[2] if found else None


@dataclass(frozen=True)
class Offer:
    """A kernel image of the archive: package version, suites that hold it, bytes to download."""

    release: str
    version: str
    suites: tuple[str, ...]
    size: int


class Apt:
    """The system's apt, or a private one whose lists live in a folder of ours."""

    def __init__(self, options: Iterable[str] = ()) -> None:
        """Use apt with extra ``options``."""
        self.options = (*SECURE, *options)

    @cached_property
    def releases(self) -> list[str]:
        """Releases of the kernel images that apt knows. Raises LabSetupError."""
        done = tools.run(["apt-cache", *self.options, "pkgnames", "linux-image-"], "apt-cache")
        found = (_NAME.match(name) for name in done.stdout.decode().split())
        return [name[1] for name in found if name is not None]

    def record(self, release: str) -> dict[str, str]:
        """The image package's newest index record (signed, through the archive's Release file)."""
        return self.package(f"linux-image-{release}")

    def package(self, package: str) -> dict[str, str]:
        """Index record of any package, ``name`` (its newest version) or ``name=version``."""
        done = tools.run(["apt-cache", *self.options, "--no-all-versions", "show", package],
                         f"apt-cache show {package}")  # fmt: skip
        return next(records(done.stdout))

    def offers(self) -> list[Offer]:
        """All kernel images, with what the index says of each, in no order."""
        packages = [f"linux-image-{release}" for release in self.releases]
        if not packages:
            return []
        asked = [*self.options, "--no-all-versions"]
        shown = tools.run(["apt-cache", *asked, "show", *packages], "apt-cache show")
        rows = tools.run(["apt-cache", *self.options, "madison", *packages], "apt-cache madison")
        suites: dict[tuple[str, str], list[str]] = {}
        for row in rows.stdout.decode(errors="replace").splitlines():
            name, version, place = (part.strip() for part in row.split("|"))
            if place.endswith(" Packages"):  # "URL SUITE/COMPONENT ARCHITECTURE Packages"
                suite = place.split()[1].partition("/")[0]
                suites.setdefault((name, version), []).append(suite)
        return [
            Offer(
                record["Package"].removeprefix("linux-image-"),
                record["Version"],
                tuple(sorted(set(suites.get((record["Package"], record["Version"]), ())))),
                int(record["Size"]),
            )
            for record in records(shown.stdout)
        ]

    def download(self, release: str, folder: Path) -> Path:
        """Fetch the image package into ``folder``; see ``download_package``."""
        return self.download_package(f"linux-image-{release}", folder)

    def download_package(self, package: str, folder: Path) -> Path:
        """Fetch ``name`` or ``name=version`` into ``folder``, empty so far.

        apt refuses it if it is not authenticated. Raises LabSetupError when apt is offline or
        refuses, KernelSpecError when the file is not the one of the signed index.
        """
        wanted = self.package(package).get("SHA256", "")
        command = [tools.find("apt-get"), *self.options, "-q", "download", package]
        done = subprocess.run(command, cwd=folder, capture_output=True, check=False)
        files = list(folder.glob("*.deb"))
        if done.returncode or not files:
            errors = [line for line in done.stderr.decode(errors="replace").splitlines()
                      if line.startswith("E:")]  # fmt: skip
            reason = errors[0][2:].strip() if errors else f"status {done.returncode}"
            raise LabSetupError(f"apt cannot download {package}: {reason}")
        actual = hashlib.sha256(files[0].read_bytes()).hexdigest()
        if not wanted or actual != wanted:
            raise KernelSpecError(f"{package}: the downloaded file does not match apt's index")
        return files[0]


def records(output: bytes) -> Iterator[dict[str, str]]:
    """Index records as apt-cache prints them: fields without their continuation lines."""
    for text in output.decode(errors="replace").strip().split("\n\n"):
        parts = (line.partition(":") for line in text.splitlines() if not line.startswith(" "))
        yield {key: value.strip() for key, sep, value in parts if sep}


def unpack(deb: Path, folder: Path) -> None:
    """Extract a .deb into ``folder``. Raises KernelSpecError if it is corrupt."""
    program = tools.find("dpkg-deb")
    done = subprocess.run([program, "-x", str(deb), str(folder)], capture_output=True, check=False)
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
        raise KernelSpecError(f"{deb} is not a usable Debian package: {lines[-1]}")


KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_SOURCE = re.compile(r"'(\S+)/dists/([a-z]+)(-security|-updates|-backports)?/InRelease'")


def system_stamp() -> str:
    """What tells that the system's apt may now know other packages: times of its lists."""
    lists = Path("/var/lib/apt/lists")
    try:
        return f"{lists.stat().st_mtime_ns}"
    except OSError:
        return "none"


_DAY, _MINUTE = 86_400.0, 60.0


def archive(folder: Path) -> Apt:
    """Debian's archive as it is now: an apt of our own, its lists in ``folder``; needs no root.

    The system's lists may be months old, and lack backports. Ours are brought up to date once a
    day. Raises LabSetupError if that cannot be done and there are no older ones: no Debian
    mirror, no keyring, no connection.
    """
    apt, updated, failed = Apt(private_options(folder)), folder / "updated", folder / "failed"
    if _age(updated) < _DAY:
        return apt
    # Without a connection each attempt may take long.
    if _age(failed) > _MINUTE:
        try:
            _write_sources(folder)
            tools.run(["apt-get", *apt.options, "-q", "update"], "apt-get update")
            updated.touch()
            failed.unlink(missing_ok=True)
            return apt
        except LabSetupError as error:
            folder.mkdir(exist_ok=True)
            failed.write_text(str(error))
    if not updated.is_file():
        raise LabSetupError(failed.read_text())
    return apt


def _age(path: Path) -> float:
    try:
        return abs(time.time() - path.stat().st_mtime)
    except OSError:
        return float("inf")


def archive_stamp(folder: Path) -> str:
    """What tells that the lists of ``archive`` changed."""
    try:
        return f"{(folder / 'updated').stat().st_mtime_ns}"
    except OSError:
        return "none"


def private_options(folder: Path) -> tuple[str, ...]:
    """Options of an apt whose sources, lists and cache are in ``folder``."""
    return (
        f"-oDir::Etc::sourcelist={folder}/sources.list",
        "-oDir::Etc::sourceparts=/dev/null",
        f"-oDir::State={folder}/state",
        f"-oDir::State::lists={folder}/state/lists",
        f"-oDir::State::status={folder}/status",
        f"-oDir::Cache={folder}/cache",
        # Containers often turn these off; without them each question reads all lists again.
        "-oDir::Cache::pkgcache=pkgcache.bin",
        "-oDir::Cache::srcpkgcache=srcpkgcache.bin",
        "-oAPT::Sandbox::User=",
        "-oAcquire::Languages=none",
    )


def mirrors() -> dict[str, tuple[str, str]]:
    """The mirrors that the system is set up for: "main", "security" -> address, suite.

    Raises LabSetupError if there is none for "main", or no keyring of Debian's archive.
    """
    if not KEYRING.is_file():
        raise LabSetupError(f"{KEYRING} not found: apt-get install debian-archive-keyring")
    done = tools.run(["apt-get", "update", "--print-uris"], "apt-get update --print-uris")
    bases: dict[str, tuple[str, str]] = {}
    for uri, codename, kind in _SOURCE.findall(done.stdout.decode(errors="replace")):
        if "debian" in uri:
            bases["security" if kind == "-security" else "main"] = (uri, codename)
    if "main" not in bases:
        raise LabSetupError("apt has no Debian mirror set up (see sources.list(5))")
    return bases


def _write_sources(folder: Path) -> None:
    """The system's mirrors, with security and backports added."""
    bases = mirrors()
    uri, codename = bases["main"]
    sources = [(uri, codename + suffix) for suffix in ("", "-updates", "-backports")]
    if "security" in bases:
        sources.append((bases["security"][0], f"{codename}-security"))
    write_sources(folder, "deb", sources)


def write_sources(folder: Path, kind: str, sources: Iterable[tuple[str, str]]) -> None:
    """Set up the apt of ``folder``: ``kind`` is "deb" or "deb-src", each source address, suite.

    Only Debian's archive keyring is trusted.
    """
    for sub in ("state/lists/partial", "cache/archives/partial"):
        (folder / sub).mkdir(parents=True, exist_ok=True)
    lines = [f"{kind} [signed-by={KEYRING}] {uri} {suite} main\n" for uri, suite in sources]
    (folder / "sources.list").write_text("".join(lines))
    (folder / "status").touch()


def fetch(apt: Apt, release: str, target: Path) -> None:
    """Download and unpack the image package of ``release`` into ``target``."""
    with tempfile.TemporaryDirectory(prefix="kvmnest-") as scratch:
        unpack(apt.download(release, Path(scratch)), target)
