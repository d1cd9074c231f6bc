"""VM entry checks the guest's segment registers: selectors, bases, limits, shared rights."""

from __future__ import annotations

import pytest

from kvmnest.l1 import L1, L2Mode
from kvmnest.suite.support.batch import Changes
from kvmnest.suite.support.entries import (
    BAD_GUEST,
    Entries,
    each,
    entries,
    expect_accepted,
    expect_refused,
    flips,
    not_canonical,
)
from kvmnest.suite.support.segments import (
    CODE64,
    DATA,
    EIGHT,
    SIX,
    UNUSABLE,
    base,
    ldt,
    limit,
    rights,
    selector,
    user_mode,
    v8086,
)
from kvmnest.vmx import Proc2Ctl

pytestmark = [pytest.mark.series(14), pytest.mark.sdm("Checks on Guest Segment Registers")]

#: KVM checks the segments of an ordinary guest itself and leaves those of an unrestricted one to
#: the processor.
GUESTS = pytest.mark.parametrize(
    "guest",
    [
        "restricted",
        pytest.param(
            "unrestricted",
            marks=pytest.mark.needs(Proc2Ctl.ENABLE_EPT, Proc2Ctl.UNRESTRICTED_GUEST),
        ),
    ],
)


def tries_of(l1: L1, guest: str, mode: L2Mode = L2Mode.LONG) -> Entries:
    """Make a VMCS of a restricted or unrestricted guest, with a usable LDTR."""
    tries = entries(l1, mode=mode)
    if guest == "unrestricted":
        tries.vmcs.update(tries.using(Proc2Ctl.UNRESTRICTED_GUEST))
    tries.vmcs.update(ldt(l1))
    return tries


# --- selectors ---


@GUESTS
def test_tr_selector_ti(l1: L1, guest: str) -> None:
    """TI of the TR selector must be 0."""
    tries = tries_of(l1, guest)
    tr = tries.vmcs[selector("TR")]
    expect_refused(tries, BAD_GUEST, [{selector("TR"): tr | 4}, {selector("TR"): tr | 7}])
    expect_accepted(tries, [{selector("TR"): tr | 3}])


@GUESTS
def test_ldtr_selector_ti(l1: L1, guest: str) -> None:
    """TI of the LDTR selector must be 0, unless LDTR is unusable."""
    tries = tries_of(l1, guest)
    ldtr = tries.vmcs[selector("LDTR")]
    expect_refused(tries, BAD_GUEST, each(selector("LDTR"), [ldtr | 4, 4, 0xFFFF]))
    unusable = {rights("LDTR"): UNUSABLE}
    expect_accepted(tries, each(selector("LDTR"), [ldtr | 4, 0xFFFF], unusable))
    expect_accepted(tries, [{selector("LDTR"): ldtr | 3}])


@pytest.mark.parametrize("mode", [L2Mode.LONG, L2Mode.PROTECTED], ids=lambda mode: mode.name)
def test_ss_and_cs_rpl(l1: L1, mode: L2Mode) -> None:
    """Without "unrestricted guest" the RPLs of SS and CS are equal, and SS.DPL, too."""
    tries = entries(l1, mode=mode)
    cs, ss = tries.vmcs[selector("CS")], tries.vmcs[selector("SS")]
    bad = [{selector("SS"): ss | rpl} for rpl in (1, 2, 3)]
    bad += [{selector("CS"): cs | rpl} for rpl in (1, 2, 3)]
    # SS.DPL follows its RPL, and a conforming CS allows any SS.DPL: only the RPLs differ.
    code = tries.vmcs[rights("CS")] | 4
    bad += [
        {selector("SS"): ss | rpl, rights("SS"): DATA | rpl << 5, rights("CS"): code}
        for rpl in (1, 2, 3)
    ]
    expect_refused(tries, BAD_GUEST, bad)


def test_rpl_of_an_unusable_ss(l1: L1) -> None:
    """An unusable SS has to have the RPL of CS, too."""
    tries = entries(l1)
    ss = tries.vmcs[selector("SS")]
    unusable = {rights("SS"): UNUSABLE}
    bad = [value | rpl for value in (0, ss & ~3) for rpl in (1, 2, 3)]
    expect_refused(tries, BAD_GUEST, each(selector("SS"), bad, unusable))
    expect_accepted(tries, each(selector("SS"), [0, ss & ~3, 0xFFFC], unusable))


