"""VM entry checks the access rights of each guest segment register: type, DPL, L and D/B."""

from __future__ import annotations

import pytest

from kvmnest.l1 import L1, L2Mode
from kvmnest.suite.support.entries import (
    BAD_GUEST,
    Entries,
    each,
    entries,
    expect_accepted,
    expect_refused,
)
from kvmnest.suite.support.segments import (
    CODE64,
    DATA,
    UNUSABLE,
    ldt,
    rights,
    selector,
    user_mode,
)
from kvmnest.vmx import Proc2Ctl

pytestmark = [pytest.mark.series(14), pytest.mark.sdm("Checks on Guest Segment Registers")]

_CS, _SS = rights("CS"), rights("SS")
_DATA = ("DS", "ES", "FS", "GS")
_MODES = pytest.mark.parametrize("mode", [L2Mode.LONG, L2Mode.PROTECTED], ids=lambda m: m.name)

needs_unrestricted = pytest.mark.needs(Proc2Ctl.ENABLE_EPT, Proc2Ctl.UNRESTRICTED_GUEST)


def _types(value: int, allowed: tuple[int, ...]) -> tuple[list[int], list[int]]:
    """Access rights of each type: those to be refused and those allowed."""
    values = {kind: value & ~0xF | kind for kind in range(16)}
    return [values[k] for k in range(16) if k not in allowed], [values[k] for k in allowed]


def _unrestricted(l1: L1, mode: L2Mode) -> Entries:
    tries = entries(l1, mode=mode)
    tries.vmcs.update(tries.using(Proc2Ctl.UNRESTRICTED_GUEST))
    return tries


# --- CS ---


@_MODES
def test_cs_type(l1: L1, mode: L2Mode) -> None:
    """CS is an accessed code segment: type 9, 11, 13 or 15."""
    tries = entries(l1, mode=mode)
    bad, good = _types(tries.vmcs[_CS], (9, 11, 13, 15))
    expect_refused(tries, BAD_GUEST, each(_CS, bad))
    expect_accepted(tries, each(_CS, good))


@needs_unrestricted
def test_cs_type_of_unrestricted_guest(l1: L1) -> None:
    """Of an unrestricted guest CS may also be of type 3, with DPL 0."""
    tries = _unrestricted(l1, L2Mode.PROTECTED)
    bad, good = _types(tries.vmcs[_CS], (3, 9, 11, 13, 15))
    expect_refused(tries, BAD_GUEST, each(_CS, bad))
    expect_accepted(tries, each(_CS, good))
    expect_refused(tries, BAD_GUEST, each(_CS, [good[0] | dpl << 5 for dpl in (1, 2, 3)]))
    # SS.DPL must then be 0, too.
    expect_refused(tries, BAD_GUEST, each(_SS, [DATA | 3 << 5], {_CS: good[0]}))


def test_cs_dpl_at_cpl_0(l1: L1) -> None:
    """DPL of CS: that of SS if not conforming, at most that of SS if conforming; here 0."""
    tries = entries(l1)
    bad = [CODE64 & ~0xF | kind | dpl << 5 for kind in (9, 11, 13, 15) for dpl in (1, 2, 3)]
    expect_refused(tries, BAD_GUEST, each(_CS, bad))


def test_cs_dpl_at_cpl_3(l1: L1) -> None:
    """At CPL 3 (SS.DPL 3) non-conforming code has DPL 3, conforming code any."""
    tries = entries(l1)
    tries.vmcs.update(user_mode(l1))
    plain = [CODE64 & ~0xF | kind | dpl << 5 for kind in (9, 11) for dpl in (0, 1, 2)]
    expect_refused(tries, BAD_GUEST, each(_CS, plain))
    conforming = [CODE64 & ~0xF | kind | dpl << 5 for kind in (13, 15) for dpl in range(4)]
    expect_accepted(tries, each(_CS, conforming))


@needs_unrestricted
def test_cs_dpl_of_unrestricted_guest(l1: L1) -> None:
    """CS.DPL is compared with SS.DPL for unrestricted guests, too."""
    tries = _unrestricted(l1, L2Mode.LONG)
    bad = [CODE64 & ~0xF | kind | dpl << 5 for kind in (9, 11, 13, 15) for dpl in (1, 2, 3)]
    expect_refused(tries, BAD_GUEST, each(_CS, bad))


def test_cs_long_and_db(l1: L1) -> None:
    """In IA-32e mode L and D/B of CS are not both 1."""
    tries = entries(l1)
    expect_refused(tries, BAD_GUEST, [{_CS: CODE64 | 0x4000}])


def test_cs_long_and_db_outside_ia32e_mode(l1: L1) -> None:
    """Outside IA-32e mode L of CS is not looked at."""
    tries = entries(l1, mode=L2Mode.PROTECTED)
    expect_accepted(tries, [{_CS: tries.vmcs[_CS] | 0x2000}])


# --- SS ---


@_MODES
def test_ss_type(l1: L1, mode: L2Mode) -> None:
    """A usable SS is accessed read/write data: type 3 or 7."""
    tries = entries(l1, mode=mode)
    bad, good = _types(tries.vmcs[_SS], (3, 7))
    expect_refused(tries, BAD_GUEST, each(_SS, bad))
    expect_accepted(tries, each(_SS, good))


