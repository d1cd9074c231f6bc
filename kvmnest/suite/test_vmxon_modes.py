"""VMXON and the bits of CR0 and CR4: those that VMX operation fixes, and those it leaves free."""

from __future__ import annotations

import struct

import pytest

from kvmnest.kvm.exits import IoExit
from kvmnest.l1 import L1, code
from kvmnest.vmx import Cr0, Cr4, Efer, Vector
from kvmnest.vmx.outcome import Fault, Succeed

pytestmark = [pytest.mark.series(3), pytest.mark.sdm("Restrictions on VMX Operation")]

GP = Fault(Vector.GP, error_code=0, rip=0)
_USER_PAGE = 4
#: Bits that L1 cannot flip in 64-bit mode; without VMXE VMXON is #UD.
_OF_THE_MODE = Cr4.PAE | Cr4.LA57 | Cr4.VMXE


@pytest.mark.parametrize(
    "flipped",
    [*(Cr0.MP, Cr0.EM, Cr0.TS, Cr0.NE, Cr0.WP, Cr0.AM, Cr0.CD), Cr0.CD | Cr0.NW],
    ids=lambda bits: "-".join(bit.name for bit in bits),
)
def test_each_bit_of_cr0(l1: L1, flipped: Cr0) -> None:
    """With a CR0 that differs in one bit VMXON succeeds, unless FIXED0 or FIXED1 forbids it."""
    cr0 = l1.read_cr(0).value
    assert l1.write_cr(0, cr0 ^ flipped) == Succeed()
    assert l1.read_cr(0) == Succeed(cr0 ^ flipped)
    fixed0, fixed1 = l1.caps.cr0_fixed0, l1.caps.cr0_fixed1
    allowed = (cr0 ^ flipped) & fixed0 == fixed0 and not (cr0 ^ flipped) & ~fixed1
    assert allowed == (flipped is not Cr0.NE)
    assert l1.vmxon() == (Succeed() if allowed else GP)
    assert l1.write_cr(0, cr0) == Succeed()
    if not allowed:
        assert l1.vmxon() == Succeed()


def test_each_bit_of_cr4(l1: L1) -> None:
    """A bit of CR4 that FIXED1 allows may be either at VMXON; another one L1 cannot even set."""
    # Pages for CPL 3 are not L1's own to use under SMEP and SMAP.
    top = l1.sym("l1_pml4")
    l1.write_int(top, l1.read_int(top) & ~_USER_PAGE)
    assert l1.write_cr(3, top) == Succeed()
    cr4, fixed1 = l1.read_cr(4).value, l1.caps.cr4_fixed1
    assert l1.caps.cr4_fixed0 == Cr4.VMXE
    for bit in (n for n in range(64) if not _OF_THE_MODE >> n & 1):
        flipped = cr4 ^ 1 << bit
        if flipped & ~fixed1:
            assert l1.write_cr(4, flipped) == GP, bit
            continue
        assert l1.write_cr(4, flipped) == Succeed(), bit
        assert l1.read_cr(4) == Succeed(flipped), bit
        assert l1.vmxon() == Succeed(), bit
        assert l1.vmxoff() == Succeed(), bit
        assert l1.write_cr(4, cr4) == Succeed(), bit


@pytest.mark.sdm("VMXON - Enter VMX Operation")
@pytest.mark.parametrize("cleared", [Cr0.PG, Cr0.PG | Cr0.PE], ids=["PG", "PG-PE"])
def test_without(l1: L1, cleared: Cr0) -> None:
    """Protected mode without paging: #GP(0), since CR0.PG is fixed; real mode: #UD.

    Such an L1 has exception tables of its own; it tells userspace the vector by an OUT.
    """
    protected = cleared == Cr0.PG
    # Real mode reaches this page by a segment.
    page = l1.sym("l2_data")
    stack = page + 0xFF0
    l1.write(page, b"\xf3\x0f\xc7" + (b"\x37" if protected else b"\x35") + code.out8(0xFF))
    for vector in (Vector.UD, Vector.GP):
        handler = 0x100 + 16 * vector
        l1.write(page + handler, code.out8(vector))
        if protected:
            # 32-bit interrupt gates.
            where, selector = page + handler, l1.sym("SEL_CODE32")
            gate = struct.pack("<HHHH", where & 0xFFFF, selector, 0x8E00, where >> 16)
        else:
            gate = struct.pack("<HH", handler, page >> 4)
        l1.write(page + 0x400 + len(gate) * vector, gate)
    sregs = l1.vcpu.get_sregs()
    sregs.cr0 &= ~cleared
    sregs.efer &= ~int(Efer.LMA | Efer.LME)
    sregs.idt.base, sregs.idt.limit = page + 0x400, 0x3FF
    sregs.cs.selector, sregs.cs.l, sregs.cs.db = l1.sym("SEL_CODE32"), 0, 1
    if not protected:
        sregs.cs.selector, sregs.cs.base, sregs.cs.db = page >> 4, page, 0
        for name in ("cs", "ss", "ds", "es", "fs", "gs"):
            register = getattr(sregs, name)
            register.limit, register.g = 0xFFFF, 0
        sregs.ss.db, sregs.ss.selector, sregs.ss.base = 0, page >> 4, page
    l1.vcpu.set_sregs(sregs)
    regs = l1.vcpu.get_regs()
    regs.rip, regs.rsp = (page, stack) if protected else (0, 0xFF0)
    # The operand is good.
    l1.write_int(page + 0xF00, l1.prepare_region(l1.sym("vmxon_region")))
    regs.rdi = page + 0xF00
    l1.vcpu.set_regs(regs)
    seen = l1.vcpu.run()
    assert isinstance(seen, IoExit)
    assert Vector(seen.port) == (Vector.GP if protected else Vector.UD)
    if protected:
        # Error code and EIP.
        assert [l1.read_int(stack - 16 + 4 * n, 4) for n in range(2)] == [0, page]
    else:
        assert l1.read_int(page + 0xFF0 - 6, 2) == 0
