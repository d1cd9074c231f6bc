"""The preloaded picture of guest memory: boot parameters, kernel and initramfs in one file.

The layout and its constants are shared with ``payloads/lab_boot.s``, the ROM that starts the
kernel. Sources: Documentation/arch/x86/boot.rst and zero-page.rst ("64-bit Boot Protocol") and
the ACPI specification's "MADT" section.
"""

import io
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from elftools.elf.elffile import ELFFile

from kvmnest import reading
from kvmnest.lab.errors import KernelSpecError

INFO = 0xFE0000  # LAB_INFO in lab_boot.s
WAIT = 0x800000  # LAB_WAIT: where the ROM puts WAIT_MARK and waits for the flag after it
WAIT_MARK = b"kvmnest: memory?"
WAITING = b"KVMNEST-BOOT: waiting"  # what it says on the debug port then
BLOCK = 0x20000  # Bochs' smallest unit of guest memory
MAGIC = 0x4E4D564B
MIB = 1 << 20

_CMDLINE, _ACPI, _PML4, _MARK = 0x1000, 0x2000, 0x3000, 0x9000
_HIGHEST = 1 << 30
_RAM, _RESERVED = 1, 2


class Sink(Protocol):
    """Where the picture is written: a file, or memory from INFO on."""

    def write(self, data: bytes, /) -> int:
        """Write all of ``data`` at the position, and move it."""
        ...

    def seek(self, position: int, /) -> int:
        """Move to a distance from INFO."""
        ...


@dataclass(frozen=True)
class KernelImage:
    """A vmlinux flattened to the bytes that must stand in memory from ``base`` on.

    ``end`` is the first address after the kernel's own memory (bss included), ``entry`` the
    physical address of its 64-bit entry, ``setup`` the bzImage's setup header (or b"").
    """

    data: bytes
    base: int
    end: int
    entry: int
    setup: bytes


def flatten(vmlinux: bytes, setup: bytes) -> KernelImage:
    """Lay out the loadable segments of an ELF vmlinux by physical address.

    Raises KernelSpecError if it is not an x86-64 ELF file or does not lie above LAB_INFO.
    """
    try:
        elf = ELFFile(io.BytesIO(vmlinux))
        right, entry = elf.get_machine_arch() == "x64", elf["e_entry"]
        segments = [each.header for each in elf.iter_segments("PT_LOAD") if each["p_memsz"]]
    except Exception as e:  # of a damaged file pyelftools raises what it runs into
        raise KernelSpecError(f"the kernel image is not an ELF file ({reading.one_line(e)})") from e
    if not right:
        raise KernelSpecError("the kernel image is not an x86-64 ELF vmlinux")
    loads = [(s.p_paddr, s.p_offset, s.p_filesz, s.p_memsz) for s in segments]
    if any(o + f > len(vmlinux) or f > m for _, o, f, m in loads):
        raise KernelSpecError("the kernel image is damaged: a segment outside of the file")
    base = min((p for p, *_ in loads), default=0)
    if base < INFO + BLOCK or base % BLOCK:
        raise KernelSpecError(f"the kernel is linked to run at {base:#x}, the lab loads at 16 MiB")
    end = max(p + m for p, _, _, m in loads)
    if end > _HIGHEST:
        raise KernelSpecError(f"the kernel ends at {end:#x}, the lab has no memory there")
    image = bytearray(max(p + f for p, _, f, _ in loads) - base)
    for paddr, offset, filesz, _ in loads:
        image[paddr - base : paddr - base + filesz] = vmlinux[offset : offset + filesz]
    return KernelImage(bytes(image), base, end, entry, setup)


def _checksummed(table: bytearray, at: int, start: int = 0, end: int | None = None) -> bytearray:
    table[at] = 0
    table[at] = -sum(table[start:end]) & 0xFF
    return table


def acpi_tables(cpus: int, base: int) -> bytes:
    """RSDP, XSDT and MADT for ``cpus`` CPUs, to be placed at physical address ``base``.

    Just enough for the kernel to find its local APICs and the I/O APIC.
    """
    madt = struct.pack("<II", 0xFEE00000, 1)  # PC-compatible: dual 8259s are there
    for cpu in range(cpus):
        madt += struct.pack("<BBBBI", 0, 8, cpu, cpu, 1)
    madt += struct.pack("<BBBBII", 1, 12, cpus, 0, 0xFEC00000, 0)
    madt += struct.pack("<BBBBIH", 2, 10, 0, 0, 2, 0)  # ISA IRQ 0 is on pin 2

    def table(signature: bytes, body: bytes) -> bytes:
        header = struct.pack(
            "<4sIBB6s8sI4sI", signature, 36 + len(body), 1, 0, b"KVMNST", b"KVMNSTLB", 1, b"KVMN", 1
        )
        return bytes(_checksummed(bytearray(header + body), 9))

    apic = table(b"APIC", madt)
    xsdt = table(b"XSDT", struct.pack("<Q", base + 128))
    rsdp = bytearray(
        struct.pack("<8sB6sBIIQB3x", b"RSD PTR ", 0, b"KVMNST", 2, 0, 36, base + 64, 0)
    )
    _checksummed(rsdp, 8, 0, 20)
    _checksummed(rsdp, 32)
    return bytes(rsdp).ljust(64, b"\0") + xsdt.ljust(64, b"\0") + apic


