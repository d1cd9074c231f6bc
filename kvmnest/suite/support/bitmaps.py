"""The I/O and MSR bitmaps of a VMCS, as sets of ports and MSRs that exit."""

from __future__ import annotations

from collections.abc import Iterable

from kvmnest.l1 import L1, Vmcs
from kvmnest.vmx import Field

#: Where each part of the MSR bitmaps begins: byte offset and first MSR.
MSR_PARTS = {
    "read-low": (0x000, 0x00000000),
    "read-high": (0x400, 0xC0000000),
    "write-low": (0x800, 0x00000000),
    "write-high": (0xC00, 0xC0000000),
}


def set_io_bitmaps(l1: L1, ports: Iterable[int], vmcs: Vmcs | None = None) -> None:
    """Let exactly these ports exit; ports above 0xffff are left out."""
    bits = bytearray(0x2000)
    for port in ports:
        if port <= 0xFFFF:
            bits[port // 8] |= 1 << port % 8
    _write_io_bitmaps(l1, bits, vmcs)


def set_all_io_bits(l1: L1) -> None:
    """Let every port exit."""
    _write_io_bitmaps(l1, b"\xff" * 0x2000, None)


def _write_io_bitmaps(l1: L1, bits: bytes | bytearray, vmcs: Vmcs | None) -> None:
    l1.write(l1.sym("io_bitmap_a"), bytes(bits[:0x1000]))
    l1.write(l1.sym("io_bitmap_b"), bytes(bits[0x1000:]))
    vmcs = vmcs or l1.vmcs
    vmcs[Field.IO_BITMAP_A] = l1.sym("io_bitmap_a")
    vmcs[Field.IO_BITMAP_B] = l1.sym("io_bitmap_b")


def set_msr_bitmap(
    l1: L1, accesses: Iterable[tuple[str, int]] = (), *, inverted: bool = False
) -> None:
    """Let exactly these (part, MSR) accesses exit, or with ``inverted`` all but these."""
    bits = bytearray(0x1000)
    for part, msr in accesses:
        offset, first = MSR_PARTS[part]
        bits[offset + (msr - first) // 8] |= 1 << (msr - first) % 8
    content = bytes(b ^ 0xFF for b in bits) if inverted else bytes(bits)
    l1.write(l1.sym("msr_bitmap"), content)
    l1.vmcs[Field.MSR_BITMAP] = l1.sym("msr_bitmap")
