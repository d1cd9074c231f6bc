"""Turn a kernel SPEC into a kernel that the lab can boot, from the cache when it can.

A SPEC is a Debian version (``6.1.0-56``, ``6.12``, ``6.1.0-56-cloud-amd64``), a ``.deb`` file,
or a directory: an unpacked package, a kernel build tree, or simply a folder with a bzImage or
vmlinux and kvm modules.
"""

import hashlib
import marshal
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kvmnest.lab import cache, debian, modules
from kvmnest.lab.decompress import vmlinux_of
from kvmnest.lab.errors import KernelSpecError, LabSetupError
from kvmnest.lab.image import KernelImage, flatten

DEFAULT_SPEC = "6.1"
MODULES = ("kvm", "kvm_intel")
_FORMAT = 1
_BANNER = re.compile(rb"Linux version (\S+) \(")


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
    kept = folder / "modules"
    kept.mkdir()
    for name in MODULES:
        if name in found or name in builtin:
            for module in modules.load_order([name], found, builtin, str(kernel_file.parent)):
                shutil.copyfile(module.path, kept / module.path.name)
    meta = {
        "release": _release_in(raw, vmlinux),
        "image": (image.base, image.end, image.entry),
        "builtin": sorted(builtin),
    }
    (folder / "image").write_bytes(image.data)
    (folder / "setup").write_bytes(image.setup)
    (folder / "meta").write_bytes(marshal.dumps(meta))


def _kernel_file(folder: Path) -> Path:
    candidates = [
        folder / "arch/x86/boot/bzImage",
        folder / "bzImage",
        *sorted(folder.glob("vmlinuz*")),
        *sorted((folder / "boot").glob("vmlinuz-*")),
        folder / "vmlinux",
    ]
    for path in candidates:
        if path.is_file():
            return path
    raise KernelSpecError(f"{folder} holds no bzImage, vmlinuz or vmlinux")


def _from_folder(folder: Path) -> Kernel:
    kernel_file = _kernel_file(folder)
    places = [folder / "lib/modules", folder / "usr/lib/modules", folder / "arch/x86/kvm"]
    found = modules.find(folder / "virt/lib") if (folder / "virt/lib").is_dir() else {}
    existing = [place for place in places if place.is_dir()]
    for place in existing or [folder]:
        found |= modules.find(place)
    candidates = (folder / "modules.builtin", *folder.glob("**/modules/*/modules.builtin"))
    listings = [p for p in candidates if p.is_file()]
    builtin = modules.builtin_names(listings[0].read_text() if listings else "")
    wanted = {n: p for n, p in found.items() if n in MODULES or not existing or len(found) < 64}
    contents = [hashlib.sha256(p.read_bytes()).digest() for _, p in sorted(wanted.items())]
    key = cache.digest([_FORMAT, kernel_file.read_bytes(), *contents, *sorted(builtin)])
    return _load(cache.entry("kernels", key, lambda to: _store(kernel_file, found, builtin, to)))


def _from_deb(deb: Path) -> Kernel:
    key = cache.digest([_FORMAT, deb.read_bytes()])

    def build(to: Path) -> None:
        with tempfile.TemporaryDirectory(prefix="kvmnest-") as scratch:
            debian.unpack(deb, Path(scratch))
            try:
                _store_unpacked(Path(scratch), to)
            except KernelSpecError as e:
                # The package is what the user knows, not where it was unpacked.
                raise KernelSpecError(f"{deb}: {str(e).replace(scratch, 'it')}") from e

    return _load(cache.entry("kernels", key, build))


def _store_unpacked(package: Path, to: Path) -> None:
    found = modules.find(package / "lib/modules") | modules.find(package / "usr/lib/modules")
    listings = list(package.glob("**/modules.builtin"))
    builtin = modules.builtin_names(listings[0].read_text() if listings else "")
    _store(_kernel_file(package), found, builtin, to)


def cached_releases() -> dict[str, str]:
    """Release -> cache key of the Debian kernels fetched before."""
    folder = cache.root() / "debian"
    keys = {p.name: p.read_text() for p in folder.glob("*-amd64")} if folder.is_dir() else {}
    return {r: k for r, k in keys.items() if (cache.root() / "kernels" / k / "meta").is_file()}


