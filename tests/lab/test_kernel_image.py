"""From a kernel file to the picture of memory that is booted: decompression, ELF, ACPI, ROM."""

import bz2
import ctypes
import gzip
import io
import lzma
import os
import struct
import subprocess

import pytest

from kvmnest.lab import (
    build,
    image,
    modules,
)
from kvmnest.lab.decompress import decompress, vmlinux_of
from kvmnest.lab.errors import KernelSpecError
from kvmnest.lab.image import INFO, KernelImage


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
    source = (build.SOURCES / "lab_boot.s").read_text()
    assert f".set LAB_INFO, {INFO:#x}" in source
    assert f".set LAB_BLOCK, {image.BLOCK:#x}" in source
    assert f".set MAGIC, {image.MAGIC:#x}" in source


def test_what_is_no_module_is_refused(tmp_path):
    for content in (b"text", _elf()):
        (tmp_path / "kvm.ko").write_bytes(content)
        with pytest.raises(KernelSpecError, match="not a kernel module"):
            modules.read(tmp_path / "kvm.ko")