# --- bases ---


@GUESTS
def test_base_canonical(l1: L1, guest: str) -> None:
    """The bases of FS, GS, TR and a usable LDTR are canonical."""
    tries = tries_of(l1, guest)
    bad = not_canonical(l1)
    names = ("FS", "GS", "TR", "LDTR")
    expect_refused(tries, BAD_GUEST, [{base(name): value} for name in names for value in bad])
    good = ((1 << 64) - 1, 1 << 32)
    expect_accepted(tries, [{base(name): value} for name in names for value in good])


def test_base_of_unusable_fs_and_gs(l1: L1) -> None:
    """FS and GS need a canonical base even when they are unusable."""
    tries = entries(l1)
    bad = not_canonical(l1)
    cases = [{rights(n): UNUSABLE, base(n): value} for n in ("FS", "GS") for value in bad]
    expect_refused(tries, BAD_GUEST, cases)


def test_base_of_unusable_ldtr(l1: L1) -> None:
    """The base of an unusable LDTR is not checked."""
    tries = entries(l1)
    expect_accepted(tries, each(base("LDTR"), not_canonical(l1), {rights("LDTR"): UNUSABLE}))


@GUESTS
def test_base_32_bits(l1: L1, guest: str) -> None:
    """Bits 63:32 of the bases of CS and of usable SS, DS and ES are 0."""
    tries = tries_of(l1, guest)
    bad = [*(1 << bit for bit in range(32, 64)), (1 << 64) - 1]
    names = ("CS", "SS", "DS", "ES")
    expect_refused(tries, BAD_GUEST, [{base(name): value} for name in names for value in bad])
    expect_accepted(tries, [{base(name): 0xFFFFFFFF} for name in names[1:]])


def test_base_of_unusable_segment(l1: L1) -> None:
    """The base of an unusable SS, DS or ES is not checked."""
    tries = entries(l1)
    for name in ("SS", "DS", "ES"):
        values = [1 << 32, 1 << 63, (1 << 64) - 1]
        expect_accepted(tries, each(base(name), values, {rights(name): UNUSABLE}))


# --- rules for all access rights ---


@GUESTS
def test_s_and_p(l1: L1, guest: str) -> None:
    """Usable segments are present; S is 1 for code and data, 0 for LDTR and TR."""
    tries = tries_of(l1, guest)
    known = tries.vmcs.fields()
    cases = [{rights(n): known[rights(n)] ^ bits} for n in EIGHT for bits in (0x80, 0x10, 0x90)]
    expect_refused(tries, BAD_GUEST, cases)


def test_reserved_bits(l1: L1) -> None:
    """Bits 31:17 and 11:8 of the access rights are 0, if VMWRITE did not drop them anyway."""
    tries = tries_of(l1, "restricted")
    reserved = 0xFFFE0F00
    good = {rights(name): tries.vmcs.fields()[rights(name)] for name in EIGHT}
    tries.vmcs.update({field: value | reserved for field, value in good.items()})
    stored = dict(zip(good, tries.vmcs.read(*good), strict=True))
    tries.vmcs.update(good)
    kept: list[Changes] = []
    for field, value in good.items():
        assert stored[field] & ~reserved == value
        for bit in range(32):
            if stored[field] & reserved & 1 << bit:
                kept.append({field: value | 1 << bit})
    expect_refused(tries, BAD_GUEST, kept)
    dropped = [{field: value | reserved & ~stored[field]} for field, value in good.items()]
    expect_accepted(tries, dropped)


@GUESTS
def test_granularity(l1: L1, guest: str) -> None:
    """G is 0 unless bits 11:0 of the limit are all 1, and 1 if any of bits 31:20 is."""
    tries = tries_of(l1, guest)
    for name in EIGHT:
        expect_granularity(tries, name)


