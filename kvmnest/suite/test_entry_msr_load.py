"""The VM-entry MSR-load area: which entry makes VM entry fail (reason 34, its number)."""

from __future__ import annotations

import pytest

from kvmnest.l1 import L1
from kvmnest.suite.support.entries import (
    BAD_CONTROL,
    Entries,
    entries,
    expect_accepted,
    expect_refused,
    shown,
)
from kvmnest.suite.support.failures import write_msr_area
from kvmnest.vmx import Efer, ExitReason, Field, Msr
from kvmnest.vmx.outcome import EntryFailure, Outcome, Succeed

pytestmark = [pytest.mark.series(14), pytest.mark.sdm("Loading MSRs")]

_ADDRESS, _COUNT = Field.VM_ENTRY_MSR_LOAD_ADDR, Field.VM_ENTRY_MSR_LOAD_COUNT
_KERNEL_GS = Msr.KERNEL_GS_BASE


def _fails_at(number: int) -> EntryFailure:
    return EntryFailure(ExitReason.MSR_LOAD_FAIL, qualification=number)


def _loading(l1: L1) -> Entries:
    """Make a VMCS whose VM-entry MSR-load area is the page ``entry_load_msrs``."""
    tries = entries(l1)
    tries.vmcs[_ADDRESS] = l1.sym("entry_load_msrs")
    tries.vmcs[_COUNT] = 0
    return tries


def _load(tries: Entries, *area: tuple[int, int]) -> Outcome:
    write_msr_area(tries.l1, tries.l1.sym("entry_load_msrs"), *area)
    return tries({_COUNT: len(area)})


def expect_each_fails(tries: Entries, bad: list[tuple[int, int]]) -> None:
    """Assert that each entry, alone and behind a good one, fails with its number."""
    wrong = []
    for entry in bad:
        for area in ([entry], [(_KERNEL_GS, 0), entry], [(_KERNEL_GS, 0), entry, entry]):
            number = area.index(entry) + 1
            if (outcome := _load(tries, *area)) != _fails_at(number):
                wrong.append(f"{entry[0]:#x}={entry[1]:#x} as number {number}: {outcome!r}")
    assert not wrong, shown("expected a failure of reason 34", wrong)
    expect_accepted(tries, [{}])


def test_good_entries(l1: L1) -> None:
    """Good entries are loaded; L1 keeps those that no VM exit puts back."""
    tries = _loading(l1)
    area = [(_KERNEL_GS, 0x1234), (Msr.LSTAR, 0x5678), (Msr.STAR, 9), (_KERNEL_GS, 0xABCD)]
    assert _load(tries, *area) == tries.vmcall()
    # The later entry of an MSR wins.
    assert l1.rdmsr(_KERNEL_GS) == Succeed(0xABCD)
    assert l1.rdmsr(Msr.LSTAR) == Succeed(0x5678)
    assert l1.rdmsr(Msr.STAR) == Succeed(9)


def test_segment_bases(l1: L1) -> None:
    """IA32_FS_BASE and IA32_GS_BASE have fields of their own and cannot be loaded."""
    expect_each_fails(_loading(l1), [(Msr.FS_BASE, 0), (Msr.GS_BASE, 0)])


def test_x2apic_registers(l1: L1) -> None:
    """MSRs 800H to 8FFH cannot be loaded when L1's APIC is in x2APIC mode."""
    tries = _loading(l1)
    apic_base = l1.rdmsr(Msr.APIC_BASE)
    assert isinstance(apic_base, Succeed)
    assert l1.wrmsr(Msr.APIC_BASE, apic_base.value | 0xC00) == Succeed()
    expect_each_fails(tries, [(index, 0) for index in (0x800, 0x808, 0x80B, 0x83F, 0x8FF)])


def test_smm_monitor_control(l1: L1) -> None:
    """IA32_SMM_MONITOR_CTL can be loaded in SMM only."""
    expect_each_fails(_loading(l1), [(Msr.SMM_MONITOR_CTL, 0)])


def test_reserved_half(l1: L1) -> None:
    """Bits 63:32 of an entry's first half must be 0."""
    bad = [(_KERNEL_GS | 1 << bit, 0) for bit in range(32, 64)]
    tries = _loading(l1)
    wrong = [hex(index) for index, _ in bad if _load(tries, (index, 0)) != _fails_at(1)]
    assert not wrong
    expect_each_fails(tries, [bad[0], bad[-1]])


