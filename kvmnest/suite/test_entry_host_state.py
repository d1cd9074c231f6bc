"""VM entry checks the host-state area and the address-space size: error 8."""

from __future__ import annotations

import pytest

from kvmnest.kvm import Kvm
from kvmnest.kvm.cpuid import leaf
from kvmnest.l1 import L1, L2Mode
from kvmnest.suite.support.entries import (
    BAD_GUEST,
    BAD_HOST,
    BAD_PATS,
    address_bits,
    each,
    entries,
    expect_accepted,
    expect_refused,
    flips,
    not_canonical,
)
from kvmnest.vmx import Cr0, Cr4, Efer, EntryCtl, ExitCtl, Field
from kvmnest.vmx.outcome import Succeed
from kvmnest.vmx.registers import PAT_RESET

pytestmark = [
    pytest.mark.series(14),
    pytest.mark.sdm("Checks on Host Control Registers, MSRs, and SSP"),
]

_CPUID_1_ECX_SMX = 1 << 6
_NOT_CHECKED = int(Cr0.NW | Cr0.CD)


def test_cr0(l1: L1) -> None:
    """HOST_CR0 obeys the fixed bits of VMX operation; NW and CD are not looked at."""
    tries = entries(l1)
    cr0 = tries.vmcs[Field.HOST_CR0]
    caps = l1.caps
    must = [bit for bit in range(64) if (caps.cr0_fixed0 & ~_NOT_CHECKED) >> bit & 1]
    must_not = [bit for bit in range(64) if (~caps.cr0_fixed1 & ~_NOT_CHECKED) >> bit & 1]
    assert {0, 5, 31} <= set(must)
    assert set(range(32, 64)) <= set(must_not)
    expect_refused(tries, BAD_HOST, each(Field.HOST_CR0, flips(cr0, must + must_not)))
    expect_accepted(tries, each(Field.HOST_CR0, [cr0 | Cr0.AM, cr0 & ~Cr0.MP, cr0 & ~Cr0.WP]))


def test_cr4(l1: L1) -> None:
    """HOST_CR4 obeys the fixed bits of VMX operation."""
    tries = entries(l1)
    cr4 = tries.vmcs[Field.HOST_CR4]
    must = [bit for bit in range(64) if l1.caps.cr4_fixed0 >> bit & 1]
    must_not = [bit for bit in range(64) if ~l1.caps.cr4_fixed1 >> bit & 1]
    assert Cr4.VMXE.bit_length() - 1 in must
    assert set(range(33, 64)) <= set(must_not)
    expect_refused(tries, BAD_HOST, each(Field.HOST_CR4, flips(cr4, must + must_not)))
    expect_accepted(tries, each(Field.HOST_CR4, [cr4 | Cr4.TSD, cr4 | Cr4.PGE, cr4 | Cr4.DE]))


def test_cr3(l1: L1) -> None:
    """HOST_CR3 has no bit beyond the physical-address width."""
    tries = entries(l1)
    physical, _ = address_bits(l1)
    cr3 = tries.vmcs[Field.HOST_CR3]
    # Bits 62:61 are legal on processors with linear-address masking.
    bad = [bit for bit in range(physical, 64) if bit not in (61, 62)]
    expect_refused(tries, BAD_HOST, each(Field.HOST_CR3, flips(cr3, bad)))
    # PWT and PCD are legal.
    expect_accepted(tries, each(Field.HOST_CR3, [cr3 | 8, cr3 | 0x10]))


def test_sysenter_canonical(l1: L1) -> None:
    """The SYSENTER addresses of the host must be canonical."""
    tries = entries(l1)
    _, linear = address_bits(l1)
    top = 1 << linear - 1
    for field in (Field.HOST_IA32_SYSENTER_ESP, Field.HOST_IA32_SYSENTER_EIP):
        expect_refused(tries, BAD_HOST, each(field, not_canonical(l1)))
        expect_accepted(tries, each(field, [0, top - 1, -top & (1 << 64) - 1, (1 << 64) - 1]))


@pytest.mark.needs(ExitCtl.LOAD_PAT)
def test_pat(l1: L1) -> None:
    """HOST_IA32_PAT holds memory types only, if it is loaded; otherwise it is not checked."""
    tries = entries(l1)
    load = tries.using(ExitCtl.LOAD_PAT)
    expect_refused(tries, BAD_HOST, each(Field.HOST_IA32_PAT, BAD_PATS, load))
    good = [PAT_RESET & ~(0xFF << 56) | kind << 56 for kind in (0, 1, 4, 5, 6, 7)]
    expect_accepted(tries, each(Field.HOST_IA32_PAT, good, load))
    expect_accepted(tries, each(Field.HOST_IA32_PAT, BAD_PATS[:3]))


