"""The cache after a crashed host or a full disk: what is damaged is made again, with one line.

``KVMNEST_DAMAGED_CACHE=1`` also runs something after every damage to every file, which takes a
quarter of an hour.
"""

import itertools
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle
from pathlib import Path

import pytest
from damages import cut, empty, junk, zero

from kvmnest.kernel import build as kernel_build
from kvmnest.kernel import source
from kvmnest.lab import cache, debian, saved, snapshot
from kvmnest.lab.machine import Lab


def missing(path: Path) -> None:
    path.unlink()


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES = (zero, cut, empty, junk, missing, folder)


#: A command of the guest that shows that KVM is there.
GUEST = ["python3", "-c", "import os; print(os.path.exists('/dev/kvm'))"]


@pytest.fixture
def private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    forget()
    return tmp_path / "kvmnest"


def forget() -> None:
    """As in a new process."""
    cache._seen_whole.clear()


def build(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "sub/small").write_bytes(b"small")
    (folder / "large").write_bytes(os.urandom(1 << 20))


@pytest.mark.parametrize("name", ["sub/small", "large", "manifest.json"])
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
def test_a_damaged_entry(
    private: Path, capfd: pytest.CaptureFixture[str], damage: Callable[[Path], None], name: str
) -> None:
    entry = cache.entry("kind", "key", build)
    damage(entry / name)
    forget()
    assert cache.entry("kind", "key", build) == entry
    assert (entry / "sub/small").read_bytes() == b"small"
    assert capfd.readouterr().err == f"kvmnest: {entry} is damaged or old, and made again\n"
    forget()
    cache.entry("kind", "key", lambda to: pytest.fail("it is whole"))
    damage(entry / name)
    forget()
    assert cache.existing("kind", "key") is None
    assert not entry.exists()


@pytest.mark.parametrize("what", ["file", "dangling link"])
def test_something_else_in_the_place_of_an_entry(private: Path, what: str) -> None:
    place = cache.entry("kind", "key", build)
    shutil.rmtree(place)
    if what == "file":
        place.write_bytes(b"x")
    else:
        place.symlink_to("/nonexistent")
    forget()
    assert cache.entry("kind", "key", build).is_dir()


def test_a_build_that_fails_leaves_nothing(private: Path) -> None:
    def broken(to: Path) -> None:
        build(to)
        raise OSError(28, "No space left on device")

    with pytest.raises(cache.LabSetupError, match="no space left on the disk"):
        cache.entry("kind", "key", broken)
    assert list((private / "kind").iterdir()) == []


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the parts of the real cache that a run uses, all there, and of no older ones."""
    lab = Lab()
    real, copy = cache.root(), tmp_path / "kvmnest"
    used = ("archive", "boot", "debian", "kernels", "kvmnest", "modules", "python", "site")
    read = {lab.kernel.key, *(layer.path.parent.name for layer in lab._layers)}
    for kind in used:
        shutil.copytree(real / kind, copy / kind, symlinks=True)
    for kind in ("boot", "kernels", "python", "site"):
        for other in (copy / kind).iterdir():
            if other.name not in read:
                shutil.rmtree(other)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    forget()
    yield copy
    forget()


def test_every_file_of_a_real_cache(copied: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Whatever is damaged, the next run is prepared as before."""
    before = Lab()
    expected = (before.kernel.image(), before._kvm, [layer.read() for layer in before._layers])
    kinds = cycle(DAMAGES)
    entries = [*before._layers]
    places = [before.kernel.folder, *(layer.path.parent for layer in entries)]
    places += [*(copied / "modules").iterdir(), *(copied / "debian").iterdir()]
    files = [f for place in places for f in ([place] if place.is_file() else place.rglob("*"))]
    tried = 0
    for path in sorted(f for f in files if f.is_file()):
        if path.is_file():
            next(kinds)(path)
            tried += 1
            forget()
            again = Lab()
            got = (again.kernel.image(), again._kvm, [layer.read() for layer in again._layers])
            assert got == expected, path
            assert "Traceback" not in capfd.readouterr().err
    assert tried >= 12


