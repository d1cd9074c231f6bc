"""The lab's cache: entries named by a digest of what they are made from.

An entry is a directory that appears whole or not at all (built beside, written to the disk, then
renamed), so a run that is killed, or two runs at once, never leave or see half of one. A kernel
under test may crash the host, and disks fill up: what an entry held when it was made stands in its
manifest, and one that differs is dropped and made again.
"""

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import json
import os
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from kvmnest import reading
from kvmnest.errors import KvmnestError
from kvmnest.lab.errors import LabSetupError

_FULL = (errno.ENOSPC, errno.EDQUOT)
_KEEP = 6  # entries of one kind; the oldest used go first
_MANIFEST = "manifest.json"
_MOST_LISTED = 64  # files; the trees that kernels are built in are not checked
# MiB on the disk that one entry takes, rounded up, and those of a kind that is not listed.
_ROOM = {
    "kernels": 80,
    "booted": 200,
    "with-kvm": 200,
    "loaded": 200,
    "kernel-sources": 200,
    "kvm-trees": 100,
}
_ROOM_OF_OTHERS = 30
_ROOM_UNPACKED = 500  # the packages of a kernel
#: What takes long to make, and about how long: told on stderr, since nothing else shows meanwhile.
_SLOW = {
    "kernel-sources": "fetching a kernel's sources and headers, once: 30 s to a few minutes",
    "kvm-trees": "compiling KVM of a kernel, once: about a minute",
}
_SAMPLE, _SAMPLES = 4096, 64  # of larger files so many places of so many bytes are checked


def root() -> Path:
    """The cache directory, created private to the user. Raises LabSetupError if it cannot be."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    path = Path(base) / "kvmnest"
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if path.stat().st_uid != os.getuid():
            raise LabSetupError(
                f"cache directory {path} belongs to another user; set XDG_CACHE_HOME"
            )
        path.chmod(0o700)
    except OSError as e:
        raise LabSetupError(f"cannot use cache directory {path}: {e.strerror}") from e
    return path


def digest(parts: Iterable[object]) -> str:
    """Key of an entry: hash of the text or bytes of ``parts``, in order."""
    state = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode("utf-8", "surrogateescape")
        state.update(len(data).to_bytes(8, "little"))
        state.update(data)
    return state.hexdigest()[:32]


@contextlib.contextmanager
def locked(name: str) -> Iterator[None]:
    """Hold the cache's lock ``name``: one builder of a thing at a time."""
    path = root() / f"{name}.lock"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def describe(error: OSError, doing: str) -> str:
    """One line for an OSError while ``doing`` something; a full disk is named as such."""
    if error.errno in _FULL:
        return f"no space left on the disk while {doing}: {error.filename or ''}".rstrip(": ")
    return f"{doing}: {error.strerror or error}" + (f": {error.filename}" if error.filename else "")


def _no_room(kind: str, error: OSError) -> str:
    """One line for an entry that a full disk has no room for: how much it takes, and where."""
    places = (
        (root(), _ROOM.get(kind, _ROOM_OF_OTHERS), "XDG_CACHE_HOME"),
        (Path(tempfile.gettempdir()), _ROOM_UNPACKED, "TMPDIR"),
    )
    for place, needed, variable in places:
        free = shutil.disk_usage(place).free >> 20
        if free < needed:
            return (
                f"no space left on the disk: {place} has {free} MiB free, {kind} needs {needed} MiB"
                f" ({variable} names another place)"
            )
    return describe(error, f"preparing {kind} in the cache")


def tell(text: str) -> None:
    """Write a line to stderr about what the user now waits for."""
    with contextlib.suppress(OSError, ValueError):  # nobody reads it
        print(f"kvmnest: {text}", file=sys.stderr, flush=True)