@pytest.mark.needs(ExitCtl.LOAD_EFER)
def test_efer_reserved_bits(l1: L1) -> None:
    """HOST_IA32_EFER sets no reserved bit, if it is loaded."""
    tries = entries(l1)
    load = tries.using(ExitCtl.LOAD_EFER)
    efer = tries.vmcs[Field.HOST_IA32_EFER]
    reserved = [*range(1, 8), 9, *range(12, 64)]
    expect_refused(tries, BAD_HOST, each(Field.HOST_IA32_EFER, flips(efer, reserved), load))
    good = [efer | Efer.SCE, efer & ~Efer.NXE, efer]
    expect_accepted(tries, each(Field.HOST_IA32_EFER, good, load))


@pytest.mark.needs(ExitCtl.LOAD_EFER)
def test_efer_and_address_space_size(l1: L1) -> None:
    """LMA and LME of HOST_IA32_EFER both equal "host address-space size", if it is loaded."""
    tries = entries(l1)
    load = tries.using(ExitCtl.LOAD_EFER)
    efer = tries.vmcs[Field.HOST_IA32_EFER]
    bad = [efer & ~Efer.LMA, efer & ~Efer.LME, efer & ~(Efer.LMA | Efer.LME)]
    expect_refused(tries, BAD_HOST, each(Field.HOST_IA32_EFER, bad, load))
    # Not loaded: anything goes.
    expect_accepted(tries, each(Field.HOST_IA32_EFER, [*bad, (1 << 64) - 1]))


@pytest.mark.needs(ExitCtl.LOAD_PERF_GLOBAL_CTRL)
def test_perf_global_ctrl(l1: L1) -> None:
    """HOST_IA32_PERF_GLOBAL_CTRL sets no bit of a counter that does not exist, if loaded."""
    tries = entries(l1)
    load = tries.using(ExitCtl.LOAD_PERF_GLOBAL_CTRL)
    outcome = l1.cpuid(0xA)
    assert isinstance(outcome, Succeed)
    eax, _, _, edx = outcome.value
    general, fixed = (eax >> 8 & 0xFF, edx & 0x1F) if eax & 0xFF > 1 else (0, 0)
    bad = [1 << bit for bit in (*range(general, 32), *range(32 + fixed, 48), *range(52, 64))]
    field = Field.HOST_IA32_PERF_GLOBAL_CTRL
    expect_refused(tries, BAD_HOST, each(field, bad, load))
    expect_accepted(tries, [{**load, field: 0}, {field: bad[0]}, {field: (1 << 64) - 1}])


# --- segments and descriptor tables ---

_SELECTORS = [Field[f"HOST_{name}_SELECTOR"] for name in ("ES", "CS", "SS", "DS", "FS", "GS", "TR")]


@pytest.mark.sdm("Checks on Host Segment and Descriptor-Table Registers")
def test_selector_rpl_and_ti(l1: L1) -> None:
    """RPL and TI of every host selector are 0."""
    tries = entries(l1)
    known = tries.vmcs.fields()
    bad = [{field: known[field] | low} for field in _SELECTORS for low in range(1, 8)]
    expect_refused(tries, BAD_HOST, bad)


@pytest.mark.sdm("Checks on Host Segment and Descriptor-Table Registers")
def test_null_selectors(l1: L1) -> None:
    """CS and TR must not be null; the data segments may be, SS too for a 64-bit host."""
    tries = entries(l1)
    expect_refused(tries, BAD_HOST, [{Field.HOST_CS_SELECTOR: 0}, {Field.HOST_TR_SELECTOR: 0}])
    nullable = [Field[f"HOST_{name}_SELECTOR"] for name in ("ES", "SS", "DS", "FS", "GS")]
    expect_accepted(tries, [{field: 0} for field in nullable])


_BASES = [Field[f"HOST_{name}_BASE"] for name in ("FS", "GS", "TR", "GDTR", "IDTR")]


@pytest.mark.sdm("Checks on Host Segment and Descriptor-Table Registers")
def test_bases_canonical(l1: L1) -> None:
    """The base addresses of the host must be canonical."""
    tries = entries(l1)
    _, linear = address_bits(l1)
    bad = not_canonical(l1)
    expect_refused(tries, BAD_HOST, [{field: value} for field in _BASES for value in bad])
    top = 1 << linear - 1
    for field in (Field.HOST_FS_BASE, Field.HOST_GS_BASE):
        expect_accepted(tries, each(field, [top - 1, -top & (1 << 64) - 1, (1 << 64) - 1]))


# --- address-space size ---


@pytest.mark.sdm("Checks Related to Address-Space Size")
def test_rip_canonical(l1: L1) -> None:
    """HOST_RIP of a 64-bit host must be canonical."""
    tries = entries(l1)
    expect_refused(tries, BAD_HOST, each(Field.HOST_RIP, not_canonical(l1)))


@pytest.mark.sdm("Checks Related to Address-Space Size")
def test_64_bit_host_needs_pae(l1: L1) -> None:
    """A 64-bit host needs CR4.PAE."""
    tries = entries(l1)
    cr4 = tries.vmcs[Field.HOST_CR4]
    expect_refused(tries, BAD_HOST, each(Field.HOST_CR4, [cr4 & ~Cr4.PAE]))


