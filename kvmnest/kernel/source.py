"""What it takes to build KVM's modules for a Debian kernel: headers, build tools and sources.

All of it comes as packages through apt, which checks their signatures, and is unpacked into the
cache; nothing is installed. Only ``arch/x86/kvm`` and ``virt/kvm`` of the source are kept.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from kvmnest import scratch
from kvmnest.errors import HarnessError
from kvmnest.kernel import build_tools
from kvmnest.lab import apts, cache, debian, tools
from kvmnest.lab.errors import LabSetupError

_FORMAT = 2
_FOLDERS = ("arch/x86/kvm", "virt/kvm")
_PACKAGE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_SERIES = re.compile(r"\d+\.\d+")

# What Debian's compiler of a newer suite can do (gcc 14, 15, 15, 15) and an older one, which the
# headers must then not ask for. A newer compiler does without as well: functions are aligned by
# another option, and the others are hints for its checks.
_NEWER_COMPILERS = (
    "CC_HAS_MIN_FUNCTION_ALIGNMENT",
    "CC_HAS_COUNTED_BY",
    "CC_HAS_COUNTED_BY_PTR",
    "CC_HAS_MULTIDIMENSIONAL_NONSTRING",
)


@dataclass(frozen=True)
class KernelSource:
    """Unpacked packages of one kernel release, all of the same package version.

    ``headers`` is the folder to give to ``make -C``; ``tree`` holds the KVM folders as shipped;
    ``compiler`` is the program that the kernel was built with, or gcc if that is not installed;
    ``key`` names the content.
    """

    release: str
    version: str
    headers: Path
    tree: Path
    compiler: str
    key: str


def prepare(release: str, apt: debian.Apt | None = None) -> KernelSource:
    """Fetch and unpack what belongs to a kernel release such as "7.3.4+deb13-cloud-amd64".

    Raises LabSetupError if apt does not have it (a kernel that is not Debian's, or one whose
    headers or source are no longer in the archive), or if a build tool is missing.
    """
    # Before what is fetched: a kernel's source is 170 MB.
    build_tools.require_programs(release)
    found = _noted(release)
    if found is None:
        found = _fetch(release, apt or apts.of(release))
    build_tools.require(found.headers, release)
    return found


def _fetch(release: str, apt: debian.Apt) -> KernelSource:
    package = f"linux-headers-{release}"
    series = _SERIES.match(release)
    try:
        record = apt.package(package)
    except LabSetupError as error:
        raise LabSetupError(
            f"modules for {release} need its headers: apt knows no {package}"
        ) from error
    if series is None:
        raise LabSetupError(f"{release} is not a release of a kernel")
    version = record["Version"]
    wanted = [f"{package}={version}"]
    for depends in record.get("Depends", "").split(","):
        name = _PACKAGE.match(depends.strip())
        if (name and name[0].endswith("-common")) or (name and name[0].startswith("linux-kbuild-")):
            wanted.append(f"{name[0]}={version}")
    source = f"linux-source-{series[0]}={version}"
    hashes = [_hash(apt, name, release) for name in (*wanted, source)]
    key = cache.digest([_FORMAT, release, *_NEWER_COMPILERS, *hashes])

    def build(folder: Path) -> None:
        for name in wanted:
            _unpack(apt, name, folder)
        _complete_headers(folder, release)
        build_tools.make_runnable(folder, lambda name, to: _unpack(apt, name, to))
        with scratch.folder() as unpacked:
            _unpack(apt, source, Path(unpacked))
            archives = list(Path(unpacked).glob("usr/src/linux-source-*.tar.*"))
            if not archives:
                raise LabSetupError(f"{source} holds no kernel source")
            top = archives[0].name.partition(".tar")[0]
            tree = folder / "tree"
            tree.mkdir()
            names = [f"{top}/{name}" for name in _FOLDERS]
            tools.find("xz")
            tools.run(
                ["tar", "-xf", str(archives[0]), "-C", str(tree), "--strip-components=1", *names],
                f"unpacking {archives[0].name}",
            )
        (folder / "version").write_text(version)

    cache.entry("kernel-sources", key, build)
    notes = cache.root() / "kernel-releases"
    notes.mkdir(mode=0o700, exist_ok=True)
    (notes / release).write_text(key)
    found = _noted(release)
    if found is None:
        raise HarnessError(f"the cache lost the source of {release} at once")
    return found


def _hash(apt: debian.Apt, package: str, release: str) -> str:
    """Hash of ``name=version``. Raises LabSetupError if the archive has it no longer."""
    try:
        return apt.package(package).get("SHA256", package)
    except LabSetupError as error:
        name, _, version = package.partition("=")
        raise LabSetupError(
            f"modules for {release} need {name} {version}, which apt no longer knows"
        ) from error


def _noted(release: str) -> KernelSource | None:
    """The source in the cache that an earlier call prepared."""
    try:
        key = (cache.root() / "kernel-releases" / release).read_text(encoding="ascii")
        folder = cache.root() / "kernel-sources" / key
        if not cache.is_whole(folder):
            return None
        headers = folder / "usr/src" / f"linux-headers-{release}"
        version = (folder / "version").read_text()
        settings = (headers / ".kernelvariables").read_text()
    except (OSError, ValueError):  # not there, or damaged
        return None
    compiler = build_tools.compiler(settings)
    return KernelSource(release, version, headers, folder / "tree", compiler, key)


def _unpack(apt: debian.Apt, package: str, folder: Path) -> None:
    with scratch.folder() as unpacked:
        # apt's own user may write into a folder of root only if it is allowed to enter it.
        Path(unpacked).chmod(0o755)
        debian.unpack(apt.download_package(package, Path(unpacked)), folder)


def _complete_headers(folder: Path, release: str) -> None:
    """Make the headers work where they are, and with an older compiler.

    Their makefile names the places of an installation.
    """
    headers = folder / "usr/src" / f"linux-headers-{release}"
    makefile = headers / "Makefile"
    common = re.search(r"^include /usr/src/(\S+/Makefile)$", makefile.read_text(), re.MULTILINE)
    if common is None or not (folder / "usr/src" / common[1]).is_file():
        raise LabSetupError(f"{makefile} is not what Debian's kernel headers contain")
    makefile.write_text(
        "here := $(dir $(abspath $(lastword $(MAKEFILE_LIST))))\n"
        f"KBUILD_OUTPUT := $(here)\ninclude $(here)../{common[1]}\n"
    )
    for name in ("include/config/auto.conf", "include/generated/autoconf.h"):
        lines = (headers / name).read_text().splitlines(keepends=True)
        wanted = re.compile(rf"(#define )?CONFIG_({'|'.join(_NEWER_COMPILERS)})[ =]")
        (headers / name).write_text("".join(line for line in lines if not wanted.match(line)))
    shutil.rmtree(folder / "lib", ignore_errors=True)
