"""VM entry checks the guest's control registers: CR0, CR3, CR4 and what modes need of them."""

from __future__ import annotations

import pytest

from kvmnest.l1 import L1, L2Mode, code
from kvmnest.suite.support.entries import (
    BAD_GUEST,
    EPT_OR_NOT,
    Entries,
    address_bits,
    each,
    entries,
    expect_accepted,
    expect_refused,
    flips,
)
from kvmnest.suite.support.guest import Guest
from kvmnest.vmx import Cr0, Cr4, Efer, EntryCtl, Field, Proc2Ctl
from kvmnest.vmx.outcome import Succeed

pytestmark = [
    pytest.mark.series(14),
    pytest.mark.sdm("Checks on Guest Control Registers, Debug Registers, and MSRs"),
]

_CR0, _CR3, _CR4 = Field.GUEST_CR0, Field.GUEST_CR3, Field.GUEST_CR4
_EFER = Field.GUEST_IA32_EFER
_PAGING = int(Cr0.PE | Cr0.PG)
_NOT_CHECKED = int(Cr0.NW | Cr0.CD)

needs_unrestricted = pytest.mark.needs(Proc2Ctl.ENABLE_EPT, Proc2Ctl.UNRESTRICTED_GUEST)


# --- CR0 ---


@EPT_OR_NOT
@pytest.mark.parametrize("mode", [L2Mode.LONG, L2Mode.PROTECTED], ids=lambda mode: mode.name)
def test_cr0_fixed_bits(l1: L1, mode: L2Mode, ept: bool) -> None:
    """GUEST_CR0 obeys the fixed bits, PE and PG among them."""
    tries = entries(l1, mode=mode, ept=ept)
    cr0, caps = tries.vmcs[_CR0], l1.caps
    must = [bit for bit in range(64) if (caps.cr0_fixed0 & ~_NOT_CHECKED) >> bit & 1]
    must_not = [bit for bit in range(64) if (~caps.cr0_fixed1 & ~_NOT_CHECKED) >> bit & 1]
    assert {0, 5, 31} <= set(must)
    assert set(range(32, 64)) <= set(must_not)
    expect_refused(tries, BAD_GUEST, each(_CR0, [*flips(cr0, must + must_not), cr0 & ~_PAGING]))
    expect_accepted(tries, each(_CR0, [cr0 ^ bit for bit in (Cr0.TS, Cr0.MP, Cr0.AM, Cr0.WP)]))


@needs_unrestricted
@pytest.mark.parametrize(
    "mode", [L2Mode.PROTECTED, L2Mode.UNPAGED, L2Mode.REAL], ids=lambda mode: mode.name
)
def test_cr0_of_unrestricted_guest(l1: L1, mode: L2Mode) -> None:
    """PE and PG are free for an unrestricted guest, other fixed bits are not."""
    tries = entries(l1, mode=mode)
    tries.vmcs.update(tries.using(Proc2Ctl.UNRESTRICTED_GUEST))
    cr0, caps = tries.vmcs[_CR0], l1.caps
    must = [bit for bit in range(64) if (caps.cr0_fixed0 & ~_PAGING & ~_NOT_CHECKED) >> bit & 1]
    assert 5 in must
    expect_refused(tries, BAD_GUEST, each(_CR0, flips(cr0, [*must, *range(32, 64)])))


@needs_unrestricted
def test_paging_needs_protection(l1: L1) -> None:
    """CR0.PG without CR0.PE is refused even of an unrestricted guest."""
    tries = entries(l1, mode=L2Mode.PROTECTED)
    tries.vmcs.update(tries.using(Proc2Ctl.UNRESTRICTED_GUEST))
    expect_refused(tries, BAD_GUEST, [{_CR0: tries.vmcs[_CR0] & ~Cr0.PE}])
    real = entries_of_real_mode(l1)
    expect_refused(real, BAD_GUEST, [{_CR0: real.vmcs[_CR0] | Cr0.PG}])


def entries_of_real_mode(l1: L1) -> Entries:
    """Make another VMCS, of an L2 in real mode."""
    l1.load_vmcs("vmcs_b", mode=L2Mode.REAL)
    return Entries(l1)


# --- CR4 ---


@EPT_OR_NOT
def test_cr4_fixed_bits(l1: L1, ept: bool) -> None:
    """GUEST_CR4 obeys the fixed bits, VMXE among them."""
    tries = entries(l1, ept=ept)
    cr4, caps = tries.vmcs[_CR4], l1.caps
    must = [bit for bit in range(64) if caps.cr4_fixed0 >> bit & 1]
    must_not = [bit for bit in range(64) if ~caps.cr4_fixed1 >> bit & 1]
    assert 13 in must
    assert set(range(33, 64)) <= set(must_not)
    expect_refused(tries, BAD_GUEST, each(_CR4, flips(cr4, must + must_not)))
    expect_accepted(tries, each(_CR4, [cr4 ^ bit for bit in (Cr4.TSD, Cr4.DE, Cr4.PGE, Cr4.PSE)]))


@EPT_OR_NOT
def test_ia32e_mode_needs_pae(l1: L1, ept: bool) -> None:
    """ "IA-32e mode guest" with CR4.PAE 0 is refused."""
    tries = entries(l1, ept=ept)
    cr4 = tries.vmcs[_CR4]
    expect_refused(tries, BAD_GUEST, each(_CR4, [cr4 & ~Cr4.PAE, cr4 & ~Cr4.PAE | Cr4.PSE]))