@pytest.mark.sdm("Checks Related to Address-Space Size")
@pytest.mark.parametrize("mode", [L2Mode.PROTECTED, L2Mode.PAE], ids=lambda mode: mode.name)
def test_32_bit_host_from_64_bit_mode(l1: L1, mode: L2Mode) -> None:
    """In IA-32e mode "host address-space size" 0 is refused, with all else fit for 32 bits."""
    tries = entries(l1, mode=mode)
    small = tries.using(without=ExitCtl.HOST_ADDRESS_SPACE_SIZE)
    vmcs = tries.vmcs
    assert vmcs[Field.HOST_RIP] >> 32 == 0
    assert vmcs[Field.HOST_CR4] & Cr4.PCIDE == 0
    assert vmcs[Field.HOST_SS_SELECTOR] != 0
    expect_refused(tries, BAD_HOST, [small, {**small, Field.HOST_IA32_EFER: 0}])


@pytest.mark.sdm("Checks Related to Address-Space Size")
def test_64_bit_guest_of_32_bit_host(l1: L1) -> None:
    """ "IA-32e mode guest" needs "host address-space size"."""
    tries = entries(l1)
    assert tries.vmcs[Field.VM_ENTRY_CONTROLS] & EntryCtl.IA32E_MODE_GUEST
    small = tries.using(without=ExitCtl.HOST_ADDRESS_SPACE_SIZE)
    expect_refused(tries, BAD_HOST, [small, {**small, Field.HOST_RIP: 1 << 32}])


# --- a processor with more than KVM supports ---


def test_cr4_bit_that_l1_cannot_set(kvm: Kvm) -> None:
    """A CR4 bit that MOV to CR4 refuses is refused in both areas, whatever CPUID says of it."""
    cpuid = kvm.supported_cpuid()
    leaf(cpuid, 1).ecx |= _CPUID_1_ECX_SMX
    with L1(kvm) as l1:
        l1.vcpu.set_cpuid(cpuid)
        tries = entries(l1)
        cr4 = tries.vmcs[Field.HOST_CR4] | Cr4.SMXE
        if l1.write_cr(4, cr4) == Succeed():
            pytest.skip("needs a KVM that does not support CR4.SMXE")
        expect_refused(tries, BAD_HOST, [{Field.HOST_CR4: cr4}])
        guest = tries.vmcs[Field.GUEST_CR4] | Cr4.SMXE
        expect_refused(tries, BAD_GUEST, [{Field.GUEST_CR4: guest}])


# --- newer state ---


@pytest.mark.needs(ExitCtl.LOAD_PKRS)
def test_pkrs(l1: L1) -> None:
    """Bits 63:32 of HOST_IA32_PKRS must be 0, if it is loaded."""
    tries = entries(l1)
    load = tries.using(ExitCtl.LOAD_PKRS)
    bad = [1 << bit for bit in range(32, 64)]
    expect_refused(tries, BAD_HOST, each(Field.HOST_IA32_PKRS, bad, load))


@pytest.mark.needs(ExitCtl.LOAD_CET_STATE)
def test_cet_state(l1: L1) -> None:
    """Host CET state: canonical addresses, aligned SSP, no reserved bits of IA32_S_CET."""
    tries = entries(l1)
    load = tries.using(ExitCtl.LOAD_CET_STATE)
    bad = not_canonical(l1)
    expect_refused(tries, BAD_HOST, each(Field.HOST_SSP, [*bad, 1, 2], load))
    expect_refused(tries, BAD_HOST, each(Field.HOST_INTR_SSP_TABLE, bad, load))
    reserved = [1 << bit for bit in range(6, 10)] + [3 << 10]
    expect_refused(tries, BAD_HOST, each(Field.HOST_S_CET, [*bad, *reserved], load))


# --- several ---


def test_l1_is_unharmed(l1: L1) -> None:
    """An entry refused for its host state loads nothing of it."""
    tries = entries(l1)
    registers = [l1.read_cr(number) for number in (0, 3, 4)]
    msrs = [l1.rdmsr(index) for index in (0x174, 0x175, 0x176, 0x277, 0xC0000080, 0xC0000100)]
    assert (
        tries(
            {
                Field.HOST_IA32_SYSENTER_CS: 0x1234,
                Field.HOST_IA32_SYSENTER_ESP: 0x5678,
                Field.HOST_FS_BASE: 0x9ABC,
                Field.HOST_CR0: tries.vmcs[Field.HOST_CR0] | Cr0.AM,
                Field.HOST_CR4: tries.vmcs[Field.HOST_CR4] | Cr4.TSD,
                Field.HOST_TR_SELECTOR: 0,
            }
        )
        == BAD_HOST
    )
    assert [l1.read_cr(number) for number in (0, 3, 4)] == registers
    after = [l1.rdmsr(index) for index in (0x174, 0x175, 0x176, 0x277, 0xC0000080, 0xC0000100)]
    assert after == msrs
    expect_accepted(tries, [{}])