def test_a_boot_from_what_was_made_again(copied: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A file of each kind is damaged, the largest or the smallest: a cold boot works."""
    kinds = ("kernels", "python", "site", "boot", "kvmnest", "modules", "debian")
    damages = itertools.cycle(((zero, -1), (cut, 0), (junk, -1)))
    for kind, (damage, at) in zip(kinds, damages, strict=False):
        files = [f for f in (copied / kind).rglob("*") if f.is_file()]
        files.sort(key=lambda f: f.stat().st_size)
        damage(files[at])
    forget()
    seen: list[bytes] = []
    assert Lab(snapshots=False).run(GUEST, on_output=seen.append) == 0
    assert b"".join(seen) == b"True\n"
    told = capfd.readouterr().err
    assert "Traceback" not in told
    # What follows from a kernel that is made again is not read before.
    assert told.count("is damaged or old, and made again") >= 3


@pytest.mark.skipif("KVMNEST_DAMAGED_CACHE" not in os.environ, reason="takes a quarter of an hour")
@pytest.mark.parametrize("damage", [zero, cut, junk], ids=lambda f: f.__name__)
def test_the_next_run_after_any_damage(
    package: Path,
    copied: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    damage: Callable[[Path], None],
) -> None:
    """Also to the saved boots; what apt keeps of the archive has tests of its own."""
    # The archive need not give the same package again and again.
    unpack = partial(shutil.copytree, package, dirs_exist_ok=True, symlinks=True)
    monkeypatch.setattr(debian, "fetch", lambda apt, release, to: unpack(to))
    Lab().run(GUEST)
    for kind in ("boot", "kvmnest", "modules", "python", "site"):
        # What was used last is what is used.
        unused = sorted((copied / kind).iterdir(), key=lambda entry: entry.stat().st_mtime)[:-1]
        for entry in unused:
            shutil.rmtree(entry)
    every = [path for path in sorted(copied.rglob("*")) if path.is_file()]
    tried = 0
    for path in every:
        inside = path.relative_to(copied)
        if inside.parts[0] in ("archive", "apt") or not path.is_file() or not path.stat().st_size:
            continue
        damage(path)
        tried += 1
        forget()
        seen: list[bytes] = []
        assert Lab().run(GUEST, on_output=seen.append) == 0, inside
        assert b"".join(seen) == b"True\n", inside
        told = capfd.readouterr().err
        assert "Traceback" not in told, inside
        assert all(line.startswith("kvmnest: ") for line in told.splitlines()), (inside, told)
    print(f"{tried} files, {damage.__name__}")
    assert tried >= 20


def test_an_entry_that_another_run_makes_meanwhile(
    private: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """It was not there at the first look; nothing is damaged, and nothing dropped."""
    real, looks = cache.is_whole, []

    def is_whole(folder: Path) -> bool:
        if not looks:
            looks.append(folder)
            cache.entry("kind", "key", build)
            return False
        return real(folder)

    monkeypatch.setattr(cache, "is_whole", is_whole)
    found = cache.existing("kind", "key")
    assert found is not None
    assert (found / "large").is_file()
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("full", "message"),
    [
        ("cache", r"kvmnest has 1 MiB free, kernels needs 80 MiB \(XDG_CACHE_HOME names"),
        ("temporary", r" has 1 MiB free, kernels needs 500 MiB \(TMPDIR names"),
        ("neither", "no space left on the disk while preparing kernels"),
    ],
)
def test_how_much_is_needed_and_where(
    private: Path, monkeypatch: pytest.MonkeyPatch, full: str, message: str
) -> None:
    def usage(place: Path) -> shutil._ntuple_diskusage:
        little = full == ("cache" if Path(place).name == "kvmnest" else "temporary")
        return shutil._ntuple_diskusage(1 << 40, 0, 1 << 20 if little else 1 << 40)

    def broken(to: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "disk_usage", usage)
    with pytest.raises(cache.LabSetupError, match=message):
        cache.entry("kernels", "key", broken)


@pytest.mark.parametrize(
    "note",
    [b"", bytes(32), b"\xff\xfe", b"a" * 5000, b"../..", b"0" * 32],
    ids=["empty", "zeroed", "junk", "long", "elsewhere", "unknown"],
)
def test_a_damaged_note_of_a_source(private: Path, note: bytes) -> None:
    """The sources are fetched again, instead of a traceback."""
    cache.root()
    (private / "kernel-releases").mkdir()
    (private / "kernel-releases/7.3.4").write_bytes(note)
    assert source._noted("7.3.4") is None


def test_modules_that_were_built_are_built_again(
    private: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A damaged pair is not taken for a pair without files."""
    kernel = source.KernelSource("7.3.4", "1", tmp_path, tmp_path, "gcc", "key")
    built = tmp_path / "built"
    (built / "arch/x86/kvm").mkdir(parents=True)
    for name in ("kvm.ko", "kvm-intel.ko"):
        (built / "arch/x86/kvm" / name).write_bytes(b"module")
    monkeypatch.setattr(kernel_build.source, "prepare", lambda release: kernel)
    monkeypatch.setattr(kernel_build, "_base", lambda kernel: built)
    monkeypatch.setattr(kernel_build.modules, "lean", Path.read_bytes)
    folder = kernel_build.build_modules([], "7.3.4")
    cut(folder / "kvm.ko")
    forget()
    assert (kernel_build.build_modules([], "7.3.4") / "kvm.ko").read_bytes() == b"module"


def test_a_snapshot_for_which_there_is_no_room(tmp_path: Path) -> None:
    """The process that was to be saved runs on, and the error says that the disk is full."""
    (tmp_path / "memory").symlink_to("/dev/full")
    with subprocess.Popen(["sh", "-c", "while :; do :; done"]) as child:
        try:
            with pytest.raises(OSError, match="No space left"):
                snapshot.take(child.pid, tmp_path, b"mark of a mailbox", 1)
            assert Path(f"/proc/{child.pid}/stat").read_text().split()[2] == "R"
        finally:
            child.kill()


def test_a_boot_that_cannot_be_kept_goes_on(
    private: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The waiting guest gets its mail, and one line says why the next run boots from cold."""
    mailed = []

    def take(*_: object) -> list[int]:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(snapshot, "take", take)
    monkeypatch.setattr(snapshot, "find_mailbox", lambda pid, mark, pages: [7])
    monkeypatch.setattr(snapshot, "fill_mailbox", lambda *what: mailed.append(what))

    class Process:
        pid = 42

    steps = [saved._Step("booted", "key", b"load"), saved._Step("loaded", "key", b"job")]
    waiting = saved._Saver(Process(), steps)  # type: ignore[arg-type]
    waiting(b"mark")
    waiting(b"mark")
    assert mailed == [(42, [7], b"load"), (42, [7], b"job")]
    lines = capfd.readouterr().err.splitlines()
    assert [line.startswith("kvmnest: this boot is not kept: no space left") for line in lines] == [
        True,
        True,
    ]
    assert list((private / "booted").iterdir()) == []


@pytest.mark.parametrize(("kind", "key"), [("", ""), ("kernels", ""), ("", "key")])
def test_an_entry_without_a_name_drops_nothing(private: Path, kind: str, key: str) -> None:
    """Its place is that of all the others, and no entry that is whole."""
    cache.entry("kernels", "key", lambda folder: (folder / "file").write_text("x"))
    with pytest.raises(AssertionError, match="no name"):
        cache.existing(kind, key)
    assert (private / "kernels" / "key" / "file").is_file()