def test_ss_dpl(l1: L1) -> None:
    """DPL of SS equals the RPL of its selector, CS conforming or not."""
    tries = entries(l1)
    values = [DATA | dpl << 5 for dpl in (1, 2, 3)]
    expect_refused(tries, BAD_GUEST, each(_SS, values))
    expect_refused(tries, BAD_GUEST, each(_SS, values, {_CS: CODE64 | 4}))


def test_ss_dpl_when_unusable(l1: L1) -> None:
    """DPL of SS is the CPL and must equal the RPL even when SS is unusable."""
    tries = entries(l1)
    values = [UNUSABLE | dpl << 5 for dpl in (1, 2, 3)]
    expect_refused(tries, BAD_GUEST, each(_SS, values, {_CS: CODE64 | 4}))
    expect_accepted(tries, [{_SS: UNUSABLE}])


@needs_unrestricted
def test_ss_dpl_in_real_mode(l1: L1) -> None:
    """With CR0.PE 0 the DPL of SS is 0."""
    tries = _unrestricted(l1, L2Mode.REAL)
    expect_refused(tries, BAD_GUEST, each(_SS, [0x93 | dpl << 5 for dpl in (1, 2, 3)]))


@needs_unrestricted
def test_rpl_of_unrestricted_guest(l1: L1) -> None:
    """RPLs of CS and SS are not compared for unrestricted guests, nor SS.DPL with its RPL."""
    tries = _unrestricted(l1, L2Mode.LONG)
    ss = tries.vmcs[selector("SS")]
    expect_accepted(tries, each(selector("SS"), [ss | rpl for rpl in (1, 2, 3)]))


# --- DS, ES, FS, GS ---


@pytest.mark.parametrize(
    "guest", ["restricted", pytest.param("unrestricted", marks=needs_unrestricted)]
)
def test_data_type(l1: L1, guest: str) -> None:
    """A data segment register is accessed and, if it holds code, readable."""
    restricted = guest == "restricted"
    tries = entries(l1) if restricted else _unrestricted(l1, L2Mode.LONG)
    bad, good = _types(DATA, (1, 3, 5, 7, 11, 15))
    expect_refused(tries, BAD_GUEST, [{rights(name): value} for name in _DATA for value in bad])
    expect_accepted(tries, [{rights(name): value} for name in _DATA for value in good])


def test_data_dpl(l1: L1) -> None:
    """DPL is not below the RPL of the selector, unless the segment is conforming code."""
    tries = entries(l1)
    for name in _DATA:
        expect_dpl(tries, name)


def expect_dpl(tries: Entries, name: str) -> None:
    """Assert that DPL and RPL of one data segment register are compared."""
    field = selector(name)
    pairs = [(rpl, dpl) for rpl in range(4) for dpl in range(4)]
    for kind in (1, 3, 5, 7, 11):
        value = DATA & ~0xF | kind
        bad = [
            {field: 0x10 | rpl, rights(name): value | dpl << 5} for rpl, dpl in pairs if dpl < rpl
        ]
        if kind == 3:
            expect_refused(tries, BAD_GUEST, bad)
        else:
            expect_refused(tries, BAD_GUEST, [bad[0], bad[-1]])
    fine = [{field: 0x10 | rpl, rights(name): DATA | dpl << 5} for rpl, dpl in pairs if dpl >= rpl]
    expect_accepted(tries, fine)
    expect_accepted(tries, [{field: 0x13, rights(name): DATA & ~0xF | 15}])


@needs_unrestricted
def test_data_dpl_of_unrestricted_guest(l1: L1) -> None:
    """DPL and RPL are not compared for unrestricted guests."""
    tries = _unrestricted(l1, L2Mode.LONG)
    expect_accepted(tries, [{selector(name): 0x10 | rpl} for name in _DATA for rpl in (1, 2, 3)])


# --- TR and LDTR ---


def test_tr_type_in_ia32e_mode(l1: L1) -> None:
    """In IA-32e mode TR is a busy 64-bit TSS: type 11."""
    tries = entries(l1)
    bad, good = _types(0x8B, (11,))
    expect_refused(tries, BAD_GUEST, each(rights("TR"), bad))
    expect_accepted(tries, each(rights("TR"), good))


def test_tr_type_outside_ia32e_mode(l1: L1) -> None:
    """Outside IA-32e mode TR is a busy 16-bit or 32-bit TSS: type 3 or 11."""
    tries = entries(l1, mode=L2Mode.PROTECTED)
    bad, good = _types(0x8B, (3, 11))
    expect_refused(tries, BAD_GUEST, each(rights("TR"), bad))
    expect_accepted(tries, each(rights("TR"), good))


@_MODES
def test_tr_unusable(l1: L1, mode: L2Mode) -> None:
    """TR is never unusable."""
    tries = entries(l1, mode=mode)
    expect_refused(tries, BAD_GUEST, each(rights("TR"), [UNUSABLE, UNUSABLE | 0x8B]))
    # DPL, AVL, L and D/B of TR do not matter.
    expect_accepted(tries, each(rights("TR"), [0x8B | bits for bits in (0x60, 0x1000, 0x6000)]))


@_MODES
def test_ldtr_type(l1: L1, mode: L2Mode) -> None:
    """A usable LDTR is an LDT: type 2."""
    tries = entries(l1, mode=mode)
    tries.vmcs.update(ldt(l1))
    bad, good = _types(0x82, (2,))
    expect_refused(tries, BAD_GUEST, each(rights("LDTR"), bad))
    expect_accepted(tries, each(rights("LDTR"), [*good, 0x82 | 0x60, 0x82 | 0x7000]))
