"""The virtual-APIC page of L2, with virtual-interrupt delivery and x2APIC MSRs.

Names and rules: SDM, "Virtual APIC State" and "Evaluation and Delivery of Virtual Interrupts".
"""

from __future__ import annotations

import enum
from collections.abc import Iterable

from kvmnest.l1 import L1
from kvmnest.suite.support.apic import Apic
from kvmnest.suite.support.bitmaps import set_msr_bitmap
from kvmnest.suite.support.guest import Guest
from kvmnest.vmx import ExitCtl, ExitReason, Field, PinCtl, Proc2Ctl, ProcCtl
from kvmnest.vmx.outcome import Exit

#: Offsets of registers in the page.
VTPR, VPPR, VEOI, VISR, VTMR, VIRR, VICR_LO = 0x80, 0xA0, 0xB0, 0x100, 0x180, 0x200, 0x300
#: What L2 needs so that virtual interrupts are delivered to it, by x2APIC MSRs.
DELIVERY = (
    PinCtl.EXTERNAL_INTERRUPT_EXITING,
    ProcCtl.USE_TPR_SHADOW,
    ProcCtl.USE_MSR_BITMAPS,
    Proc2Ctl.VIRTUALIZE_X2APIC_MODE,
    Proc2Ctl.APIC_REGISTER_VIRTUALIZATION,
    Proc2Ctl.VIRTUAL_INTERRUPT_DELIVERY,
)
#: What L2 needs beside so that interrupts can be posted to it.
POSTED = (
    *DELIVERY,
    PinCtl.PROCESS_POSTED_INTERRUPTS,
    ExitCtl.ACKNOWLEDGE_INTERRUPT_ON_EXIT,
)
#: The vector that tells the processor to look at the posted-interrupt descriptor.
NOTIFICATION = 0xF2
_OUTSTANDING = 256  # the bit behind the 256 of the posted-interrupt requests
_SOFTWARES = 0x5A << 247  # in the bits behind, which belong to software
_EOI_EXIT_BITMAPS = (
    *(Field.EOI_EXIT_BITMAP0, Field.EOI_EXIT_BITMAP1),
    *(Field.EOI_EXIT_BITMAP2, Field.EOI_EXIT_BITMAP3),
)


class VirtualApic:
    """A guest with virtual-interrupt delivery, and its virtual-APIC page, all registers 0."""

    def __init__(self, l1: L1, *more: enum.IntFlag, without: Iterable[enum.IntFlag] = ()) -> None:
        self.l1, self.page = l1, l1.sym("virtual_apic")
        left_out = tuple(without)
        self.guest = Guest(l1, *(flag for flag in DELIVERY if flag not in left_out), *more)
        set_msr_bitmap(l1)
        l1.write(self.page, bytes(4096))
        vmcs = self.guest.vmcs
        vmcs[Field.VIRTUAL_APIC_PAGE_ADDR] = self.page
        vmcs[Field.TPR_THRESHOLD] = 0
        self.exit_on_eoi(())
        self.set()

    def __repr__(self) -> str:
        return "<virtual APIC of L2>"

    def set(
        self,
        *,
        requested: Iterable[int] = (),
        in_service: Iterable[int] = (),
        tpr: int = 0,
        rvi: int | None = None,
        svi: int | None = None,
    ) -> None:
        """State as a hypervisor keeps it: RVI and SVI are the highest vectors unless given."""
        requested, in_service = tuple(requested), tuple(in_service)
        self._write_vectors(VIRR, requested)
        self._write_vectors(VISR, in_service)
        self.l1.write_int(self.page + VTPR, tpr, 4)
        status = max(requested, default=0) if rvi is None else rvi
        status |= (max(in_service, default=0) if svi is None else svi) << 8
        self.guest.vmcs[Field.GUEST_INTR_STATUS] = status

    def state(self) -> tuple[list[int], list[int], int, int]:
        """Vectors requested, vectors in service, RVI and SVI."""
        (status,) = self.guest.vmcs.read(Field.GUEST_INTR_STATUS)
        return self.vectors(VIRR), self.vectors(VISR), status & 0xFF, status >> 8

    def register(self, offset: int) -> int:
        """Four bytes of the page."""
        return self.l1.read_int(self.page + offset, 4)

    def exit_on_eoi(self, vectors: Iterable[int]) -> None:
        """Let the EOI of exactly these vectors exit."""
        bits = sum(1 << vector for vector in set(vectors))
        for number, field in enumerate(_EOI_EXIT_BITMAPS):
            self.guest.vmcs[field] = bits >> 64 * number & (1 << 64) - 1

    def eoi_exit(self, vector: int, offset: int) -> Exit:
        """The exit that the EOI of a vector causes, behind the instruction."""
        return self.guest.exit(ExitReason.VIRTUALIZED_EOI, offset=offset, qualification=vector)

    def vectors(self, first: int) -> list[int]:
        """Vectors whose bit is set in the eight registers from ``first``."""
        parts = [self.register(first + 16 * number) for number in range(8)]
        return [
            32 * n + bit for n, part in enumerate(parts) for bit in range(32) if part >> bit & 1
        ]

    def _write_vectors(self, first: int, vectors: Iterable[int]) -> None:
        bits = sum(1 << vector for vector in vectors)
        for number in range(8):
            address = self.page + first + 16 * number
            self.l1.write_int(address, bits >> 32 * number & 0xFFFFFFFF, 4)


class PostedInterrupts:
    """L2 with virtual-interrupt delivery and a posted-interrupt descriptor, and L1's APIC."""

    def __init__(self, l1: L1) -> None:
        self.l1, self.apic = l1, Apic(l1)
        self.virtual = VirtualApic(
            l1, PinCtl.PROCESS_POSTED_INTERRUPTS, ExitCtl.ACKNOWLEDGE_INTERRUPT_ON_EXIT
        )
        self.guest = self.virtual.guest
        self.descriptor = l1.alloc() + 64
        self.guest.vmcs[Field.POSTED_INTR_NV] = NOTIFICATION
        self.guest.vmcs[Field.POSTED_INTR_DESC_ADDR] = self.descriptor

    def __repr__(self) -> str:
        return "<posted interrupts of L2>"

    def post(self, vectors: Iterable[int], outstanding: bool = True) -> None:
        """Fill in the descriptor; the rest of it belongs to software."""
        bits = sum(1 << vector for vector in vectors) | outstanding << _OUTSTANDING
        self.l1.write_int(self.descriptor, bits | _SOFTWARES << 257, 64)

    def left(self) -> tuple[list[int], bool]:
        """Vectors that are still posted, and whether a notification is outstanding."""
        bits = self.l1.read_int(self.descriptor, 64)
        assert bits >> 257 == _SOFTWARES
        return [n for n in range(256) if bits >> n & 1], bool(bits >> _OUTSTANDING & 1)

    def dismissed(self) -> bool:
        """Whether the notification is gone from L1's local APIC."""
        return (self.apic.requested(), self.apic.in_service()) == ([], [])
