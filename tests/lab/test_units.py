"""The lab's parts that need no emulator: archives, frames, SPECs, the cache, modules."""

import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from kvmnest.lab import (
    bochs,
    cache,
    channel,
    debian,
    modules,
    ptrace,
    snapshot,
    tools,
)
from kvmnest.lab.cpio import Cpio, names
from kvmnest.lab.errors import LabSetupError

RELEASES = [
    "6.1.0-47-cloud-amd64",
    "6.1.0-56-amd64",
    "6.1.0-56-cloud-amd64",
    "6.1.0-56-rt-amd64",
    "6.12.100+deb12-cloud-amd64",
    "6.12.99+deb12-cloud-amd64",
    "6.12.117+deb12-amd64",
]


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kvmnest"


def test_cpio_round_trip_with_parents_and_modes():
    archive = Cpio()
    archive.file("a/b/c.txt", b"hello", 0o755, mtime=5)
    archive.symlink("a/link", "b/c.txt")
    archive.directory("empty")
    archive.device("dev/console", 5, 1)
    other = Cpio()
    other.file("later", b"x")
    data = archive.finish()
    found = names(data + other.finish())
    assert found["later"] == (0o100644, b"x")
    assert found["a/b/c.txt"] == (0o100755, b"hello")
    assert found["a/link"] == (0o120777, b"b/c.txt")
    assert found["a/b"][0] == 0o040755
    assert found["dev/console"][0] == 0o020600
    assert len(data) % 512 == 0


def test_cpio_is_what_the_cpio_format_says(tmp_path):
    archive = Cpio()
    archive.file("f", b"abc")
    header = archive.finish()[:110]
    fields = [int(header[6 + 8 * i : 14 + 8 * i], 16) for i in range(13)]
    assert header[:6] == b"070701"
    assert fields[6] == 3  # file size
    assert fields[11] == 2  # name with its NUL


def test_frames_survive_noise_and_any_split():
    payloads = [(channel.STDOUT, b"x" * n) for n in (0, 1, 500, channel.MAX_PAYLOAD)]
    noise = [b"Next at t=0\n", b"\x1e\x02K", b"", b"\x1b[?2004h"]
    stream = b"".join(n + channel.frame(*p) for n, p in zip(noise, payloads, strict=True))
    rng = random.Random(1)
    for _ in range(20):
        decoder, got, at = channel.Decoder(), [], 0
        while at < len(stream):
            step = rng.choice((1, 3, 17, 4096))
            got += list(decoder.feed(stream[at : at + step]))
            at += step
        assert got == payloads
        assert decoder.noise.startswith(b"Next at t=0\n")


def test_a_damaged_frame_is_an_error():
    data = bytearray(channel.frame(channel.EVENT, b"result"))
    data[-1] ^= 1
    with pytest.raises(channel.ChannelError, match="checksum"):
        list(channel.Decoder().feed(bytes(data)))


@pytest.mark.parametrize(
    ("spec", "release"),
    [
        ("6.1.0-56", "6.1.0-56-cloud-amd64"),
        ("6.1", "6.1.0-56-cloud-amd64"),
        ("6.1.0-5", None),
        ("6.12", "6.12.100+deb12-cloud-amd64"),
        ("6.12.117", "6.12.117+deb12-amd64"),
        ("6.1.0-56-rt-amd64", "6.1.0-56-rt-amd64"),
        ("6.1.0-56-amd64", "6.1.0-56-amd64"),
        ("5.10", None),
        ("newest", "6.12.100+deb12-cloud-amd64"),
        ("rc", None),
    ],
)
def test_spec_names_the_newest_cloud_kernel(spec, release):
    assert debian.match(spec, RELEASES) == release


def test_newest_and_candidate():
    found = ["7.3-cloud-amd64", "7.2.13+deb14-cloud-amd64", "7.3.4+deb13-cloud-amd64",
             "7.4-rc1-cloud-amd64", "7.3.4+deb13-rt-amd64", "7.3.4+deb13-amd64"]  # fmt: skip
    assert debian.match("newest", found) == "7.3.4+deb13-cloud-amd64"
    assert debian.match("rc", found) == "7.4-rc1-cloud-amd64"
    assert debian.match("7.3", found) == "7.3.4+deb13-cloud-amd64"
    assert debian.match("rc", found[:3]) == "7.3-cloud-amd64"


PARTS = {
    f"linux-{kind}-7.3.4-amd64": {
        "Package": f"linux-{kind}-7.3.4-amd64", "Version": "7.3.4-1", "Size": size, "SHA256": kind}
    for kind, size in (("binary", "13"), ("modules", "22"))
}  # fmt: skip
IMAGE = {
    "Package": "linux-image-7.3.4-amd64",
    "Version": "7.3.4-1",
    "Size": "2",
    "SHA256": "image",
    "Depends": "dracut | initramfs-tools (>= 0.120), linux-base-7.3.4-amd64 (= 7.3.4-1), "
    "linux-binary-7.3.4-amd64 (= 7.3.4-1), linux-modules-7.3.4-amd64 (= 7.3.4-1)",
}


def test_a_kernel_in_parts():
    suites = {("linux-image-7.3.4-amd64", "7.3.4-1"): {"sid"}}
    offer = debian._offer(IMAGE, PARTS, suites)
    assert offer == debian.Offer(
        "7.3.4-amd64", "7.3.4-1", ("sid",), 35,
        ("linux-binary-7.3.4-amd64=7.3.4-1", "linux-modules-7.3.4-amd64=7.3.4-1"),
        "binary modules",
    )  # fmt: skip


