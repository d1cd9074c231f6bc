"""CET state of L1 and L2: what VM entries check and load, what VM exits save and load.

Where the state is there, CR4.CET is 0 in both, so that it has no effect.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from kvmnest.l1 import L1, code
from kvmnest.suite.support.entries import (
    BAD_GUEST,
    BAD_HOST,
    EPT_OR_NOT,
    Entries,
    address_bits,
    each,
    entries,
    expect_accepted,
    expect_refused,
    not_canonical,
)
from kvmnest.suite.support.failures import OUTCOMES, Failure, broken
from kvmnest.suite.support.guest import Guest
from kvmnest.vmx import Cr0, Cr4, EntryCtl, ExitCtl, ExitReason, Field, Msr
from kvmnest.vmx.outcome import Exit, Succeed

pytestmark = [
    pytest.mark.series(16),
    pytest.mark.needs(EntryCtl.LOAD_CET_STATE, ExitCtl.LOAD_CET_STATE),
]

_ALL = (1 << 64) - 1
_RESERVED_OF_S_CET = [1 << bit for bit in range(6, 10)] + [3 << 10]


@dataclass(frozen=True)
class _Cet:
    """IA32_S_CET and IA32_INTERRUPT_SSP_TABLE_ADDR."""

    s_cet: int
    table: int

    def fields(self, area: str) -> dict[Field, int]:
        """As fields of the guest-state or host-state area."""
        return {
            Field[f"{area}_S_CET"]: self.s_cet,
            Field[f"{area}_INTR_SSP_TABLE"]: self.table,
        }


_OWN = _Cet(0x1111_4000, 0x1111_2000)  # of L1, before it enters
_GUEST = _Cet(0x2222_4004, 0x2222_2000)
_HOST = _Cet(0x3333_4010, 0x3333_2000)


def _msrs(l1: L1) -> _Cet:
    """The state that L1 has now."""
    seen = [l1.rdmsr(index) for index in (Msr.S_CET, Msr.INTERRUPT_SSP_TABLE_ADDR)]
    assert all(isinstance(outcome, Succeed) for outcome in seen), seen
    return _Cet(*(outcome.value for outcome in seen if isinstance(outcome, Succeed)))


def _needs_ibt(l1: L1) -> None:
    """Skip where the bits of IA32_S_CET that do no harm in L1 are reserved."""
    outcome = l1.cpuid(7)
    assert isinstance(outcome, Succeed)
    if not outcome.value[3] >> 20 & 1:
        pytest.skip("needs IBT: CPUID.07H:EDX[20] is 0")


def _prepare(l1: L1, entry: bool, exit_: bool) -> Entries:
    """Make a VMCS that loads CET state at VM entry or exit, or not; L1 has its own."""
    _needs_ibt(l1)
    tries = entries(l1)
    tries.vmcs.update({**_GUEST.fields("GUEST"), **_HOST.fields("HOST")})
    tries.vmcs.update(tries.using(EntryCtl.LOAD_CET_STATE) if entry else {})
    tries.vmcs.update(tries.using(ExitCtl.LOAD_CET_STATE) if exit_ else {})
    assert l1.wrmsr(Msr.S_CET, _OWN.s_cet) == Succeed()
    assert l1.wrmsr(Msr.INTERRUPT_SSP_TABLE_ADDR, _OWN.table) == Succeed()
    return tries


# --- checks ---


@pytest.mark.sdm("Checks on Guest Control Registers, Debug Registers, and MSRs")
def test_guest_msrs(l1: L1) -> None:
    """IA32_S_CET and the table's address must be canonical, IA32_S_CET without reserved bits."""
    tries = entries(l1)
    load = tries.using(EntryCtl.LOAD_CET_STATE, ExitCtl.LOAD_CET_STATE)
    bad = not_canonical(l1)
    expect_refused(tries, BAD_GUEST, each(Field.GUEST_INTR_SSP_TABLE, bad, load))
    expect_refused(tries, BAD_GUEST, each(Field.GUEST_S_CET, [*bad, *_RESERVED_OF_S_CET], load))


