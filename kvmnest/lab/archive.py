"""Debian's archive as it is now, asked by an apt of our own, which needs no root.

The system's own lists may be months old, and know one suite only.
"""

import re
import shutil
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from kvmnest.lab import cache, tools
from kvmnest.lab.debian import Apt
from kvmnest.lab.errors import LabSetupError

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_SOURCE = re.compile(r"'(\S+)/dists/([a-z]+)(-security|-updates|-backports)?/InRelease'")

# Where kernels for amd64 are; which of them a mirror has is seen when it is asked.
_STABLE = ("bookworm", "trixie")
_SUITES = (
    *(f"{name}{kind}" for name in _STABLE for kind in ("", "-updates", "-backports")),
    "sid",
    "experimental",
)
_SECURITY = tuple(f"{name}-security" for name in _STABLE)

_DAY, _MINUTE = 86_400.0, 60.0
_UPDATE_LIMIT = 300.0  # seconds; some 8 s with a good connection
_ROOM = 300  # MiB that the lists and apt's index of them take


def system_stamp() -> str:
    """What tells that the system's apt may now know other packages: times of its lists."""
    lists = Path("/var/lib/apt/lists")
    try:
        return f"{lists.stat().st_mtime_ns}"
    except OSError:
        return "none"


def ask(folder: Path, *, mend: bool = True) -> Apt:
    """An apt with its lists in ``folder``, which are brought up to date once a day.

    With ``mend`` lists that apt cannot read are fetched again; the old ones stay where that does
    not help. Raises LabSetupError if they cannot be fetched and there are no older ones: no Debian
    mirror, no keyring, no connection, no room.
    """
    updated, failed = folder / "updated", folder / "failed"
    aside = folder.with_name(f"{folder.name}.old")
    if mend and aside.exists():  # a run that was killed while it fetched new ones
        cache.drop(folder)
        aside.rename(folder)
    # Without a connection each attempt may take long.
    if _age(updated) >= _DAY and _age(failed) > _MINUTE:
        try:
            _update(folder)
            updated.touch()
            failed.unlink(missing_ok=True)
        except LabSetupError as error:
            folder.mkdir(parents=True, exist_ok=True)
            failed.write_text(str(error))
    if not updated.is_file():
        raise LabSetupError(failed.read_text(errors="replace"))
    apt = Apt(private_options(folder), folder / f"offers-{stamp(folder)}")
    why = LabSetupError("Debian's package lists name no kernel")
    try:
        if apt.offers:
            return apt
    except LabSetupError as error:
        why = error
    if not mend or _age(failed) <= _MINUTE:
        raise why
    # apt fails for many reasons, and without a connection there would be no lists at all.
    cache.tell(f"{folder} is damaged or old, and made again")
    folder.rename(aside)
    try:
        apt = ask(folder, mend=False)
    except LabSetupError:
        cache.drop(folder)
        aside.rename(folder)
        failed.write_text(str(why))
        raise why from None
    cache.drop(aside)
    return apt


def _update(folder: Path) -> None:
    free = shutil.disk_usage(folder.parent).free >> 20
    if not (folder / "updated").is_file() and free < _ROOM:
        raise LabSetupError(
            f"{folder.parent} has {free} MiB free; Debian's package lists need {_ROOM} MiB"
            " (XDG_CACHE_HOME names another place)"
        )
    print("kvmnest: reading Debian's package lists (30 MB)", file=sys.stderr, flush=True)
    write_sources(folder, "deb", _suites())
    for old in folder.glob("offers-*"):
        old.unlink(missing_ok=True)
    apt = Apt(private_options(folder))
    try:
        tools.run(["apt-get", *apt.options, "-q", "update"], "apt-get update", _UPDATE_LIMIT)
    except LabSetupError:
        # A suite that left the archive, or never was on this mirror, is no reason to go without.
        present = [where for where in _suites() if _has_list(folder, where[1])]
        if not any(suite in _STABLE for _, suite in present):
            raise
        write_sources(folder, "deb", present)
        tools.run(["apt-get", *apt.options, "-q", "update"], "apt-get update", _UPDATE_LIMIT)


def _has_list(folder: Path, suite: str) -> bool:
    return any((folder / "state/lists").glob(f"*_dists_{suite}_InRelease"))


def _suites() -> list[tuple[str, str]]:
    """(mirror, suite) of what there may be."""
    bases = mirrors()
    found = [(bases["main"][0], suite) for suite in _SUITES]
    if "security" in bases:
        found += [(bases["security"][0], suite) for suite in _SECURITY]
    return found


def _age(path: Path) -> float:
    try:
        return abs(time.time() - path.stat().st_mtime)
    except OSError:
        return float("inf")


def stamp(folder: Path) -> str:
    """What tells that the lists of ``ask`` changed."""
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
        "-oDir::Cache::srcpkgcache=",
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


def write_sources(folder: Path, kind: str, sources: Iterable[tuple[str, str]]) -> None:
    """Set up the apt of ``folder``: ``kind`` is "deb" or "deb-src", each source address, suite.

    Only Debian's archive keyring is trusted.
    """
    for sub in ("state/lists/partial", "cache/archives/partial"):
        (folder / sub).mkdir(parents=True, exist_ok=True)
    lines = [f"{kind} [signed-by={KEYRING}] {uri} {suite} main\n" for uri, suite in sources]
    (folder / "sources.list").write_text("".join(lines))
    (folder / "status").touch()
