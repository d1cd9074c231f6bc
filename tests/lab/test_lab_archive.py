"""Which kernels can be had: Debian's archive through apt, installed ones, the cache."""

import contextlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvmnest.lab import apts, archive, debian, kernels, tools
from kvmnest.lab.errors import KernelSpecError, LabSetupError


def test_archive_and_cache() -> None:
    """The lab's own kernel is listed with what the archive says of it; suites are Debian's."""
    release = kernels.resolve().release
    found = {entry.release: entry for entry in kernels.available()}
    entry = found[release]
    assert entry.cached
    assert entry.version.startswith(release.partition("-")[0].rpartition(".")[0])
    assert entry.size > 10_000_000
    suites = {suite for entry in found.values() for suite in entry.suites}
    assert any(suite.endswith("-security") for suite in suites), suites
    # The system's own sources have none: these are the archive's as the lab asks it.
    assert any(suite.endswith("-backports") for suite in suites), suites


def test_kernels_up_to_mainline() -> None:
    """Newer suites' kernels are offered, in parts or whole, and none that lacks a part."""
    found = {entry.release: entry for entry in kernels.available() if entry.version}
    suites = {suite for entry in found.values() for suite in entry.suites}
    assert suites >= {"trixie", "sid", "experimental", "trixie-backports", "bookworm-security"}
    newest = debian.match("newest", found)
    assert newest is not None
    assert debian.version_key(newest) > (7, 3)
    assert found[newest].size > 30_000_000
    offers = apts.of(newest).offers
    assert len(offers[newest].packages) == 2
    assert not [name for name in found if "/" in name or name.startswith(("6.12-", "7.2-"))]


def test_damaged_lists_are_fetched_again(lists: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = archive.ask(lists).offers
    (files,) = (sorted((lists / name).rglob("*")) for name in ("state/lists",))
    for path in (*files, *lists.glob("cache/*.bin"), *lists.glob("offers-*")):
        if path.is_file():
            path.write_bytes(b"junk")
    assert archive.ask(lists).offers == before
    assert "is damaged or old, and made again" in capfd.readouterr().err


def test_between_spans_suites() -> None:
    """The ladder from stable to backports is in order, of one flavour, without gaps."""
    found = kernels.between("6.1", "6.12")
    keys = [debian.version_key(name) for name in found]
    assert keys == sorted(keys)
    assert all(name.endswith("-cloud-amd64") for name in found)
    assert kernels.between("6.12", "6.1") == []
    with pytest.raises(KernelSpecError, match="kvmnest kernels lists them"):
        kernels.between("6.1", "9.9")


@pytest.fixture
def lists(tmp_path: Path) -> Path:
    """A copy of the lists of the cache."""
    apts.every()
    folder = tmp_path / "apt"
    shutil.copytree(apts.archive_folder(), folder)
    path = folder / "sources.list"
    path.write_text(path.read_text().replace(str(apts.archive_folder()), str(folder)))
    return folder


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What apt was asked; it answers that there is no connection."""
    questions: list[str] = []
    real = tools.run

    def run(argv: list[str], doing: str, limit: float = 0) -> object:
        if argv[0] == "apt-cache":
            return real(argv, doing)
        questions.append(doing)
        raise LabSetupError("apt-get update failed: no connection")

    monkeypatch.setattr(tools, "run", run)
    return questions


def make_old(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


def test_lists_are_renewed_once_a_day(lists: Path, asked: list[str]) -> None:
    archive.ask(lists)
    assert asked == []
    make_old(lists / "updated", 2 * 86_400)
    stamp = archive.stamp(lists)
    archive.ask(lists)  # it cannot be renewed: the lists of before serve
    archive.ask(lists)  # and the mirror is not asked again at once
    assert len(asked) == 1
    assert archive.stamp(lists) == stamp
    make_old(lists / "failed", 120)
    archive.ask(lists)
    assert len(asked) == 2


def test_no_lists_and_no_connection(tmp_path: Path, asked: list[str]) -> None:
    """The failure is told again without another attempt, which may take minutes."""
    for _ in range(2):
        with pytest.raises(LabSetupError, match="no connection"):
            archive.ask(tmp_path / "apt")
    assert len(asked) == 1


def test_installed_kernels(tmp_path: Path) -> None:
    """A kernel with its modules in the usual places; one without modules does not count."""
    release = kernels.resolve().release
    package = tmp_path / "package"
    debian.fetch(apts.of(release), release, package)
    shutil.copyfile(package / f"boot/vmlinuz-{release}", package / "boot/vmlinuz-7.0.0-alone")
    assert kernels.installed_releases(package) == [release]
    kernel = kernels._from_installed(release, package)
    assert kernel.release == release
    assert set(kernel.modules) >= {"kvm", "kvm_intel"}
    assert kernel.image().data == kernels.resolve().image().data


def test_an_installed_kernel_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "boot").mkdir()
    (tmp_path / "lib/modules/6.1.0-x").mkdir(parents=True)
    (tmp_path / "boot/vmlinuz-6.1.0-x").write_bytes(b"x")

    class Denied(type(tmp_path)):  # type: ignore[misc]  # root may read everything
        def read_bytes(self) -> bytes:
            raise PermissionError(13, "Permission denied", str(self))

    with pytest.raises(KernelSpecError, match=r"vmlinuz-6\.1\.0-x cannot be read: .*run as root"):
        kernels._from_installed("6.1.0-x", Denied(tmp_path))


def test_an_archive_out_of_reach_is_no_wrong_usage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: list[str]
) -> None:
    """Exit code 3: the same command works once there is a connection."""

    def no_system() -> debian.Apt:
        raise LabSetupError("apt knows no kernel")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(debian.Apt, "offers", property(lambda self: no_system()))
    with pytest.raises(
        LabSetupError, match=r"no kernel 6\.1 in the cache, and .*no connection"
    ) as e:
        kernels.resolve("6.1")
    assert e.value.exit_code == 3


def test_fewer_kernels_than_the_archive_has_are_no_secret(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Else the newest kernel of the system's lists, which may be old, would pass for the newest."""
    little = shutil._ntuple_diskusage(1 << 40, 0, 1 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: little)
    apts._tell_once.cache_clear()
    for _ in range(2):
        assert len(apts.every()) == 1
    assert capfd.readouterr().err == (
        "kvmnest: only kernels of this system's own apt can be had:"
        f" {own_cache} has 1 MiB free; Debian's package lists need 300 MiB"
        " (XDG_CACHE_HOME names another place)\n"
    )


def test_a_suite_that_left_the_archive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The others are read; one line says that something is read, and nothing else is said."""
    monkeypatch.setattr(archive, "_SUITES", ("bookworm", "bookworm-gone", "gone"))
    monkeypatch.setattr(archive, "_SECURITY", ("bookworm-security", "gone-security"))
    offers = archive.ask(tmp_path / "archive").offers
    assert {suite for offer in offers.values() for suite in offer.suites} == {
        "bookworm",
        "bookworm-security",
    }
    assert "gone" not in (tmp_path / "archive/sources.list").read_text()
    assert capfd.readouterr().err.count("\n") == 1


def test_an_archive_without_a_stable_suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mirror that has none of them is told as apt tells it, once."""
    monkeypatch.setattr(archive, "_SUITES", ("gone",))
    monkeypatch.setattr(archive, "_SECURITY", ())
    with pytest.raises(LabSetupError, match=r"apt-get update failed: .*gone") as e:
        archive.ask(tmp_path / "archive")
    assert "\n" not in str(e.value)


def _apts_of(folder: Path) -> list[str]:
    """Command lines of apt's processes that work in ``folder``."""
    found = []
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            line = place.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if str(folder) in line and line.partition(" ")[0].endswith("apt-get"):
                found.append(line)
    return found


def test_apt_ends_with_a_command_that_is_killed(tmp_path: Path) -> None:
    """Also by SIGKILL: it would hold the lock of the lists for as long as its mirror is silent."""
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "kvmnest", "kernels"]
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
        end = time.monotonic() + 60
        while not _apts_of(tmp_path):
            assert time.monotonic() < end
            assert process.poll() is None
            time.sleep(0.05)
        process.kill()
    end = time.monotonic() + 10
    while _apts_of(tmp_path):
        assert time.monotonic() < end, "apt-get lives on"
        time.sleep(0.05)