@pytest.mark.sdm("Checks on Guest Control Registers, Debug Registers, and MSRs")
def test_any_page_of_a_legacy_bitmap(l1: L1) -> None:
    """Bits 63:12 of IA32_S_CET are those of a page's address: they may hold any canonical one."""
    _needs_ibt(l1)
    tries = entries(l1)
    load = tries.using(EntryCtl.LOAD_CET_STATE, ExitCtl.LOAD_CET_STATE)
    pages = [1 << bit for bit in range(12, address_bits(l1)[1] - 1)]
    expect_accepted(tries, each(Field.GUEST_S_CET, pages, load))


@pytest.mark.sdm("Checks on Guest RIP, RFLAGS, and SSP")
def test_guest_ssp(l1: L1) -> None:
    """Bits 1:0 of SSP must be 0 and those beyond the linear-address width must be equal."""
    tries = entries(l1)
    load = tries.using(EntryCtl.LOAD_CET_STATE, ExitCtl.LOAD_CET_STATE)
    linear = address_bits(l1)[1]
    low = [1 << bit for bit in range(linear, 64)]
    high = [(_ALL ^ 1 << bit) & ~3 for bit in range(linear, 64)]
    expect_refused(tries, BAD_GUEST, each(Field.GUEST_SSP, [1, 2, 3, *low, *high], load))
    top = 1 << linear - 1  # SSP may be just beyond the canonical addresses
    expect_accepted(tries, each(Field.GUEST_SSP, [0, 4, top - 4, top, -top & _ALL, _ALL - 3], load))


@pytest.mark.sdm("Checks on Guest Control Registers, Debug Registers, and MSRs")
def test_not_loaded_is_not_checked(l1: L1) -> None:
    """Without the VM-entry control the guest's CET state may hold anything."""
    tries = entries(l1)
    tries.vmcs.update(tries.using(ExitCtl.LOAD_CET_STATE))
    bad = not_canonical(l1)
    for field in (Field.GUEST_SSP, Field.GUEST_INTR_SSP_TABLE, Field.GUEST_S_CET):
        expect_accepted(tries, each(field, bad))


@EPT_OR_NOT
@pytest.mark.sdm("Checks on Guest Control Registers, Debug Registers, and MSRs")
def test_guest_cr4_needs_wp(l1: L1, ept: bool) -> None:
    """With CR4.CET the guest's CR0.WP must be 1, whether CET state is loaded or not."""
    tries = entries(l1, ept=ept)
    load = tries.using(EntryCtl.LOAD_CET_STATE, ExitCtl.LOAD_CET_STATE)
    cr0, cr4 = tries.vmcs[Field.GUEST_CR0] & ~Cr0.WP, tries.vmcs[Field.GUEST_CR4] | Cr4.CET
    bad = {Field.GUEST_CR0: cr0, Field.GUEST_CR4: cr4}
    expect_refused(tries, BAD_GUEST, [bad, {**bad, **load}])
    tries.vmcs.update(load)
    good = {Field.GUEST_CR4: cr4, Field.GUEST_CR0: cr0 | Cr0.WP}
    expect_accepted(tries, [{Field.GUEST_CR0: cr0}, good])


@pytest.mark.sdm("Checks on Host Control Registers, MSRs, and SSP")
def test_host_cr4_needs_wp(l1: L1) -> None:
    """With CR4.CET the host's CR0.WP must be 1, whether CET state is loaded or not."""
    tries = entries(l1)
    load = tries.using(EntryCtl.LOAD_CET_STATE, ExitCtl.LOAD_CET_STATE)
    cr0, cr4 = tries.vmcs[Field.HOST_CR0] & ~Cr0.WP, tries.vmcs[Field.HOST_CR4] | Cr4.CET
    bad = {Field.HOST_CR0: cr0, Field.HOST_CR4: cr4}
    expect_refused(tries, BAD_HOST, [bad, {**bad, **load}])
    tries.vmcs.update(load)
    good = {Field.HOST_CR4: cr4, Field.HOST_CR0: cr0 | Cr0.WP}
    expect_accepted(tries, [{Field.HOST_CR0: cr0}, good])


