"""VM entry checks the VMCS link pointer (qualification 4) and the PDPTEs (qualification 2)."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from kvmnest.l1 import L1, L2Mode
from kvmnest.suite.support.entries import (
    Entries,
    address_bits,
    bad_pages,
    each,
    entries,
    expect_accepted,
    expect_refused,
    flips,
)
from kvmnest.vmx import ExitReason, Field, Proc2Ctl
from kvmnest.vmx.outcome import EntryFailure, Exit, Succeed

pytestmark = [pytest.mark.series(14)]

_LINK = Field.VMCS_LINK_POINTER
_BAD_LINK = EntryFailure(ExitReason.INVALID_GUEST_STATE, qualification=4)
_BAD_PDPTE = EntryFailure(ExitReason.INVALID_GUEST_STATE, qualification=2)
_SHADOW = 1 << 31

link_pointer = pytest.mark.sdm("Checks on Guest Non-Register State")
pdptes = pytest.mark.sdm("Checks on Guest Page-Directory-Pointer-Table Entries")


# --- VMCS link pointer ---

SHADOWING = pytest.mark.parametrize(
    "shadowing",
    [
        pytest.param(False, id="ordinary"),
        pytest.param(True, id="shadowing", marks=pytest.mark.needs(Proc2Ctl.VMCS_SHADOWING)),
    ],
)


def _linking(l1: L1, shadowing: bool) -> tuple[Entries, int]:
    """Make a VMCS, and another one (shadow or not) that the link pointer may name."""
    tries = entries(l1)
    if shadowing:
        tries.vmcs.update(tries.using(Proc2Ctl.VMCS_SHADOWING))
        tries.vmcs[Field.VMREAD_BITMAP] = l1.sym("vmread_bitmap")
        tries.vmcs[Field.VMWRITE_BITMAP] = l1.sym("vmwrite_bitmap")
    revision = l1.caps.basic.revision_id
    region = l1.prepare_region(l1.sym("shadow_vmcs"), revision | shadowing * _SHADOW)
    return tries, region


@link_pointer
@SHADOWING
def test_link_pointer_address(l1: L1, shadowing: bool) -> None:
    """A link pointer that is used is page aligned and inside the physical width."""
    tries, region = _linking(l1, shadowing)
    bad = [value for value in bad_pages(l1, region) if value != (1 << 64) - 1]
    expect_refused(tries, _BAD_LINK, each(_LINK, [*bad, (1 << 64) - 2, 0xFFFFFFFF]))
    expect_accepted(tries, [{_LINK: region}, {_LINK: (1 << 64) - 1}])


@link_pointer
@SHADOWING
def test_link_pointer_revision(l1: L1, shadowing: bool) -> None:
    """The link pointer leads to the VMCS revision identifier, all 31 bits of it."""
    tries, region = _linking(l1, shadowing)
    tries.vmcs[_LINK] = region
    good = l1.read_int(region, 4)
    wrong = []
    for value in [*flips(good, range(31)), shadowing * _SHADOW, 0xFFFFFFFF]:
        l1.write_int(region, value, 4)
        if (outcome := tries({})) != _BAD_LINK:
            wrong.append(f"{value:#x}: {outcome!r}")
    assert not wrong
    l1.write_int(region, good, 4)
    expect_accepted(tries, [{}])


@link_pointer
@SHADOWING
def test_link_pointer_kind(l1: L1, shadowing: bool) -> None:
    """The link pointer leads to a shadow VMCS exactly when VMCS shadowing is enabled."""
    tries, region = _linking(l1, shadowing)
    revision = l1.caps.basic.revision_id
    l1.prepare_region(region, revision | (not shadowing) * _SHADOW)
    expect_refused(tries, _BAD_LINK, [{_LINK: region}])
    l1.prepare_region(region, revision | shadowing * _SHADOW)
    expect_accepted(tries, [{_LINK: region}])


@link_pointer
@SHADOWING
def test_link_pointer_after_a_bad_one(l1: L1, shadowing: bool) -> None:
    """A link pointer that was good is good again after one that leads nowhere."""
    tries, region = _linking(l1, shadowing)
    nowhere = (1 << address_bits(l1)[0]) - 0x1000
    tries.vmcs[_LINK] = region
    assert l1.vmlaunch() == Exit(ExitReason.VMCALL)
    tries.vmcs[_LINK] = nowhere
    assert l1.vmresume() == _BAD_LINK
    tries.vmcs[_LINK] = region
    assert l1.vmresume() == Exit(ExitReason.VMCALL)


@link_pointer
def test_link_pointer_to_current_vmcs(l1: L1) -> None:
    """The link pointer is not the current VMCS; another VMCS in use is fine."""
    tries, _ = _linking(l1, False)
    other = l1.prepare_region(l1.sym("vmcs_b"))
    assert l1.vmclear(other) == Succeed()
    expect_refused(tries, _BAD_LINK, [{_LINK: tries.vmcs.address}])
    expect_accepted(tries, [{_LINK: other}])


@link_pointer
@SHADOWING
def test_link_pointer_without_memory(l1: L1, shadowing: bool) -> None:
    """Where no memory is there is no revision identifier."""
    tries, _ = _linking(l1, shadowing)
    physical, _ = address_bits(l1)
    nowhere = [l1.sym("RAM_SIZE"), 0x10000000, (1 << physical) - 0x1000]
    expect_refused(tries, _BAD_LINK, each(_LINK, nowhere))


# --- PDPTEs ---

_PDPTRS = (Field.GUEST_PDPTR0, Field.GUEST_PDPTR1, Field.GUEST_PDPTR2, Field.GUEST_PDPTR3)


def _reserved(l1: L1) -> list[int]:
    """Bits of a PDPTE that must be 0 when it is present."""
    return [1, 2, 5, 6, 7, 8, *range(address_bits(l1)[0], 64)]


@pdptes
@pytest.mark.needs(Proc2Ctl.ENABLE_EPT)
def test_pdpte_in_vmcs(l1: L1) -> None:
    """With EPT the PDPTEs of the VMCS are checked: no reserved bit in a present one."""
    tries = entries(l1, mode=L2Mode.PAE, ept=True)
    reserved = _reserved(l1)
    for field in _PDPTRS:
        entry = tries.vmcs.fields()[field] | 1
        expect_refused(tries, _BAD_PDPTE, each(field, flips(entry, reserved)))
        # PWT, PCD and the ignored bits 11:9 are legal.
        expect_accepted(tries, each(field, [entry | 8, entry | 0x10, entry | 0xE00]))


@pdptes
@pytest.mark.needs(Proc2Ctl.ENABLE_EPT)
def test_pdpte_not_present_in_vmcs(l1: L1) -> None:
    """A PDPTE that is not present is not checked."""
    tries = entries(l1, mode=L2Mode.PAE, ept=True)
    values = [0x1E6, 1 << 63, (1 << 64) - 2]
    expect_accepted(tries, [{field: value} for field in _PDPTRS[1:] for value in values])


@pdptes
@pytest.mark.needs(Proc2Ctl.ENABLE_EPT)
@pytest.mark.parametrize("mode", [L2Mode.LONG, L2Mode.PROTECTED], ids=lambda mode: mode.name)
def test_pdpte_fields_without_pae_paging(l1: L1, mode: L2Mode) -> None:
    """Without PAE paging the PDPTE fields are not checked."""
    tries = entries(l1, mode=mode, ept=True)
    values = (0x1E7, (1 << 64) - 1)
    expect_accepted(tries, [{field: value} for field in _PDPTRS for value in values])


@pdptes
@pytest.mark.needs(Proc2Ctl.ENABLE_EPT, Proc2Ctl.UNRESTRICTED_GUEST)
def test_pdpte_fields_without_paging(l1: L1) -> None:
    """Without paging the PDPTE fields are not checked, CR4.PAE or not."""
    tries = entries(l1, mode=L2Mode.UNPAGED)
    pae = {Field.GUEST_CR4: tries.vmcs[Field.GUEST_CR4] | 1 << 5}
    cases = [{field: value, **pae} for field in _PDPTRS for value in (0x1E7, (1 << 64) - 1)]
    expect_accepted(tries, cases)


def _table(l1: L1, address: int, entries_: Sequence[int]) -> None:
    for number, value in enumerate(entries_):
        l1.write_int(address + 8 * number, value)


@pdptes
def test_pdpte_in_memory(l1: L1) -> None:
    """Without EPT the PDPTEs that CR3 leads to are checked, if they are present."""
    tries = entries(l1, mode=L2Mode.PAE, ept=False)
    good = [l1.read_int(l1.sym("l2_pae_pdpt") + 8 * number) for number in range(4)]
    tables = [
        [*good[:number], value, *good[number + 1 :]]
        for number in range(4)
        for value in flips(good[number] | 1, _reserved(l1))
    ]
    # A table for each value: 32 bytes each, aligned.
    area = l1.alloc((32 * len(tables) + 4095) // 4096)
    for number, table in enumerate(tables):
        _table(l1, area + 32 * number, table)
    places = [area + 32 * number for number in range(len(tables))]
    expect_refused(tries, _BAD_PDPTE, each(Field.GUEST_CR3, places))
    absent = l1.alloc()
    _table(l1, absent, [good[0], 0x1E6, (1 << 64) - 2, good[3] & ~1 | 1 << 63])
    expect_accepted(tries, each(Field.GUEST_CR3, [absent]))


@pdptes
def test_pdpte_table_alignment(l1: L1) -> None:
    """Without EPT the table is aligned to 32 bytes; CR3 bits 4:0 are not part of its address."""
    tries = entries(l1, mode=L2Mode.PAE, ept=False)
    good = [l1.read_int(l1.sym("l2_pae_pdpt") + 8 * number) for number in range(4)]
    page = l1.alloc()
    _table(l1, page, [1 | 1 << 8] * 512)
    for offset in (0x20, 0x7E0, 0xFE0):
        expect_refused(tries, _BAD_PDPTE, [{Field.GUEST_CR3: page + offset}])
        _table(l1, page + offset, good)
        expect_accepted(tries, each(Field.GUEST_CR3, [page + offset, page + offset + 0x18]))


@pdptes
def test_pdpte_fields_without_ept(l1: L1) -> None:
    """Without EPT the PDPTE fields of the VMCS, where they exist, are not checked."""
    if not l1.caps.supports(Proc2Ctl.ENABLE_EPT):
        pytest.skip("needs the PDPTE fields: Proc2Ctl.ENABLE_EPT is not supported")
    tries = entries(l1, mode=L2Mode.PAE, ept=False)
    values = (0x1E7, (1 << 64) - 1)
    expect_accepted(tries, [{field: value} for field in _PDPTRS for value in values])