def _choose(spec: str) -> tuple[debian.Apt, str] | None:
    """The apt that knows ``spec`` and the release it means; None if nobody does.

    The system's apt comes first; one of our own, with backports, when it does not know. Raises
    LabSetupError when neither can be asked.
    """
    apt = debian.Apt()
    release = debian.match(spec, apt.releases())
    if release is None:
        with cache.locked("apt"):
            apt = debian.private_apt(cache.root() / "apt")
        release = debian.match(spec, apt.releases())
    return None if release is None else (apt, release)


def _from_version(spec: str) -> Kernel:
    # Asking apt takes a second, so its last answer holds until its lists change.
    notes = cache.root() / "debian"
    notes.mkdir(mode=0o700, exist_ok=True)
    answer = notes / f"answer-{cache.digest([spec, debian.system_stamp()])}"
    cached = cached_releases()
    if answer.is_file() and answer.read_text() in cached:
        return _load(cache.entry("kernels", cached[answer.read_text()], _gone))
    try:
        chosen = _choose(spec)
    except LabSetupError as e:
        release = debian.match(spec, cached)
        if release is None:
            raise KernelSpecError(f"no kernel {spec} in the cache, and {e}") from e
        return _load(cache.entry("kernels", cached[release], _gone))
    if chosen is None:
        raise KernelSpecError(f"no kernel {spec} in Debian's archive (apt-get update may help)")
    apt, release = chosen
    key = cache.digest([_FORMAT, apt.record(release).get("SHA256", release)])

    def build(to: Path) -> None:
        with tempfile.TemporaryDirectory(prefix="kvmnest-") as scratch:
            debian.fetch(apt, release, Path(scratch))
            _store_unpacked(Path(scratch), to)

    kernel = _load(cache.entry("kernels", key, build))
    (notes / release).write_text(key)
    for old in notes.glob("answer-*"):
        if old.read_text() == release:
            old.unlink(missing_ok=True)
    answer.write_text(release)
    return kernel


def _gone(_: Path) -> None:
    raise LabSetupError("another process emptied the lab's cache; run again")


def resolve(spec: str | None = None) -> Kernel:
    """Find and prepare the kernel that ``spec`` names (default: Debian's newest 6.1).

    Raises KernelSpecError if it names nothing usable, LabSetupError if a tool is missing or the
    package cannot be fetched.
    """
    spec = spec or DEFAULT_SPEC
    path = Path(spec)
    if spec.endswith(".deb"):
        if not path.is_file():
            raise KernelSpecError(f"{spec}: no such file")
        return _from_deb(path)
    if path.is_dir():
        return _from_folder(path)
    if "/" in spec or not re.match(r"\d+\.\d+", spec):
        raise KernelSpecError(f"{spec}: no such directory, and no Debian kernel version")
    return _from_version(spec)


@dataclass
class Available:
    """A Debian kernel: in the archive (or only in the cache), and whether it is cached."""

    release: str
    cached: bool


def available() -> list[Available]:
    """Kernels that apt knows or the cache holds, oldest first; only the cache's without apt."""
    cached = cached_releases()
    try:
        known = set(debian.Apt().releases())
    except LabSetupError:
        known = set()
    releases = sorted(known | set(cached), key=debian.version_key)
    return [Available(release, release in cached) for release in releases]


def forget(release: str) -> str:
    """Drop a Debian kernel from the cache; returns its release. KernelSpecError if not there."""
    cached = cached_releases()
    name = debian.match(release, cached)
    if name is None:
        raise KernelSpecError(f"no kernel {release} in the cache")
    cache.drop(cache.root() / "kernels" / cached[name])
    (cache.root() / "debian" / name).unlink(missing_ok=True)
    return name


def between(first: str, last: str, *, plain: bool = False) -> list[str]:
    """Debian's releases from one to another, both included, of the flavour of ``first``.

    ``plain`` leaves the cloud flavour out. Raises KernelSpecError if apt knows one of them not.
    Empty if ``last`` is older.
    """
    known = {e.release for e in available() if not (plain and "-cloud-" in e.release)}
    ends = []
    for spec in (first, last):
        name = debian.match(spec, known)
        if name is None:
            raise KernelSpecError(f"no kernel {spec} in Debian's archive (apt-get update may help)")
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


def package_version(release: str) -> str:
    """Version of Debian's package of a kernel ("6.1.176-1"); "" if apt does not know it."""
    try:
        chosen = _choose(release)
        return chosen[0].record(release).get("Version", "") if chosen else ""
    except LabSetupError:
        return ""