def entry(kind: str, key: str, build: Callable[[Path], None], *, keep: int = _KEEP) -> Path:
    """Directory of entry ``key``; if absent, ``build(empty directory)`` makes it.

    Of this kind the ``keep`` entries used last stay.

    Raises LabSetupError when the disk is full or the cache is not writable; whatever ``build``
    raises leaves no entry behind.
    """
    final = _place(kind, key)
    if not is_whole(final):
        with locked(kind):
            if not is_whole(final):
                _drop_damaged(final)
                if kind in _SLOW:
                    tell(_SLOW[kind])
                _make(final, build, keep)
    with contextlib.suppress(OSError):
        os.utime(final)
    return final


def _place(kind: str, key: str) -> Path:
    # Of an empty name the place would be a whole kind, or the cache, and be dropped as damaged.
    assert all((kind, key)), f"an entry of the cache has no name: {kind!r} {key!r}"
    return root() / kind / key


def existing(kind: str, key: str) -> Path | None:
    """Directory of entry ``key`` if it is there and whole; it counts as used."""
    folder = _place(kind, key)
    if not is_whole(folder):
        if not os.path.lexists(folder):
            return None
        with locked(kind):  # another run may have put it there just now
            if not is_whole(folder):
                _drop_damaged(folder)
                return None
    with contextlib.suppress(OSError):
        os.utime(folder)
    return folder


def drop(folder: Path) -> None:
    """Remove an entry that turned out to be useless, or whatever else is in its place."""
    _seen_whole.discard(folder)
    if folder.is_dir() and not folder.is_symlink():
        shutil.rmtree(folder, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            folder.unlink()


def _drop_damaged(folder: Path) -> None:
    if os.path.lexists(folder):
        print(f"kvmnest: {folder} is damaged or old, and made again", file=sys.stderr, flush=True)
        drop(folder)


#: Entries that this process has checked, so that it does so once.
_seen_whole: set[Path] = set()


def is_whole(folder: Path) -> bool:
    """Whether an entry is there, with all that its manifest lists."""
    if folder in _seen_whole:
        return folder.is_dir()
    try:
        listed = reading.parsed(reading.data(folder / _MANIFEST))
        whole = all(_facts(folder / name) == facts for name, facts in listed.items())
    except (OSError, ValueError, AttributeError, KvmnestError):
        return False
    if whole:
        _seen_whole.add(folder)
    return whole


def _facts(path: Path) -> list[int]:
    """Size and checksum of a file, or of samples all over a large one."""
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        if size <= _SAMPLE * _SAMPLES:
            return [size, zlib.crc32(file.read())]
        checksum = 0
        for number in range(_SAMPLES):
            at = number * (size - _SAMPLE) // (_SAMPLES - 1)
            checksum = zlib.crc32(os.pread(file.fileno(), _SAMPLE, at), checksum)
        return [size, checksum]


def _finish(folder: Path) -> None:
    """Write the manifest of a new entry, and all of it to the disk."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    listed = {}
    if len(files) <= _MOST_LISTED:
        listed = {str(path.relative_to(folder)): _facts(path) for path in files}
    (folder / _MANIFEST).write_text(json.dumps(listed))
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # One call for all files: to sync the thousands of a source one by one takes minutes.
        if ctypes.CDLL(None, use_errno=True).syncfs(fd):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(folder))
    finally:
        os.close(fd)


def _make(final: Path, build: Callable[[Path], None], keep: int) -> None:
    try:
        final.parent.mkdir(mode=0o700, exist_ok=True)
        _expire(final.parent, keep)
        work = Path(tempfile.mkdtemp(prefix=".new-", dir=final.parent))
        try:
            build(work)
            _finish(work)
            work.rename(final)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
    except OSError as e:
        kind = final.parent.name
        if e.errno in _FULL:
            raise LabSetupError(_no_room(kind, e)) from e
        raise LabSetupError(describe(e, f"preparing {kind} in the cache")) from e


def _expire(folder: Path, keep: int) -> None:
    """Drop leftovers of killed builds and all but the latest used entries."""
    for stale in folder.glob(".new-*"):
        shutil.rmtree(stale, ignore_errors=True)
    entries = sorted(folder.iterdir(), key=lambda p: p.stat().st_mtime, reverse=True)
    for old in entries[keep:]:
        shutil.rmtree(old, ignore_errors=True)