@pytest.mark.parametrize("part", PARTS)
def test_a_kernel_without_a_part_is_not_offered(part):
    assert debian._offer(IMAGE, {k: v for k, v in PARTS.items() if k != part}, {}) is None
    older = PARTS | {part: PARTS[part] | {"Version": "7.3.3-1"}}
    assert debian._offer(IMAGE, older, {}) is None


def test_a_kernel_in_one_package_and_a_name_for_the_newest():
    whole = IMAGE | {"Depends": "kmod, linux-base (>= 4.3~)"}
    offer = debian._offer(whole, {}, {})
    assert offer is not None
    assert offer.packages == ("linux-image-7.3.4-amd64=7.3.4-1",)
    assert offer.size == 2
    series = {**IMAGE, "Package": "linux-image-7.3-amd64", "Depends": "linux-image-7.3.4-amd64"}
    assert debian._offer(series, PARTS, {}) is None


def test_cache_entry_is_whole_or_absent(own_cache):
    def fails(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise LabSetupError("no")

    with pytest.raises(LabSetupError):
        cache.entry("kind", "key", fails)
    assert not (own_cache / "kind" / "key").exists()
    calls = []
    for _ in range(2):
        folder = cache.entry("kind", "key", lambda to: calls.append((to / "f").write_text("1")))
    assert (folder / "f").read_text() == "1"
    assert len(calls) == 1
    assert own_cache.stat().st_mode & 0o777 == 0o700


def test_cache_keeps_the_latest_entries_only(own_cache):
    for i in range(12):
        folder = cache.entry("kind", f"{i:02}", lambda to: None)
        os.utime(folder, (i, i))
    assert "11" in os.listdir(own_cache / "kind")
    assert len(os.listdir(own_cache / "kind")) < 9


def test_a_full_disk_is_named(own_cache):
    def build_it(folder: Path) -> None:
        raise OSError(28, "No space left on device", str(folder / "image"))

    with pytest.raises(LabSetupError, match="no space left on the disk"):
        cache.entry("kind", "key", build_it)


def test_an_unusable_cache_folder_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(LabSetupError, match="cannot use cache directory"):
        cache.root()


def test_a_missing_tool_names_its_package(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(LabSetupError, match="apt-get install binutils"):
        tools.find("objcopy")


def test_a_tool_that_does_not_end():
    """As apt does whose mirror says nothing."""
    with pytest.raises(LabSetupError, match="apt-get update did not end within 0 s"):
        tools.run(["sleep", "60"], "apt-get update", 0.2)


def test_module_names_and_builtin_list():
    assert modules.canonical("kvm-intel.ko.xz") == "kvm_intel"
    listing = "kernel/virt/lib/irqbypass.ko\nkernel/arch/x86/kvm/kvm-intel.ko\n"
    assert modules.builtin_names(listing) == {"irqbypass", "kvm_intel"}


def test_a_stopped_process_makes_system_calls_for_us():
    if not snapshot.supported():
        pytest.skip("this system does not allow to trace a child")
    child = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write(b"up")
    assert child.stdout.read(2) == b"up"
    try:
        with ptrace.Stopped(child.pid) as process, open(f"/proc/{child.pid}/mem", "rb") as memory:
            before = process.registers()
            found = snapshot.regions(child.pid)
            gate = snapshot._syscall_instruction(memory.fileno(), found)
            assert process.call(gate, 39) == child.pid  # getpid
            with pytest.raises(OSError, match="Bad file descriptor"):
                process.call(gate, 3, 999)  # close
            after = process.registers()
            assert {k: v for k, v in after.items() if k != "orig_rax"} == {
                k: v for k, v in before.items() if k != "orig_rax"
            }
    finally:
        child.kill()
        child.wait()


def test_mailbox_pages_are_found_by_their_mark(tmp_path):
    if not snapshot.supported():
        pytest.skip("this system does not allow to trace a child")
    code = (
        "import mmap, time\n"
        "pages = mmap.mmap(-1, 3 * 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)\n"
        "mark = bytes(b ^ 1 for b in b'some mark here!!')\n"
        "for i in range(3): pages[i * 4096 : i * 4096 + 20] = mark + i.to_bytes(4, 'little')\n"
        "print('ready', flush=True)\n"
        "while not pages[40]: pass\n"
        "size = int.from_bytes(pages[32:40], 'little')\n"
        "print(bytes(pages[4096 : 4096 + size]).decode(), flush=True)\n"
    )
    command = [sys.executable, "-c", code]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    mark = bytes(b ^ 1 for b in b"some mark here!!")
    addresses = snapshot.take(child.pid, tmp_path, mark, 3)
    assert snapshot.find_mailbox(child.pid, mark, 3) == addresses
    with pytest.raises(snapshot.SnapshotError, match="3 of 4 mailbox pages"):
        snapshot.find_mailbox(child.pid, mark, 4)
    assert (tmp_path / "memory").stat().st_size > 3 * 4096
    with pytest.raises(snapshot.SnapshotError, match="do not fit"):
        snapshot.fill_mailbox(child.pid, addresses, bytes(2 * 4096 + 1))
    snapshot.fill_mailbox(child.pid, addresses, b"x" * 5000)
    assert child.stdout.readline() == "x" * 5000 + "\n"
    assert child.wait() == 0


def test_no_sweep_removes_a_folder_that_is_being_made():
    """Many labs at once: each sweeps what the killed ones left, and nothing else."""
    emulator = bochs.locate()
    gone = []

    def make() -> None:
        for _ in range(60):
            with bochs.Bochs(emulator) as one:
                if not (one.folder / "lock").is_file():
                    gone.append(one.folder)

    threads = [threading.Thread(target=make) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert gone == []
