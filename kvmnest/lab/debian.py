"""Debian's kernel packages: which exist, fetching one with its signature checked by apt."""

import contextlib
import hashlib
import json
import re
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

from kvmnest import reading, scratch
from kvmnest.errors import KvmnestError
from kvmnest.files import replace
from kvmnest.lab import tools
from kvmnest.lab.errors import KernelSpecError, LabSetupError, PackageGone
from kvmnest.schema import COUNT, TEXT, TEXTS, exactly

_IMAGE = re.compile(r"linux-image-(\d+\.\d+\S*?-(?:cloud-|rt-)?amd64)$")
# Since 6.19 the image package only depends on these, of the same version.
_PARTS = re.compile(r"(linux-(?:binary|modules)-\d\S*) \(= (\S+)\)")
SECURE = (
    "-oAPT::Get::AllowUnauthenticated=false",
    "-oAcquire::AllowInsecureRepositories=false",
    "-oAcquire::AllowWeakRepositories=false",
    "-oAcquire::AllowDowngradeToInsecureRepositories=false",
    "-oAcquire::Retries=2",
)


NEWEST, CANDIDATE = "newest", "rc"  # SPECs beside versions


def is_candidate(release: str) -> bool:
    """Whether a release is named like a release candidate: 7.3-cloud-amd64 became 7.3.4."""
    return re.match(r"\d+\.\d+(\.0)?(-rc\d*)?-(cloud-|rt-)?amd64$", release) is not None


def version_key(release: str) -> tuple[int, ...]:
    """Sort key of a kernel release: its numbers in order."""
    return tuple(int(number) for number in re.findall(r"\d+", release.partition("-amd64")[0]))


def match(spec: str, releases: Iterable[str]) -> str | None:
    """The release that ``spec`` names: exact, or the newest that it is a prefix of.

    ``6.1.0-56`` and ``6.12`` stand for all flavours; cloud is preferred, then the plain one.
    ``newest`` is the newest that was released, ``rc`` the newest release candidate.
    """
    known = set(releases)
    if spec in (NEWEST, CANDIDATE):
        known = {name for name in known if is_candidate(name) == (spec == CANDIDATE)}
        spec = ""
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
        if base.startswith(spec) and (not spec or not rest or not rest[0].isdigit()):
            found.append((version_key(base), flavour, release))
    # All of one version first: a newer plain kernel does not win over an older cloud one.
    cloud = [entry for entry in found if entry[1] == 2]
    return max(cloud or found)[2] if found else None


@dataclass(frozen=True)
class Offer:
    """A kernel of the archive: package version, suites that hold it, bytes to download.

    ``packages`` are what to fetch, each as ``name=version``; ``key`` stands for their content.
    """

    release: str
    version: str
    suites: tuple[str, ...]
    size: int
    packages: tuple[str, ...]
    key: str

    @property
    def candidate(self) -> bool:
        """Whether it is a release candidate."""
        return "~rc" in self.version


class Apt:
    """The system's apt, or a private one whose lists live in a folder of ours.

    ``notes`` is a file that keeps what apt said for as long as its name stays the same.
    """

    def __init__(self, options: Iterable[str] = (), notes: Path | None = None) -> None:
        """Use apt with extra ``options``."""
        self.options = (*SECURE, *options)
        self._notes = notes

    @cached_property
    def offers(self) -> dict[str, Offer]:
        """The kernels that can be had whole, by release. Raises LabSetupError."""
        if self._notes is not None:
            with contextlib.suppress(KvmnestError):
                return {offer.release: offer for offer in _read_notes(self._notes)}
        found = self._ask()
        if self._notes is not None:
            with contextlib.suppress(OSError):  # a full disk: it is asked again
                _write_notes(self._notes, found.values())
        return found

    def _names(self, prefix: str) -> list[str]:
        """Packages whose names begin so."""
        done = tools.run(["apt-cache", *self.options, "pkgnames", prefix], "apt-cache")
        return done.stdout.decode().split()

    def _ask(self) -> dict[str, Offer]:
        images = [name for name in self._names("linux-image-") if _IMAGE.match(name)]
        if not images:
            return {}
        parts = [name for kind in ("binary", "modules") for name in self._names(f"linux-{kind}-")]
        packages = [*images, *(name for name in parts if name.endswith("-amd64"))]
        asked = [*self.options, "--no-all-versions", "show", *packages]
        shown = tools.run(["apt-cache", *asked], "apt-cache show")
        known = {record["Package"]: record for record in records(shown.stdout)}
        suites = self._suites(images)
        offers = (_offer(known[name], known, suites) for name in images if name in known)
        return {offer.release: offer for offer in offers if offer is not None}

    def _suites(self, images: Iterable[str]) -> dict[tuple[str, str], set[str]]:
        """(package, version) -> suites."""
        rows = tools.run(["apt-cache", *self.options, "madison", *images], "apt-cache madison")
        suites: dict[tuple[str, str], set[str]] = {}
        for row in rows.stdout.decode(errors="replace").splitlines():
            name, version, place = (part.strip() for part in row.split("|"))
            if place.endswith(" Packages"):  # "URL SUITE/COMPONENT ARCHITECTURE Packages"
                suite = place.split()[1].partition("/")[0]
                suites.setdefault((name, version), set()).add(suite)
        return suites

    def package(self, package: str) -> dict[str, str]:
        """Index record of any package, ``name`` (its newest version) or ``name=version``."""
        done = tools.run(["apt-cache", *self.options, "--no-all-versions", "show", package],
                         f"apt-cache show {package}")  # fmt: skip
        return next(records(done.stdout))

    def download_package(self, package: str, folder: Path) -> Path:
        """Fetch ``name`` or ``name=version`` into ``folder``, empty so far.

        apt refuses it if it is not authenticated. Raises LabSetupError when apt is offline or
        refuses, KernelSpecError when the file is not the one of the signed index.
        """
        wanted = self.package(package).get("SHA256", "")
        done = tools.complete(["apt-get", *self.options, "-q", "download", package], folder)
        files = list(folder.glob("*.deb"))
        if done.returncode or not files:
            errors = [line for line in done.stderr.decode(errors="replace").splitlines()
                      if line.startswith("E:")]  # fmt: skip
            reason = errors[0][2:].strip() if errors else f"status {done.returncode}"
            raise PackageGone(f"apt cannot download {package}: {reason}")
        actual = hashlib.sha256(files[0].read_bytes()).hexdigest()
        if not wanted or actual != wanted:
            raise KernelSpecError(f"{package}: the downloaded file does not match apt's index")
        return files[0]


