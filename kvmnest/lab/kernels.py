"""Turn a kernel SPEC into a kernel that the lab can boot, from the cache when it can.

A SPEC is a Debian version (``6.1.0-56``, ``6.12``, ``6.1.0-56-cloud-amd64``), ``newest`` or ``rc``,
the release of a kernel installed here, a ``.deb`` file or several (``A.deb,B.deb``), or a
directory: an unpacked package, .deb files, a kernel build tree, or simply a folder with a bzImage
or vmlinux and kvm modules.
"""

import contextlib
import hashlib
import marshal
import re
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from kvmnest import scratch
from kvmnest.lab import DEFAULT_KERNEL, apts, archive, cache, debian, modules, packages
from kvmnest.lab.decompress import vmlinux_of
from kvmnest.lab.errors import KernelSpecError, LabSetupError
from kvmnest.lab.image import KernelImage, flatten

MODULES = ("kvm", "kvm_intel")
_KEPT_KERNELS = 24  # some 60 MB each: a ladder of kernels is asked again and again
_DAY = 86_400.0
_FORMAT = 1
_BANNER = re.compile(rb"Linux version (\S+) \(")
_LARGEST = 2 << 30  # bytes; a vmlinux with all its debug information has less than one
_OLDEST = (5, 10)  # KVM lets user space filter and answer MSRs since then


@dataclass(frozen=True)
class Kernel:
    """A bootable kernel: release, module files by name, what is built in.

    ``key`` stands for its content, ``folder`` is its cache entry, ``end`` the first address
    after its own memory.
    """

    release: str
    key: str
    folder: Path
    end: int
    modules: Mapping[str, Path]
    builtin: frozenset[str]

    def image(self) -> KernelImage:
        """Read the flattened kernel (some 50 MB)."""
        base, end, entry = marshal.loads((self.folder / "meta").read_bytes())["image"]
        data, setup = (self.folder / "image").read_bytes(), (self.folder / "setup").read_bytes()
        return KernelImage(data, base, end, entry, setup)


def _load(folder: Path) -> Kernel:
    meta = marshal.loads((folder / "meta").read_bytes())
    files = modules.find(folder / "modules")
    _, end, _ = meta["image"]
    return Kernel(meta["release"], folder.name, folder, end, files, frozenset(meta["builtin"]))


def _release_in(image: bytes, vmlinux: bytes) -> str:
    """Release of a kernel: the bzImage's version field, or the banner inside vmlinux."""
    if image[:4] != b"\x7fELF":
        at = int.from_bytes(image[0x20E:0x210], "little") + 0x200
        return image[at : at + 256].split(b"\0")[0].split(b" ")[0].decode(errors="replace")
    banner = _BANNER.search(vmlinux)
    return banner[1].decode(errors="replace") if banner else "unknown"


def _refuse_old(kernel_file: Path, release: str) -> None:
    numbers = re.match(r"(\d+)\.(\d+)", release)
    if numbers and (int(numbers[1]), int(numbers[2])) < _OLDEST:
        oldest = ".".join(map(str, _OLDEST))
        raise KernelSpecError(
            f"{kernel_file} is Linux {release}; kvmnest needs the KVM of {oldest} or later"
        )


def _store(
    kernel_file: Path, found: Mapping[str, Path], builtin: frozenset[str], folder: Path
) -> None:
    """Fill a cache entry: flattened kernel, the KVM modules and what they depend on."""
    raw = kernel_file.read_bytes()
    try:
        vmlinux, setup = vmlinux_of(raw)
        image = flatten(vmlinux, setup)
    except KernelSpecError as e:
        raise KernelSpecError(f"{kernel_file}: {e}") from e
    release = _release_in(raw, vmlinux)
    _refuse_old(kernel_file, release)
    kept = folder / "modules"
    kept.mkdir()
    for name in MODULES:
        if name in found or name in builtin:
            for module in modules.load_order([name], found, builtin, str(kernel_file.parent)):
                shutil.copyfile(module.path, kept / module.path.name)
    meta = {
        "release": release,
        "image": (image.base, image.end, image.entry),
        "builtin": sorted(builtin),
    }
    (folder / "image").write_bytes(image.data)
    (folder / "setup").write_bytes(image.setup)
    (folder / "meta").write_bytes(marshal.dumps(meta))


def _kernel_in(folder: Path) -> Path | None:
    candidates = [
        folder / "arch/x86/boot/bzImage",
        folder / "bzImage",
        *sorted(folder.glob("vmlinuz*")),
        *sorted((folder / "boot").glob("vmlinuz-*")),
        *sorted(folder.glob("usr/lib/modules/*/vmlinuz")),
        *sorted(folder.glob("lib/modules/*/vmlinuz")),
        folder / "vmlinux",
    ]
    return next((path for path in candidates if path.is_file()), None)


def _kernel_file(folder: Path) -> Path:
    found = _kernel_in(folder)
    if found is None:
        raise KernelSpecError(f"{folder} holds no bzImage, vmlinuz or vmlinux")
    return found