def test_unknown_msr(l1: L1) -> None:
    """An MSR that does not exist cannot be loaded: WRMSR would fault, too."""
    unknown = [0x2000, 0x12345678, 0x40000FFF, 0xC0002000, 0xFFFFFFFF]
    tries = _loading(l1)
    for index in unknown:
        assert not isinstance(l1.wrmsr(index, 0), Succeed), hex(index)
    expect_each_fails(tries, [(index, 0) for index in unknown])


def test_read_only_msr(l1: L1) -> None:
    """An MSR that cannot be written cannot be loaded."""
    expect_each_fails(_loading(l1), [(Msr.IA32_VMX_BASIC, 0), (Msr.IA32_VMX_MISC, 0)])


@pytest.mark.parametrize(
    ("index", "value"),
    [
        pytest.param(Msr.PAT, 2, id="PAT"),
        pytest.param(Msr.LSTAR, 1 << 62, id="LSTAR"),
        pytest.param(Msr.KERNEL_GS_BASE, 1 << 63, id="KERNEL_GS_BASE"),
        pytest.param(Msr.SYSENTER_EIP, 0x8000 << 48, id="SYSENTER_EIP"),
        pytest.param(Msr.IA32_EFER, 1 << 63 | Efer.LME | Efer.LMA, id="EFER"),
        pytest.param(Msr.APIC_BASE, (1 << 64) - 1, id="APIC_BASE"),
    ],
)
def test_bad_value(l1: L1, index: Msr, value: int) -> None:
    """A value that WRMSR would refuse cannot be loaded."""
    tries = _loading(l1)
    assert not isinstance(l1.wrmsr(index, value), Succeed)
    expect_each_fails(tries, [(index, value)])


def test_efer_lme_with_paging(l1: L1) -> None:
    """IA32_EFER.LME cannot be changed by the area while the guest uses paging."""
    tries = _loading(l1)
    expect_each_fails(tries, [(Msr.IA32_EFER, int(Efer.NXE)), (Msr.IA32_EFER, 0)])


def test_first_bad_entry_counts(l1: L1) -> None:
    """The qualification is the number of the first bad entry, from 1 on."""
    tries = _loading(l1)
    good, bad = (_KERNEL_GS, 0), (Msr.GS_BASE, 0)
    for number in (1, 2, 3, 17, 100, 256):
        area = [good] * (number - 1) + [bad] * 2
        assert _load(tries, *area) == _fails_at(number), number
    expect_accepted(tries, [{}])


def test_longest_area(l1: L1) -> None:
    """As many entries as IA32_VMX_MISC recommends at most are loaded."""
    tries = _loading(l1)
    count = l1.caps.misc.msr_list_max
    area = l1.alloc((16 * count + 4095) // 4096)
    write_msr_area(l1, area, *[(_KERNEL_GS, number) for number in range(count)])
    expect_accepted(tries, [{_ADDRESS: area, _COUNT: count}])
    assert l1.rdmsr(_KERNEL_GS) == Succeed(count - 1)


def test_area_beyond_the_limit(l1: L1) -> None:
    """Beyond the recommended maximum the SDM promises nothing; KVM refuses the entry.

    A processor may do anything here, up to a machine check. KVM fails at the first entry beyond
    it, as if that could not be loaded; from 6.16 on it refuses the count as it does a bad control.
    """
    tries = _loading(l1)
    count = l1.caps.misc.msr_list_max + 1
    area = l1.alloc((16 * count + 4095) // 4096)
    write_msr_area(l1, area, *[(_KERNEL_GS, number) for number in range(count)])
    assert tries({_ADDRESS: area, _COUNT: count}) in (_fails_at(count), BAD_CONTROL)
    expect_accepted(tries, [{}])


def test_area_without_memory(l1: L1) -> None:
    """An area where no memory is reads as all ones: the first entry is bad."""
    tries = _loading(l1)
    nowhere = [l1.sym("RAM_SIZE"), 0x10000000]
    expect_refused(tries, _fails_at(1), [{_ADDRESS: address, _COUNT: 1} for address in nowhere])


def test_failed_load_keeps_the_launch_state(l1: L1) -> None:
    """Reason 34 is a failed entry: the VMCS stays clear and is launched when put right."""
    tries = _loading(l1)
    assert _load(tries, (Msr.FS_BASE, 0)) == _fails_at(1)
    assert _load(tries, (_KERNEL_GS, 1)) == tries.vmcall()