# --- loading and saving ---

entry = pytest.mark.parametrize("entry", [False, True], ids=["entry-keeps", "entry-loads"])
exit_ = pytest.mark.parametrize("exit_", [False, True], ids=["exit-keeps", "exit-loads"])


@pytest.mark.sdm("Saving Control Registers, Debug Registers, and MSRs")
@entry
@exit_
def test_across_entry_and_exit(l1: L1, entry: bool, exit_: bool) -> None:
    """The controls decide what is loaded; every exit saves what L2 had."""
    _prepare(l1, entry, exit_)
    of_l2 = _GUEST if entry else _OWN
    assert l1.vmlaunch() == Exit(ExitReason.VMCALL)
    assert _msrs(l1) == (_HOST if exit_ else of_l2)
    for field, value in of_l2.fields("GUEST").items():
        assert l1.vmread(field) == Succeed(value), field.name


@pytest.mark.sdm("Saving RIP, RSP, RFLAGS, and SSP")
@entry
@exit_
def test_ssp_across_entry_and_exit(l1: L1, entry: bool, exit_: bool) -> None:
    """So it is with SSP; an entry and exit that load none saves that of L1."""
    own, of_l2, of_l1 = 0x1111_1000, 0x2222_2000, 0x3333_3000
    guest = Guest(l1)
    vmcs = guest.vmcs

    def saved(ssp: int, entry: bool, exit_: bool) -> int:
        for field, flag, on in (
            (Field.VM_ENTRY_CONTROLS, EntryCtl.LOAD_CET_STATE, entry),
            (Field.VM_EXIT_CONTROLS, ExitCtl.LOAD_CET_STATE, exit_),
        ):
            (vmcs.set_bits if on else vmcs.clear_bits)(field, flag)
        assert guest.run(code.NOP, GUEST_SSP=ssp, HOST_SSP=of_l1) == Succeed()
        return vmcs[Field.GUEST_SSP]

    assert saved(own, True, False) == own  # L1 goes on with it
    assert saved(of_l2, entry, exit_) == (of_l2 if entry else own)
    assert saved(0, False, False) == (of_l1 if exit_ else of_l2 if entry else own)


# --- failed entries ---

_LATE = [Failure.GUEST_LINK, Failure.GUEST_RFLAGS, Failure.MSR_LOAD]
late = pytest.mark.parametrize("failure", _LATE, ids=lambda failure: failure.name)


@pytest.mark.sdm("VM-Entry Failures During or After Loading Guest State")
@exit_
@late
def test_failed_entry(l1: L1, exit_: bool, failure: Failure) -> None:
    """A failed entry loads host state like a VM exit; what neither loads stays as it was."""
    tries = _prepare(l1, False, exit_)
    tries.vmcs.update(broken(tries, failure))
    assert l1.vmlaunch() == OUTCOMES[failure]
    assert _msrs(l1) == (_HOST if exit_ else _OWN)


@pytest.mark.sdm("VM-Entry Failures During or After Loading Guest State")
@pytest.mark.parametrize(
    ("field", "value"),
    [
        pytest.param(Field.GUEST_SSP, 1, id="SSP"),
        pytest.param(Field.GUEST_INTR_SSP_TABLE, 1 << 62, id="table"),
        pytest.param(Field.GUEST_S_CET, 1 << 6, id="S_CET"),
    ],
)
def test_refused_state_does_not_reach_l1(l1: L1, field: Field, value: int) -> None:
    """L1 goes on after an entry that was refused for L2's CET state; no exit control loads one."""
    tries = entries(l1)
    tries.vmcs.update(tries.using(EntryCtl.LOAD_CET_STATE))
    tries.vmcs[field] = value
    assert l1.vmlaunch() == BAD_GUEST
    tries.vmcs[field] = 0
    assert l1.vmlaunch() == Exit(ExitReason.VMCALL)