@needs_unrestricted
def test_ia32e_mode_needs_paging(l1: L1) -> None:
    """ "IA-32e mode guest" with CR0.PG 0 is refused, of an unrestricted guest, too."""
    tries = entries(l1, ept=True)
    tries.vmcs.update(tries.using(Proc2Ctl.UNRESTRICTED_GUEST))
    cr0 = tries.vmcs[_CR0]
    expect_refused(tries, BAD_GUEST, each(_CR0, [cr0 & ~Cr0.PG, cr0 & ~_PAGING]))


@EPT_OR_NOT
def test_pcide_needs_ia32e_mode(l1: L1, ept: bool) -> None:
    """CR4.PCIDE is refused outside IA-32e mode and allowed inside."""
    tries = entries(l1, ept=ept, mode=L2Mode.PAE)
    if not l1.caps.cr4_fixed1 & Cr4.PCIDE:
        pytest.skip("needs Cr4.PCIDE: IA32_VMX_CR4_FIXED1 allows only 0")
    expect_refused(tries, BAD_GUEST, [{_CR4: tries.vmcs[_CR4] | Cr4.PCIDE}])
    l1.load_vmcs("vmcs_b", ept=ept)
    long_mode = Entries(l1)
    expect_accepted(long_mode, [{_CR4: long_mode.vmcs[_CR4] | Cr4.PCIDE}])


# --- CR3 ---


@EPT_OR_NOT
@pytest.mark.parametrize(
    "mode", [L2Mode.LONG, L2Mode.PROTECTED, L2Mode.PAE], ids=lambda mode: mode.name
)
def test_cr3_width(l1: L1, mode: L2Mode, ept: bool) -> None:
    """GUEST_CR3 has no bit beyond the physical-address width, in any mode."""
    tries = entries(l1, mode=mode, ept=ept)
    physical, _ = address_bits(l1)
    cr3 = tries.vmcs[_CR3]
    # Bits 62:61 are legal on processors with linear-address masking.
    bad = [bit for bit in range(physical, 64) if bit not in (61, 62)]
    expect_refused(tries, BAD_GUEST, each(_CR3, flips(cr3, bad)))
    # PWT and PCD are legal.
    expect_accepted(tries, each(_CR3, [cr3 | 8, cr3 | 0x10]))


@needs_unrestricted
def test_cr3_width_without_paging(l1: L1) -> None:
    """GUEST_CR3 is checked even when the guest does not use paging."""
    tries = entries(l1, mode=L2Mode.UNPAGED)
    physical, _ = address_bits(l1)
    expect_refused(tries, BAD_GUEST, each(_CR3, [1 << physical, 1 << 51, 1 << 52, 1 << 63]))
    expect_accepted(tries, each(_CR3, [0x12345018, (1 << physical) - 0x1000]))


# --- EFER ---


@EPT_OR_NOT
@pytest.mark.needs(EntryCtl.LOAD_EFER)
def test_efer_reserved_bits(l1: L1, ept: bool) -> None:
    """GUEST_IA32_EFER sets no reserved bit, if it is loaded; otherwise it is not checked."""
    tries = entries(l1, ept=ept)
    load = tries.using(EntryCtl.LOAD_EFER)
    efer = tries.vmcs[_EFER]
    bad = flips(efer, [*range(1, 8), 9, *range(12, 64)])
    expect_refused(tries, BAD_GUEST, each(_EFER, bad, load))
    expect_accepted(tries, each(_EFER, [efer | Efer.SCE, efer & ~Efer.NXE], load))
    expect_accepted(tries, each(_EFER, [bad[0], bad[-1], (1 << 64) - 1]))


@EPT_OR_NOT
@pytest.mark.needs(EntryCtl.LOAD_EFER)
@pytest.mark.parametrize("mode", [L2Mode.LONG, L2Mode.PAE], ids=lambda mode: mode.name)
def test_efer_and_mode(l1: L1, mode: L2Mode, ept: bool) -> None:
    """LMA equals "IA-32e mode guest" and, with paging, LME; if EFER is loaded."""
    tries = entries(l1, mode=mode, ept=ept)
    load = tries.using(EntryCtl.LOAD_EFER)
    values = [0, int(Efer.LME), int(Efer.LMA), int(Efer.LME | Efer.LMA)]
    good = values.pop(3 if mode is L2Mode.LONG else 0)
    expect_refused(tries, BAD_GUEST, each(_EFER, values, load))
    expect_accepted(tries, [{**load, _EFER: good}, *each(_EFER, values)])


@needs_unrestricted
@pytest.mark.needs(EntryCtl.LOAD_EFER)
def test_efer_without_paging(l1: L1) -> None:
    """Without paging LME may be 1 while LMA is 0; LMA must still equal the control."""
    tries = entries(l1, mode=L2Mode.UNPAGED)
    load = tries.using(EntryCtl.LOAD_EFER)
    bad = [int(Efer.LMA), int(Efer.LMA | Efer.LME)]
    expect_refused(tries, BAD_GUEST, each(_EFER, bad, load))
    expect_accepted(tries, [{**load, _EFER: 0}, {**load, _EFER: int(Efer.LME)}])


# --- what is not loaded ---


@pytest.mark.sdm("Loading Guest Control Registers, Debug Registers, and MSRs")
@pytest.mark.parametrize("bits", [Cr0.CD, Cr0.NW, Cr0.CD | Cr0.NW], ids=["CD", "NW", "CD-NW"])
def test_cache_bits_are_not_loaded(l1: L1, bits: Cr0) -> None:
    """VM entry never modifies CD and NW: L2 has, and the exit saves, those of L1."""
    guest = Guest(l1)
    cr0 = guest.vmcs[_CR0]
    seen = guest.run(code.mov_from_cr(0, "rbx"), GUEST_CR0=cr0 | bits)
    assert seen == Succeed()
    assert (seen.regs["rbx"], *guest.vmcs.read(_CR0)) == (cr0, cr0)