def _offer(
    image: Mapping[str, str],
    known: Mapping[str, Mapping[str, str]],
    suites: Mapping[tuple[str, str], set[str]],
) -> Offer | None:
    """The kernel of an image package; None if it is none, or lacks a part."""
    name, depends = image["Package"], image.get("Depends", "")
    if re.search(r"\blinux-image-\d", depends):  # a name for the newest one of a series
        return None
    wanted = [image] if not parts(depends) else []
    for part, version in parts(depends):
        record = known.get(part, {})
        if record.get("Version") != version:
            return None
        wanted.append(record)
    return Offer(
        name.removeprefix("linux-image-"),
        image["Version"],
        tuple(sorted(suites.get((name, image["Version"]), ()))),
        sum(int(record["Size"]) for record in wanted),
        tuple(f"{record['Package']}={record['Version']}" for record in wanted),
        " ".join(record["SHA256"] for record in wanted),
    )


_OFFER: dict[str, object] = {
    **dict.fromkeys(("release", "version", "key"), TEXT),
    **dict.fromkeys(("suites", "packages"), TEXTS),
    "size": COUNT,
}
_NOTES = {"type": "array", "items": exactly([*_OFFER], **_OFFER)}


def _read_notes(path: Path) -> Iterator[Offer]:
    """Raises KvmnestError."""
    for entry in reading.value(reading.data(path), "notes of apt's answer", _NOTES, str(path)):
        entry["suites"], entry["packages"] = tuple(entry["suites"]), tuple(entry["packages"])
        yield Offer(**entry)


def _write_notes(path: Path, offers: Iterable[Offer]) -> None:
    replace(path, json.dumps([asdict(offer) for offer in offers]).encode())


def records(output: bytes) -> Iterator[dict[str, str]]:
    """Index records as apt-cache prints them: fields without their continuation lines."""
    for text in output.decode(errors="replace").strip().split("\n\n"):
        parts = (line.partition(":") for line in text.splitlines() if not line.startswith(" "))
        yield {key: value.strip() for key, sep, value in parts if sep}


def parts(depends: str) -> list[tuple[str, str]]:
    """The packages (name, version) that hold the kernel of an image package, if it does not."""
    return _PARTS.findall(depends)


def unpack(deb: Path, folder: Path) -> None:
    """Extract a .deb into ``folder``.

    Raises KernelSpecError if it is corrupt, LabSetupError if the disk is full.
    """
    _dpkg_deb(deb, "-x", str(deb), str(folder))


def control(deb: Path) -> dict[str, str]:
    """Fields of the control file of a .deb. Raises KernelSpecError if it is corrupt."""
    return next(records(_dpkg_deb(deb, "-f", str(deb))), {})


def _dpkg_deb(deb: Path, *arguments: str) -> bytes:
    command = [tools.find("dpkg-deb"), *arguments]
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
        if any("No space left on device" in line for line in lines):
            raise LabSetupError(f"no space left on the disk while unpacking {deb.name}")
        raise KernelSpecError(f"{deb} is not a usable Debian package: {lines[-1]}")
    return done.stdout


def fetch(apt: Apt, release: str, target: Path) -> None:
    """Download and unpack the packages of ``release``, which ``apt`` offers, into ``target``."""
    for package in apt.offers[release].packages:
        with scratch.folder() as unpacked:
            unpack(apt.download_package(package, Path(unpacked)), target)
