"""Debian's kernel packages: which exist, fetching one with its signature checked by apt."""

import hashlib
import re
import subprocess
import tempfile
from collections.abc import Iterable
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


class Apt:
    """The system's apt, or a private one whose lists live in a folder of ours."""

    def __init__(self, options: Iterable[str] = ()) -> None:
        """Use apt with extra ``options``."""
        self._options = (*SECURE, *options)

    def releases(self) -> list[str]:
        """Releases of the kernel images that apt knows."""
        done = tools.run(["apt-cache", *self._options, "pkgnames", "linux-image-"], "apt-cache")
        found = (_NAME.match(name) for name in done.stdout.decode().split())
        return [name[1] for name in found if name is not None]

    def record(self, release: str) -> dict[str, str]:
        """The image package's newest index record (signed, through the archive's Release file)."""
        return self.package(f"linux-image-{release}")

    def package(self, package: str) -> dict[str, str]:
        """Index record of any package, ``name`` (its newest version) or ``name=version``."""
        done = tools.run(["apt-cache", *self._options, "--no-all-versions", "show", package],
                         f"apt-cache show {package}")  # fmt: skip
        lines = done.stdout.decode(errors="replace").split("\n\n")[0].splitlines()
        parts = (line.partition(":") for line in lines if not line.startswith(" "))
        return {key: value.strip() for key, sep, value in parts if sep}

    def download(self, release: str, folder: Path) -> Path:
        """Fetch the image package into ``folder``; see ``download_package``."""
        return self.download_package(f"linux-image-{release}", folder)

    def download_package(self, package: str, folder: Path) -> Path:
        """Fetch ``name`` or ``name=version`` into ``folder``, empty so far.

        apt refuses it if it is not authenticated. Raises LabSetupError when apt is offline or
        refuses, KernelSpecError when the file is not the one of the signed index.
        """
        wanted = self.package(package).get("SHA256", "")
        command = [tools.find("apt-get"), *self._options, "-q", "download", package]
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


def unpack(deb: Path, folder: Path) -> None:
    """Extract a .deb into ``folder``. Raises KernelSpecError if it is corrupt."""
    program = tools.find("dpkg-deb")
    done = subprocess.run([program, "-x", str(deb), str(folder)], capture_output=True, check=False)
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
        raise KernelSpecError(f"{deb} is not a usable Debian package: {lines[-1]}")


_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_SOURCE = re.compile(r"'(\S+)/dists/([a-z]+)(-security|-updates|-backports)?/InRelease'")


def system_stamp() -> str:
    """What tells that the system's apt may now know other packages: times of its lists."""
    lists = Path("/var/lib/apt/lists")
    try:
        return f"{lists.stat().st_mtime_ns}"
    except OSError:
        return "none"


def private_apt(folder: Path) -> Apt:
    """An apt of our own with lists in ``folder``, brought up to date; needs no root.

    It uses the mirrors that the system is set up for, with security and backports added, and
    trusts Debian's archive keyring only. Raises LabSetupError if there is no Debian mirror, no
    keyring, or no connection.
    """
    if not _KEYRING.is_file():
        raise LabSetupError(f"{_KEYRING} not found: apt-get install debian-archive-keyring")
    done = tools.run(["apt-get", "update", "--print-uris"], "apt-get update --print-uris")
    bases: dict[str, tuple[str, str]] = {}
    for uri, codename, kind in _SOURCE.findall(done.stdout.decode(errors="replace")):
        if "debian" in uri:
            bases["security" if kind == "-security" else "main"] = (uri, codename)
    if "main" not in bases:
        raise LabSetupError("apt has no Debian mirror set up (see sources.list(5))")
    uri, codename = bases["main"]
    sources = [(uri, codename + suffix) for suffix in ("", "-updates", "-backports")]
    if "security" in bases:
        sources.append((bases["security"][0], f"{codename}-security"))
    for sub in ("state/lists/partial", "cache/archives/partial"):
        (folder / sub).mkdir(parents=True, exist_ok=True)
    lines = [f"deb [signed-by={_KEYRING}] {uri} {suite} main\n" for uri, suite in sources]
    (folder / "sources.list").write_text("".join(lines))
    (folder / "status").touch()
    options = (
        f"-oDir::Etc::sourcelist={folder}/sources.list",
        "-oDir::Etc::sourceparts=/dev/null",
        f"-oDir::State={folder}/state",
        f"-oDir::State::lists={folder}/state/lists",
        f"-oDir::State::status={folder}/status",
        f"-oDir::Cache={folder}/cache",
        "-oAPT::Sandbox::User=",
        "-oAcquire::Languages=none",
    )
    tools.run(["apt-get", *SECURE, *options, "-q", "update"], "apt-get update")
    return Apt(options)


def fetch(apt: Apt, release: str, target: Path) -> None:
    """Download and unpack the image package of ``release`` into ``target``."""
    with tempfile.TemporaryDirectory(prefix="kvmnest-") as scratch:
        unpack(apt.download(release, Path(scratch)), target)
