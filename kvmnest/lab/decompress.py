"""Take the vmlinux out of a bzImage, and unpack compressed modules.

The compressions a kernel may use come from Python itself (gzip, xz, lzma, bzip2) or from the
shared libraries that Debian's apt and dpkg already load (liblz4, libzstd).
"""

import bz2
import ctypes
import lzma
import struct
import zlib
from typing import Any

from kvmnest.lab.errors import KernelSpecError, LabSetupError

_LZ4_LEGACY = b"\x02\x21\x4c\x18"
_LZ4_BLOCK = 8 << 20
_ZSTD = b"\x28\xb5\x2f\xfd"
_XZ = b"\xfd7zXZ\x00"
_LIMIT = 512 << 20


def _library(name: str, package: str) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(name)
    except OSError as e:
        raise LabSetupError(f"{name} not found: apt-get install {package}") from e


def lz4_legacy(data: bytes, size_limit: int = _LIMIT) -> bytes:
    """Decompress the "legacy" LZ4 frame that kernels use: blocks of 8 MiB with a length each.

    Trailing bytes that are no block (the kernel appends the size) end the data. Raises
    KernelSpecError if a block is corrupt.
    """
    decompress = _library("liblz4.so.1", "liblz4-1").LZ4_decompress_safe
    buffer = ctypes.create_string_buffer(_LZ4_BLOCK)
    parts, at, total = [], 4, 0
    while at + 4 < len(data):
        (length,) = struct.unpack_from("<I", data, at)
        at += 4
        if not 0 < length <= len(data) - at:
            break
        got = decompress(data[at : at + length], buffer, length, _LZ4_BLOCK)
        total += got
        if got < 0 or total > size_limit:
            raise KernelSpecError("the compressed kernel is corrupt (lz4)")
        parts.append(buffer.raw[:got])
        at += length
    return b"".join(parts)


class _Buffer(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("size", ctypes.c_size_t), ("pos", ctypes.c_size_t))


def zstd(data: bytes) -> bytes:
    """Decompress one zstd stream. Raises KernelSpecError if it is corrupt or cut."""
    lib = _library("libzstd.so.1", "libzstd1")
    lib.ZSTD_createDStream.restype = ctypes.c_void_p
    lib.ZSTD_decompressStream.restype = ctypes.c_size_t
    stream = ctypes.c_void_p(lib.ZSTD_createDStream())
    source = ctypes.create_string_buffer(data, len(data))
    chunk = ctypes.create_string_buffer(1 << 20)
    given = _Buffer(ctypes.addressof(source), len(data), 0)
    parts = []
    try:
        while True:
            taken = _Buffer(ctypes.addressof(chunk), len(chunk), 0)
            left = lib.ZSTD_decompressStream(stream, ctypes.byref(taken), ctypes.byref(given))
            if lib.ZSTD_isError(ctypes.c_size_t(left)):
                raise KernelSpecError("the compressed data is corrupt (zstd)")
            parts.append(chunk.raw[: taken.pos])
            if left == 0:
                return b"".join(parts)
            if len(parts) > _LIMIT >> 20:
                raise KernelSpecError("the compressed data is too large (zstd)")
            if given.pos == len(data) and taken.pos == 0:
                raise KernelSpecError("the compressed data is cut short (zstd)")
    finally:
        lib.ZSTD_freeDStream(stream)


def decompress(data: bytes) -> bytes:
    """Decompress ``data`` by its magic; what is not compressed comes back as it is.

    Bytes after the compressed stream are ignored. Raises KernelSpecError if it is corrupt.
    """
    stream: Any = None
    if data[:2] == b"\x1f\x8b":
        stream = zlib.decompressobj(31)
    elif data[:6] == _XZ:
        stream = lzma.LZMADecompressor(lzma.FORMAT_XZ)
    elif data[:3] == b"\x5d\x00\x00":
        stream = lzma.LZMADecompressor(lzma.FORMAT_ALONE)
    elif data[:3] == b"BZh":
        stream = bz2.BZ2Decompressor()
    if stream is not None:
        try:
            content: bytes = stream.decompress(data, _LIMIT)
        except (zlib.error, lzma.LZMAError, OSError) as e:
            raise KernelSpecError(f"the compressed data is corrupt ({e})") from e
        if not stream.eof:
            why = "too large" if len(content) == _LIMIT else "cut short"
            raise KernelSpecError(f"the compressed data is {why}")
        return content
    if data[:4] == _LZ4_LEGACY:
        return lz4_legacy(data)
    if data[:4] == _ZSTD:
        return zstd(data)
    if data[:3] == b"\x89LZ":
        raise KernelSpecError("the kernel is compressed with LZO, which the lab cannot read")
    return data


def vmlinux_of(image: bytes) -> tuple[bytes, bytes]:
    """(vmlinux, setup header) of a bzImage; an ELF vmlinux comes back with an empty header.

    Raises KernelSpecError if ``image`` is neither. Source: Documentation/arch/x86/boot.rst,
    fields payload_offset and payload_length.
    """
    if image[:4] == b"\x7fELF":
        return image, b""
    if image[0x202:0x206] != b"HdrS" or len(image) < 0x300:
        raise KernelSpecError("the kernel file is neither a bzImage nor an ELF vmlinux")
    setup_sectors = image[0x1F1] or 4
    offset, length = struct.unpack_from("<II", image, 0x248)
    start = (setup_sectors + 1) * 512 + offset
    payload = image[start : start + length]
    if len(payload) < length or length < 1024:
        raise KernelSpecError("the bzImage is cut short")
    vmlinux = decompress(payload)
    if vmlinux[:4] != b"\x7fELF":
        raise KernelSpecError("the bzImage holds no ELF kernel (unknown compression?)")
    return vmlinux, image[:0x400]