def _from_folder(folder: Path) -> Kernel:
    places = [folder / "lib/modules", folder / "usr/lib/modules", folder / "arch/x86/kvm"]
    found = modules.find(folder / "virt/lib") if (folder / "virt/lib").is_dir() else {}
    existing = [place for place in places if place.is_dir()]
    for place in existing or [folder]:
        found |= modules.find(place)
    candidates = (folder / "modules.builtin", *folder.glob("**/modules/*/modules.builtin"))
    wanted = {n: p for n, p in found.items() if n in MODULES or not existing or len(found) < 64}
    return _from_files(_kernel_file(folder), found, wanted.values(), candidates)


def installed_releases(root: Path = Path("/")) -> list[str]:
    """Releases of the kernels installed on this machine with their modules."""
    files = (root / "boot").glob("vmlinuz-*")
    releases = [path.name.removeprefix("vmlinuz-") for path in files]
    return sorted(r for r in releases if (root / "lib/modules" / r).is_dir())


def _from_installed(release: str, root: Path = Path("/")) -> Kernel:
    folder = root / "lib/modules" / release
    found = modules.find(folder)
    wanted = [path for name, path in found.items() if name in MODULES]
    file = root / "boot" / f"vmlinuz-{release}"
    return _from_files(file, found, wanted, [folder / "modules.builtin"])


def _from_files(
    file: Path, found: Mapping[str, Path], wanted: Iterable[Path], listings: Iterable[Path]
) -> Kernel:
    """A kernel of loose files; ``wanted`` are the modules whose content tells it from others."""
    builtin = _builtin(listings)
    try:
        contents = [_content(file), *(_content(path) for path in sorted(wanted))]
    except PermissionError as e:
        raise KernelSpecError(
            f"{e.filename} cannot be read: make it readable, or run as root"
        ) from e
    hashes = [hashlib.sha256(content).digest() for content in contents]
    key = cache.digest([_FORMAT, *hashes, *sorted(builtin)])
    return _cached(key, lambda to: _store(file, found, builtin, to))


def _content(path: Path) -> bytes:
    size = path.stat().st_size
    if size > _LARGEST:
        raise KernelSpecError(f"{path} has {size >> 30} GiB, which no file of a kernel has")
    return path.read_bytes()


def _builtin(listings: Iterable[Path]) -> frozenset[str]:
    """Names of the modules that are part of the kernel, of the first list that is there."""
    text = next((_content(path) for path in listings if path.is_file()), b"")
    return modules.builtin_names(text.decode(errors="replace"))


def _cached(key: str, build: Callable[[Path], None]) -> Kernel:
    return _load(cache.entry("kernels", key, build, keep=_KEPT_KERNELS))


def _from_debs(debs: Sequence[Path]) -> Kernel:
    key = cache.digest([_FORMAT, *(deb.read_bytes() for deb in debs)])

    def build(to: Path) -> None:
        with scratch.folder() as unpacked:
            for deb in debs:
                debian.unpack(deb, Path(unpacked))
            try:
                _store_unpacked(Path(unpacked), to)
            except KernelSpecError as e:
                # The package is what the user knows, not where it was unpacked.
                names = ", ".join(map(str, debs))
                raise KernelSpecError(f"{names}: {str(e).replace(unpacked, 'it')}") from e

    return _cached(key, build)


def _store_unpacked(package: Path, to: Path) -> None:
    found = modules.find(package / "lib/modules") | modules.find(package / "usr/lib/modules")
    listings = list(package.glob("**/modules.builtin"))
    builtin = _builtin(listings)
    _store(_kernel_file(package), found, builtin, to)


def cached_releases() -> dict[str, str]:
    """Release -> cache key of the Debian kernels fetched before."""
    folder = cache.root() / "debian"
    keys = {path.name: _noted(path) for path in folder.glob("*-amd64")}
    whole = {k for k in keys.values() if k and cache.is_whole(cache.root() / "kernels" / k)}
    return {release: key for release, key in keys.items() if key in whole}


def _note(path: Path, text: str) -> None:
    cache.drop(path)
    path.write_text(text)


def _noted(path: Path) -> str:
    """A word that was written down; "" if it is damaged."""
    try:
        text = path.read_text(encoding="ascii")
    except (OSError, ValueError):
        return ""
    return text if re.fullmatch(r"[\w.+-]+", text) else ""