def expect_granularity(tries: Entries, name: str) -> None:
    """Assert that G and the limit of one segment register are compared."""
    fine = tries.vmcs.fields()[rights(name)] & ~0x8000
    coarse = fine | 0x8000
    bad = [
        {rights(name): coarse, limit(name): value}
        for value in [*flips(0xFFFFFFFF, range(12)), 0, 0x67, 0xFFFF000]
    ]
    bad += [{rights(name): fine, limit(name): 0xFFFFF | 1 << bit} for bit in range(20, 32)]
    expect_refused(tries, BAD_GUEST, bad)
    good = [(fine, 0xFFFFF), (fine, 0xFFFF), (coarse, 0xFFFFFFFF), (coarse, 0xFFFFF)]
    expect_accepted(tries, [{rights(name): r, limit(name): value} for r, value in good])


def test_unusable(l1: L1) -> None:
    """Access rights and limit of an unusable segment (TR and CS apart) are not checked."""
    tries = tries_of(l1, "restricted")
    for name in ("SS", "DS", "ES", "FS", "GS", "LDTR"):
        values = [UNUSABLE, UNUSABLE | 0x90, UNUSABLE | 0xF09F]
        if name != "SS":
            values.append(UNUSABLE | 0xF0FF)
        for size in (0, 0xFFF00000):
            expect_accepted(tries, each(rights(name), values, {limit(name): size}))


# --- user mode ---


@GUESTS
def test_user_mode(l1: L1, guest: str) -> None:
    """A guest at CPL 3 is entered: all of RPL and DPL are 3."""
    tries = tries_of(l1, guest)
    expect_accepted(tries, [user_mode(l1), {**user_mode(l1), rights("CS"): CODE64 | 4}])


# --- virtual-8086 mode ---


def _v8086(l1: L1) -> Entries:
    tries = entries(l1, mode=L2Mode.PROTECTED)
    tries.vmcs.update(v8086(l1.sym("l2_vmcall16")))
    return tries


def test_v8086_base(l1: L1) -> None:
    """In virtual-8086 mode a base is selector * 16."""
    tries = _v8086(l1)
    good = tries.vmcs.fields()[base("CS")]
    bad = [good + 0x10, good + 1, good ^ 0x100000, good | 1 << 32, good | 1 << 63]
    expect_refused(tries, BAD_GUEST, [{base(name): value} for name in SIX for value in bad])


def test_v8086_limit(l1: L1) -> None:
    """In virtual-8086 mode a limit is FFFFH."""
    tries = _v8086(l1)
    bad = [0, 0xFFFE, 0xFFF, 0x10000, 0x1FFFF, 0xFFFFF]
    expect_refused(tries, BAD_GUEST, [{limit(name): value} for name in SIX for value in bad])
    coarse = [{limit(name): 0xFFFFFFFF, rights(name): 0x80F3} for name in SIX]
    expect_refused(tries, BAD_GUEST, coarse)


def test_v8086_access_rights(l1: L1) -> None:
    """In virtual-8086 mode access rights are F3H: every other bit pattern is refused."""
    tries = _v8086(l1)
    bad = [*flips(0xF3, [*range(8), *range(12, 17)]), 0x93, 0x9B]
    expect_refused(tries, BAD_GUEST, [{rights(name): value} for name in SIX for value in bad])


def test_v8086_other_segments(l1: L1) -> None:
    """In virtual-8086 mode RPL and DPL relations do not matter; LDTR and TR obey their rules."""
    tries = _v8086(l1)
    differing = {}
    for number, name in enumerate(("SS", "DS", "ES", "FS", "GS")):
        differing[selector(name)] = 0x1000 + number
        differing[base(name)] = (0x1000 + number) << 4
    expect_accepted(tries, [differing])
    expect_refused(
        tries,
        BAD_GUEST,
        [{rights("TR"): 0x89}, {selector("TR"): 4}, {**ldt(l1), rights("LDTR"): 0x83}],
    )


@pytest.mark.needs(Proc2Ctl.ENABLE_EPT, Proc2Ctl.UNRESTRICTED_GUEST)
def test_v8086_of_unrestricted_guest(l1: L1) -> None:
    """The rules of virtual-8086 mode hold for unrestricted guests as well."""
    tries = _v8086(l1)
    tries.vmcs.update(tries.using(Proc2Ctl.UNRESTRICTED_GUEST))
    bad: list[Changes] = []
    for name in SIX:
        bad += [
            {base(name): tries.vmcs.fields()[base(name)] + 0x10},
            {limit(name): 0xFFFE},
            {rights(name): 0x93},
            {rights(name): 0xF7},
        ]
    expect_refused(tries, BAD_GUEST, bad)