def boot_params(kernel: KernelImage, initrd: tuple[int, int], memory: int) -> bytearray:
    """The zero page: setup header, initrd (address, size), memory map of ``memory`` bytes."""
    page = bytearray(4096)
    setup = kernel.setup
    if setup:
        end = 0x202 + setup[0x201]
        page[0x1F1:end] = setup[0x1F1:end]
    else:  # a bare vmlinux: the least that the kernel looks at
        page[0x1FE:0x200] = b"\x55\xaa"
        page[0x202:0x208] = b"HdrS\x0f\x02"
    page[0x210] = 0xFF  # type_of_loader: undefined
    page[0x211] |= 1  # loaded high
    struct.pack_into("<Q", page, 0x70, INFO + _ACPI)  # acpi_rsdp_addr
    struct.pack_into("<II", page, 0x218, *initrd)
    struct.pack_into("<I", page, 0x228, INFO + _CMDLINE)
    e820 = [
        (0, 0x9F000, _RAM),
        (0x9F000, 0x100000 - 0x9F000, _RESERVED),
        (0x100000, memory - 0x100000, _RAM),
    ]
    page[0x1E8] = len(e820)
    for i, entry in enumerate(e820):
        struct.pack_into("<QQI", page, 0x2D0 + 20 * i, *entry)
    return page


def _info_block(
    page: bytearray, cmdline: bytes, acpi: bytes, blocks: int, entry: int, tail: int
) -> bytes:
    info = bytearray(BLOCK)
    info[: len(page)] = page
    info[_CMDLINE : _CMDLINE + len(cmdline)] = cmdline
    info[_ACPI : _ACPI + len(acpi)] = acpi
    struct.pack_into("<Q", info, _PML4, INFO + _PML4 + 0x1003)
    for gib in range(4):
        directory = _PML4 + 0x2000 + 0x1000 * gib
        struct.pack_into("<Q", info, _PML4 + 0x1000 + 8 * gib, INFO + directory + 3)
        for i in range(512):
            struct.pack_into("<Q", info, directory + 8 * i, gib << 30 | i << 21 | 0x83)
    struct.pack_into("<IIII", info, _MARK, MAGIC, blocks, entry, tail)
    return bytes(info)


@dataclass(frozen=True)
class Layout:
    """Where things are: ``initrd`` (address, size), ``blocks`` of 128 KiB from INFO on."""

    initrd: tuple[int, int]
    blocks: int


def memory_for(kernel_end: int, archives: int) -> int:
    """MiB of RAM for a kernel that ends there and so many bytes of initramfs.

    Room for the archives and what is unpacked from them, and as much again to run in.
    """
    return max(288, -(-(kernel_end + 4 * archives) // (32 * MIB)) * 32 + 96)


def write(
    out: Sink,
    kernel: KernelImage,
    layers: Sequence[bytes],
    cmdline: str,
    cpus: int,
    memory: int,
) -> Layout:
    """Write the picture of a guest with ``memory`` MiB to ``out`` and return its layout.

    ``layers`` are cpio archives (or compressed ones), concatenated as one initramfs.
    """
    line = cmdline.encode()
    if len(line) > 2047:
        raise KernelSpecError(f"kernel command line of {len(line)} bytes is longer than 2047")
    start = -(-kernel.end // (2 * MIB)) * 2 * MIB
    padded = [layer + bytes(-len(layer) % 4) for layer in layers]
    size = sum(map(len, padded))
    tail = start + -(-(size + 4) // BLOCK) * BLOCK - 4
    blocks = (tail + 4 - INFO) // BLOCK
    page = boot_params(kernel, (start, size), memory * MIB)
    acpi = acpi_tables(cpus, INFO + _ACPI)
    out.write(_info_block(page, line, acpi, blocks, kernel.entry, tail))
    out.write(bytes(kernel.base - INFO - BLOCK))
    out.write(kernel.data)
    out.seek(start - INFO)
    for layer in padded:
        out.write(layer)
    out.seek(tail - INFO)
    out.write(struct.pack("<I", MAGIC))
    return Layout((start, size), blocks)