def _from_version(spec: str) -> Kernel:
    # Asking apt takes a second, so its last answer holds until its lists change or are old.
    notes = cache.root() / "debian"
    notes.mkdir(mode=0o700, exist_ok=True)
    stamps = [archive.system_stamp(), archive.stamp(apts.archive_folder())]
    answer = notes / f"answer-{cache.digest([spec, *stamps])}"
    cached = cached_releases()
    if answer.is_file() and time.time() - answer.stat().st_mtime < _DAY:
        release = _noted(answer)
        if release in cached:
            return _cached(cached[release], _gone)
    try:
        known = {release: apt for apt in reversed(apts.every()) for release in apt.offers}
    except LabSetupError as e:
        release = debian.match(spec, cached) or ""
        if not release:
            raise LabSetupError(f"no kernel {spec} in the cache, and {e}") from e
        return _cached(cached[release], _gone)
    release = debian.match(spec, known) or ""
    if not release:
        raise KernelSpecError(f"no kernel {spec} in Debian's archive (kvmnest kernels lists them)")
    apt = known[release]
    key = cache.digest([_FORMAT, apt.offers[release].key])

    def build(to: Path) -> None:
        with scratch.folder() as unpacked:
            cache.tell(f"fetching kernel {release} from Debian's archive, once: 5 to 30 s")
            debian.fetch(apt, release, Path(unpacked))
            _store_unpacked(Path(unpacked), to)

    kernel = _cached(key, build)
    _note(notes / release, key)
    for old in notes.glob("answer-*"):
        if _noted(old) in (release, ""):
            cache.drop(old)
    stamps[1] = archive.stamp(apts.archive_folder())  # asking may have renewed its lists
    _note(notes / f"answer-{cache.digest([spec, *stamps])}", release)
    return kernel


def _gone(_: Path) -> None:
    raise LabSetupError("another process emptied the lab's cache; run again")


def resolve(spec: str | None = None) -> Kernel:
    """Find and prepare the kernel that ``spec`` names (default: DEFAULT_KERNEL).

    Raises KernelSpecError if it names nothing usable, LabSetupError if a tool is missing or the
    package cannot be fetched.
    """
    spec = spec or DEFAULT_KERNEL
    path = Path(spec)
    if debs := packages.named(spec):
        return _from_debs(debs)
    if path.is_dir():
        if _kernel_in(path) is None and (debs := packages.inside(path)):
            return _from_debs(debs)
        return _from_folder(path)
    if spec in installed_releases():
        return _from_installed(spec)
    named = spec in (debian.NEWEST, debian.CANDIDATE) or re.match(r"\d+\.\d+", spec)
    if "/" in spec or not named:
        raise KernelSpecError(f"{spec}: no such directory, and no Debian kernel version")
    return _from_version(spec)


@dataclass(frozen=True)
class Available:
    """A kernel that can be had by its release.

    ``version`` is that of its package, ``suites`` are Debian's that hold it, ``size`` counts the
    bytes to download; all three are empty where the archive does not know it (any more).
    """

    release: str
    cached: bool
    installed: bool
    version: str = ""
    suites: tuple[str, ...] = ()
    size: int = 0


def available() -> list[Available]:
    """Kernels of the archive, of this machine and of the cache, oldest first.

    Only the latter two where apt cannot be asked.
    """
    cached, installed = cached_releases(), installed_releases()
    offers: dict[str, debian.Offer] = {}
    with contextlib.suppress(LabSetupError):
        offers = {
            name: offer for apt in reversed(apts.every()) for name, offer in apt.offers.items()
        }
    found = []
    for release in sorted({*offers, *cached, *installed}, key=debian.version_key):
        entry = Available(release, release in cached, release in installed)
        offer = offers.get(release)
        if offer is not None:
            entry = replace(entry, version=offer.version, suites=offer.suites, size=offer.size)
        found.append(entry)
    return found


def forget(release: str) -> str:
    """Drop a Debian kernel from the cache; returns its release. KernelSpecError if not there."""
    cached = cached_releases()
    name = debian.match(release, cached)
    if name is None:
        raise KernelSpecError(f"no kernel {release} in the cache")
    cache.drop(cache.root() / "kernels" / cached[name])
    (cache.root() / "debian" / name).unlink(missing_ok=True)
    return name


def between(first: str, last: str, *, here: bool = False) -> list[str]:
    """Debian's releases from one to another, both included, of the flavour of ``first``.

    ``here``: only those that are installed or that the system's own apt can install, without the
    cloud flavour, which has no drivers for hardware. Raises KernelSpecError if one of the two is
    not known, LabSetupError if apt cannot be asked. Empty if ``last`` is older.
    """
    known = {entry.release for entry in available()}
    if here:
        known &= {*apts.system().offers, *installed_releases()}
        known = {release for release in known if "-cloud-" not in release}
    ends = []
    for spec in (first, last):
        name = debian.match(spec, known)
        if name is None:
            hint = "apt-get update may help" if here else "kvmnest kernels lists them"
            where = "for this system's apt" if here else "in Debian's archive"
            raise KernelSpecError(f"no kernel {spec} {where} ({hint})")
        ends.append(name)
    cloud = "-cloud-" in ends[0]
    low, high = (debian.version_key(name) for name in ends)
    found = [
        name
        for name in known
        if ("-cloud-" in name) == cloud
        and "-rt-" not in name
        and low <= debian.version_key(name) <= high
    ]
    return sorted(found, key=debian.version_key)


def package_version(spec: str) -> str:
    """Version of Debian's package of a kernel ("6.1.176-1"); "" if the archive has it not."""
    versions = {entry.release: entry.version for entry in available() if entry.version}
    return versions.get(debian.match(spec, versions) or "", "")
