"""The lab's parts that need no emulator: archives, frames, kernel images, SPECs, modules."""

import bz2
import ctypes
import gzip
import io
import lzma
import os
import random
import struct
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from kvmnest.lab import (
    bochs,
    build,
    cache,
    channel,
    debian,
    image,
    modules,
    ptrace,
    snapshot,
    tools,
)
from kvmnest.lab.cpio import Cpio, names
from kvmnest.lab.decompress import decompress, vmlinux_of
from kvmnest.lab.errors import KernelSpecError, LabSetupError
from kvmnest.lab.image import INFO, KernelImage

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


def _lz4_legacy(data: bytes) -> bytes:
    lib = ctypes.CDLL("liblz4.so.1")
    out = b"\x02\x21\x4c\x18"
    for at in range(0, len(data), 8 << 20):
        block = data[at : at + (8 << 20)]
        buffer = ctypes.create_string_buffer(len(block) + len(block) // 200 + 64)
        size = lib.LZ4_compress_default(block, buffer, len(block), len(buffer))
        out += struct.pack("<I", size) + buffer.raw[:size]
    return out + struct.pack("<I", len(data))


def _zstd(data: bytes) -> bytes:
    return subprocess.run(["zstd", "-q", "-c"], input=data, capture_output=True, check=True).stdout


@pytest.mark.parametrize(
    "pack",
    [gzip.compress, lzma.compress, bz2.compress, _lz4_legacy, _zstd, bytes],
    ids=["gzip", "xz", "bzip2", "lz4", "zstd", "none"],
)
def test_decompress_what_kernels_use(pack):
    data = b"kernel" * 300_000 + bytes(9 << 20)
    assert decompress(pack(data) + b"tail" * (pack is not bytes)).removesuffix(b"tail") == data


def test_lzma_alone_stream():
    data = b"payload" * 1000
    assert decompress(lzma.compress(data, lzma.FORMAT_ALONE)) == data


@pytest.mark.parametrize(
    "pack", [gzip.compress, lzma.compress, bz2.compress, _zstd], ids=["gz", "xz", "bz2", "zstd"]
)
def test_damaged_streams_are_named(pack):
    data = pack(os.urandom(5_000) + bytes(50_000))
    with pytest.raises(KernelSpecError, match="cut short"):
        decompress(data[:-2000])
    with pytest.raises(KernelSpecError, match="corrupt"):
        decompress(data[:12] + b"\xff" * 200 + data[212:])


def test_a_damaged_lz4_block_is_named():
    data = _lz4_legacy(bytes(50_000))
    with pytest.raises(KernelSpecError, match="corrupt"):
        decompress(data[:10] + b"\xff" * 60 + data[70:])


def _elf(paddr: int = 0x1000000, content: bytes = b"text") -> bytes:
    header = struct.pack(
        "<16sHHIQQQIHHHHHH",
        b"\x7fELF\x02\x01\x01", 2, 62, 1, paddr, 64, 0, 0, 64, 56, 1, 0, 0, 0,
    )  # fmt: skip
    segment = struct.pack("<IIQQQQQQ", 1, 5, 120, 0, paddr, len(content), 0x5000, 0x200000)
    return header + segment + content


def test_bzimage_payload_is_found():
    payload = gzip.compress(_elf(), mtime=0) + bytes(2048)
    head = bytearray(0x600)
    head[0x1F1] = 2
    head[0x202:0x206] = b"HdrS"
    struct.pack_into("<II", head, 0x248, 0x10, len(payload))
    vmlinux, setup = vmlinux_of(bytes(head) + bytes(0x10) + payload)
    assert vmlinux == _elf()
    assert setup == bytes(head[:0x400])


@pytest.mark.parametrize("data", [b"", b"MZ" + bytes(5000), os.urandom(5000)])
def test_what_is_no_kernel_is_refused(data):
    with pytest.raises(KernelSpecError, match="neither"):
        vmlinux_of(data)


def test_flatten_by_physical_address():
    flat = image.flatten(_elf(0x1020000), b"")
    assert (flat.base, flat.end, flat.data) == (0x1020000, 0x1025000, b"text")
    with pytest.raises(KernelSpecError, match="linked to run"):
        image.flatten(_elf(0x100000), b"")


def test_memory_picture_is_one_contiguous_range():
    kernel = KernelImage(b"K" * 70_000, 0x1000000, 0x1200123, 0x1000000, b"")
    out = io.BytesIO()
    layout = image.write(out, kernel, [b"one", b"second"], "quiet", 2, 288)
    data = out.getvalue()
    start, size = layout.initrd
    assert start % 0x200000 == 0
    assert start >= kernel.end
    assert data[0x1000000 - INFO :][:70_000] == kernel.data
    assert data[start - INFO :][:size] == b"one\0second\0\0"
    assert len(data) == layout.blocks * image.BLOCK
    assert data[-4:] == data[0x9000:0x9004] == struct.pack("<I", image.MAGIC)
    assert struct.unpack_from("<II", data, 0x218) == (start, size)
    assert data[0x1000:0x1006] == b"quiet\0"


def test_acpi_tables_have_right_checksums():
    tables = image.acpi_tables(2, 0xFE2000)
    assert sum(tables[:20]) % 256 == sum(tables[:36]) % 256 == 0
    for signature in (b"XSDT", b"APIC"):
        at = tables.index(signature, 1)
        length = struct.unpack_from("<I", tables, at + 4)[0]
        assert sum(tables[at : at + length]) % 256 == 0
    assert tables.count(bytes([0, 8])) >= 2


def test_rom_is_64k_with_a_jump_at_the_reset_vector():
    rom = build.build().read_bytes()
    assert len(rom) == 0x10000
    assert rom[0xFFF0] in (0xE9, 0xEB)


def test_constants_are_those_of_the_assembly():
    source = build.SOURCE.read_text()
    assert f".set LAB_INFO, {INFO:#x}" in source
    assert f".set LAB_BLOCK, {image.BLOCK:#x}" in source
    assert f".set MAGIC, {image.MAGIC:#x}" in source


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


def test_what_is_no_module_is_refused(tmp_path):
    for content in (b"text", _elf()):
        (tmp_path / "kvm.ko").write_bytes(content)
        with pytest.raises(KernelSpecError, match="no kernel module"):
            modules.read(tmp_path / "kvm.ko")


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
