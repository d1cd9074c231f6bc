"""What it takes to build KVM's modules for a Debian kernel: headers, build tools and sources.

All of it comes as packages through apt, which checks their signatures, and is unpacked into the
cache; nothing is installed. Only ``arch/x86/kvm`` and ``virt/kvm`` of the source are kept.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from kvmnest.errors import HarnessError
from kvmnest.lab import cache, debian, kernels, tools
from kvmnest.lab.errors import LabSetupError

_FORMAT = 1
_FOLDERS = ("arch/x86/kvm", "virt/kvm")
_PACKAGE = re.compile(r"[a-z0-9][a-z0-9.+-]*")


@dataclass(frozen=True)
class KernelSource:
    """Unpacked packages of one kernel release, all of the same package version.

    ``headers`` is the folder to give to ``make -C``; ``tree`` holds the KVM folders as shipped;
    ``compiler`` is the program that the kernel was built with; ``key`` names the content.
    """

    release: str
    version: str
    headers: Path
    tree: Path
    compiler: str
    key: str


def prepare(release: str, apt: debian.Apt | None = None) -> KernelSource:
    """Fetch and unpack what belongs to a kernel release such as "6.1.0-56-cloud-amd64".

    Raises LabSetupError if apt does not have it (a kernel that is not Debian's, or one whose
    headers or source are no longer in the archive), or if a build tool is missing.
    """
    found = _noted(release)
    if found is None:
        found = _fetch(release, apt or kernels.apt_of(release))
    _require_tools(found)
    return found


def _fetch(release: str, apt: debian.Apt) -> KernelSource:
    package = f"linux-headers-{release}"
    try:
        record = apt.package(package)
    except LabSetupError as error:
        raise LabSetupError(
            f"modules for {release} need its headers: apt knows no {package}"
        ) from error
    version = record["Version"]
    series = ".".join(release.split(".")[:2])
    wanted = [f"{package}={version}"]
    for depends in record.get("Depends", "").split(","):
        name = _PACKAGE.match(depends.strip())
        if (name and name[0].endswith("-common")) or (name and name[0].startswith("linux-kbuild-")):
            wanted.append(f"{name[0]}={version}")
    source = f"linux-source-{series}={version}"
    hashes = [apt.package(name).get("SHA256", name) for name in (*wanted, source)]
    key = cache.digest([_FORMAT, release, *hashes])

    def build(folder: Path) -> None:
        for name in wanted:
            _unpack(apt, name, folder)
        _complete_headers(folder, release)
        with tempfile.TemporaryDirectory(prefix="kvmnest-") as scratch:
            _unpack(apt, source, Path(scratch))
            archives = list(Path(scratch).glob("usr/src/linux-source-*.tar.*"))
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


def _noted(release: str) -> KernelSource | None:
    """The source in the cache that an earlier call prepared."""
    try:
        key = (cache.root() / "kernel-releases" / release).read_text()
    except OSError:
        return None
    folder = cache.root() / "kernel-sources" / key
    if not (folder / "version").is_file():
        return None
    headers = folder / "usr/src" / f"linux-headers-{release}"
    version = (folder / "version").read_text()
    return KernelSource(release, version, headers, folder / "tree", _compiler(headers), key)


def _unpack(apt: debian.Apt, package: str, folder: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="kvmnest-") as scratch:
        # apt's own user may write into a folder of root only if it is allowed to enter it.
        Path(scratch).chmod(0o755)
        debian.unpack(apt.download_package(package, Path(scratch)), folder)


def _complete_headers(folder: Path, release: str) -> None:
    """Make the headers work where they are: their makefile names the place of an installation."""
    headers = folder / "usr/src" / f"linux-headers-{release}"
    makefile = headers / "Makefile"
    included = re.fullmatch(r"include /usr/src/(\S+/Makefile)\s*", makefile.read_text())
    if included is None or not (folder / "usr/src" / included[1]).is_file():
        raise LabSetupError(f"{makefile} is not what Debian's kernel headers contain")
    makefile.write_text(f"include $(dir $(lastword $(MAKEFILE_LIST)))../{included[1]}\n")
    shutil.rmtree(folder / "lib", ignore_errors=True)


def _compiler(headers: Path) -> str:
    settings = (headers / ".kernelvariables").read_text()
    found = re.search(r"\bgcc-\d+\b", settings)
    return found[0] if found else "gcc"


def _require_tools(source: KernelSource) -> None:
    """Raise LabSetupError naming the packages of the build tools that are missing."""
    missing = [name for name in ("make", source.compiler, "ld", "bc") if not shutil.which(name)]
    if missing:
        packages = sorted({"binutils" if name == "ld" else name for name in missing})
        raise LabSetupError(
            f"building KVM for {source.release} needs {', '.join(missing)}:"
            f" apt-get install {' '.join(packages)}"
        )
    check = source.headers / "scripts/basic/fixdep"
    try:
        subprocess.run([check], capture_output=True, check=False)
    except OSError as error:
        raise LabSetupError(f"the kernel's build tools do not run here: {error}") from error