@pytest.fixture
def unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Lists of today that apt-cache cannot read, whatever the reason."""
    folder = tmp_path / "archive"
    folder.mkdir()
    (folder / "updated").touch()
    (folder / "lists").write_text("30 MB")

    def ask(self: debian.Apt) -> dict[str, debian.Offer]:
        if (folder / "lists").read_text() == "new":
            return {"6.1-amd64": debian.Offer("6.1-amd64", "1", (), 1, (), "key")}
        raise LabSetupError("apt-cache show failed: Killed")

    monkeypatch.setattr(debian.Apt, "_ask", ask)
    return folder


def test_lists_stay_where_new_ones_cannot_be_had(
    unreadable: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Offline nothing is lost, and the next minute does not wait for a connection again."""
    tried = []

    def update(folder: Path) -> None:
        tried.append(folder)
        folder.mkdir()
        (folder / "half").touch()
        raise LabSetupError("no connection")

    monkeypatch.setattr(archive, "_update", update)
    for _ in range(2):
        with pytest.raises(LabSetupError, match="apt-cache show failed: Killed"):
            archive.ask(unreadable)
        assert (unreadable / "lists").read_text() == "30 MB"
        assert not (unreadable / "half").exists()
    assert len(tried) == 1
    assert capfd.readouterr().err.count("made again") == 1
    assert list(unreadable.parent.iterdir()) == [unreadable]


def test_lists_that_apt_cannot_read_are_fetched_again(
    unreadable: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def update(folder: Path) -> None:
        folder.mkdir()
        (folder / "lists").write_text("new")

    monkeypatch.setattr(archive, "_update", update)
    assert list(archive.ask(unreadable).offers) == ["6.1-amd64"]
    assert list(unreadable.parent.iterdir()) == [unreadable]


def test_a_run_that_was_killed_while_it_fetched_new_lists(unreadable: Path) -> None:
    """The old ones were aside."""
    (unreadable / "lists").write_text("new")
    unreadable.rename(unreadable.with_name("archive.old"))
    unreadable.mkdir()
    assert list(archive.ask(unreadable).offers) == ["6.1-amd64"]
    assert list(unreadable.parent.iterdir()) == [unreadable]
