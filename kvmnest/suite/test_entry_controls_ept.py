"""VM entry checks the controls around EPT, VM functions and the MSR areas: error 7."""

from __future__ import annotations

import pytest

from kvmnest.l1 import L1
from kvmnest.suite.support.entries import (
    BAD_CONTROL,
    BAD_GUEST,
    Entries,
    address_bits,
    bad_pages,
    each,
    entries,
    expect_accepted,
    expect_refused,
    flips,
)
from kvmnest.vmx import EptVpidCap, ExitReason, Field, Proc2Ctl, Proc3Ctl, ProcCtl, VmFunc
from kvmnest.vmx.outcome import EntryFailure

pytestmark = [pytest.mark.series(14), pytest.mark.sdm("VM-Execution Control Fields")]

_EPTP = Field.EPT_POINTER


# --- EPT pointer ---


@pytest.mark.needs(Proc2Ctl.ENABLE_EPT)
def test_eptp_memory_type(l1: L1) -> None:
    """EPTP bits 2:0: only the memory types that IA32_VMX_EPT_VPID_CAP reports."""
    tries = entries(l1, ept=True)
    eptp = tries.vmcs[_EPTP] & ~7
    known = {0: EptVpidCap.MEMORY_TYPE_UC, 6: EptVpidCap.MEMORY_TYPE_WB}
    good = [kind for kind, flag in known.items() if l1.caps.supports(flag)]
    bad = [kind for kind in range(8) if kind not in good]
    expect_refused(tries, BAD_CONTROL, each(_EPTP, [eptp | kind for kind in bad]))
    expect_accepted(tries, each(_EPTP, [eptp | kind for kind in good]))


@pytest.mark.needs(Proc2Ctl.ENABLE_EPT)
def test_eptp_walk_length(l1: L1) -> None:
    """EPTP bits 5:3: only the page-walk lengths that IA32_VMX_EPT_VPID_CAP reports."""
    tries = entries(l1, ept=True)
    eptp = tries.vmcs[_EPTP] & ~0x38
    good = [3] + [4] * l1.caps.supports(EptVpidCap.PAGE_WALK_5)
    bad = [eptp | length << 3 for length in range(8) if length not in good]
    expect_refused(tries, BAD_CONTROL, each(_EPTP, bad))


@pytest.mark.needs(Proc2Ctl.ENABLE_EPT)
def test_eptp_accessed_dirty(l1: L1) -> None:
    """EPTP bit 6 is allowed where accessed and dirty flags are reported, else refused."""
    tries = entries(l1, ept=True)
    with_flags = {_EPTP: tries.vmcs[_EPTP] | 1 << 6}
    if l1.caps.supports(EptVpidCap.ACCESSED_DIRTY):
        expect_accepted(tries, [with_flags])
    else:
        expect_refused(tries, BAD_CONTROL, [with_flags])


@pytest.mark.needs(Proc2Ctl.ENABLE_EPT)
def test_eptp_reserved_bits(l1: L1) -> None:
    """EPTP bits 11:7 and those beyond the physical-address width are reserved."""
    tries = entries(l1, ept=True)
    physical, _ = address_bits(l1)
    reserved = [bit for bit in range(8, 12)] + list(range(physical, 64))
    if not l1.caps.supports(EptVpidCap.SUPERVISOR_SHADOW_STACK):
        reserved.append(7)
    expect_refused(tries, BAD_CONTROL, each(_EPTP, flips(tries.vmcs[_EPTP], reserved)))


@pytest.mark.needs(Proc2Ctl.ENABLE_EPT)
def test_eptp_without_ept(l1: L1) -> None:
    """With "enable EPT" 0 the EPT pointer is ignored."""
    tries = entries(l1, ept=False)
    expect_accepted(tries, each(_EPTP, [0, 7, 0xFFF, (1 << 64) - 1]))


# --- controls that need EPT ---


@pytest.mark.parametrize(
    "flag",
    [
        pytest.param(flag, id=flag.name, marks=pytest.mark.needs(Proc2Ctl.ENABLE_EPT, flag))
        for flag in (
            Proc2Ctl.UNRESTRICTED_GUEST,
            Proc2Ctl.ENABLE_PML,
            Proc2Ctl.MODE_BASED_EXECUTE,
            Proc2Ctl.SUB_PAGE_WRITE_PERMISSIONS,
            Proc2Ctl.PT_USES_GUEST_PHYSICAL,
            Proc3Ctl.ENABLE_HLAT,
            Proc3Ctl.EPT_PAGING_WRITE,
            Proc3Ctl.GUEST_PAGING_VERIFICATION,
        )
    ],
)
def test_needs_ept(l1: L1, flag: Proc2Ctl | Proc3Ctl) -> None:
    """Controls that change EPT's work, and unrestricted guests, are refused without EPT."""
    tries = entries(l1, ept=False)
    fields: dict[Field, int] = {}
    if flag is Proc2Ctl.ENABLE_PML:
        fields = {Field.PML_ADDRESS: l1.sym("pml_log"), Field.GUEST_PML_INDEX: 511}
    if isinstance(flag, Proc3Ctl):
        fields = tries.using(ProcCtl.ACTIVATE_TERTIARY_CONTROLS)
    expect_refused(tries, BAD_CONTROL, [{**fields, **tries.using(flag)}])
    if flag in (Proc2Ctl.UNRESTRICTED_GUEST, Proc2Ctl.ENABLE_PML):
        with_ept = tries.using(flag, Proc2Ctl.ENABLE_EPT)
        # Page-modification logging needs the accessed and dirty flags, bit 6, too.
        eptp = l1.sym("ept_pml4") | (0x5E if flag is Proc2Ctl.ENABLE_PML else 0x1E)
        expect_accepted(tries, [{**fields, **with_ept, _EPTP: eptp}])


@pytest.mark.needs(Proc2Ctl.ENABLE_EPT, Proc2Ctl.ENABLE_PML, EptVpidCap.ACCESSED_DIRTY)
def test_pml_address(l1: L1) -> None:
    """The PML address: page aligned, inside the physical width; ignored when unused."""
    tries = entries(l1, ept=True)
    tries.vmcs[_EPTP] = tries.vmcs[_EPTP] | 1 << 6
    bad = bad_pages(l1, l1.sym("pml_log"))
    used = {
        Field.PML_ADDRESS: l1.sym("pml_log"),
        Field.GUEST_PML_INDEX: 511,
        **tries.using(Proc2Ctl.ENABLE_PML),
    }
    expect_refused(tries, BAD_CONTROL, each(Field.PML_ADDRESS, bad, used))
    expect_accepted(tries, [used, {Field.PML_ADDRESS: bad[0]}, {Field.PML_ADDRESS: bad[-1]}])


@pytest.mark.needs(Proc2Ctl.EPT_VIOLATION_VE)
def test_virtualization_exception_address(l1: L1) -> None:
    """The virtualization-exception information address: page aligned, inside the width."""
    tries = entries(l1, ept=True)
    page = l1.alloc()
    field = Field.VE_INFORMATION_ADDRESS
    used = {field: page, **tries.using(Proc2Ctl.EPT_VIOLATION_VE)}
    expect_refused(tries, BAD_CONTROL, each(field, bad_pages(l1, page), used))
    expect_accepted(tries, [used])


# --- VM functions ---


def _vm_functions(l1: L1) -> Entries:
    tries = entries(l1, ept=True)
    tries.vmcs.update(tries.using(Proc2Ctl.ENABLE_VM_FUNCTIONS))
    tries.vmcs[Field.VM_FUNCTION_CONTROL] = 0
    tries.vmcs[Field.EPTP_LIST_ADDRESS] = l1.sym("eptp_list")
    return tries


@pytest.mark.needs(Proc2Ctl.ENABLE_EPT, Proc2Ctl.ENABLE_VM_FUNCTIONS)
def test_vm_function_reserved_bits(l1: L1) -> None:
    """VM functions that IA32_VMX_VMFUNC does not report are refused; 0 is fine."""
    tries = _vm_functions(l1)
    bad = [1 << bit for bit in range(64) if not l1.caps.vmfunc.value >> bit & 1]
    expect_refused(tries, BAD_CONTROL, each(Field.VM_FUNCTION_CONTROL, bad))
    disabled = tries.using(without=Proc2Ctl.ENABLE_VM_FUNCTIONS)
    expect_accepted(tries, each(Field.VM_FUNCTION_CONTROL, [bad[0], bad[-1]], disabled))


@pytest.mark.needs(Proc2Ctl.ENABLE_EPT, VmFunc.EPTP_SWITCHING)
def test_eptp_list_address(l1: L1) -> None:
    """EPTP switching: the list's address is page aligned and inside the physical width."""
    tries = _vm_functions(l1)
    tries.vmcs[Field.VM_FUNCTION_CONTROL] = VmFunc.EPTP_SWITCHING
    bad = bad_pages(l1, l1.sym("eptp_list"))
    expect_refused(tries, BAD_CONTROL, each(Field.EPTP_LIST_ADDRESS, bad))
    unused = {Field.VM_FUNCTION_CONTROL: 0}
    expect_accepted(tries, each(Field.EPTP_LIST_ADDRESS, [bad[0], bad[-1]], unused))


@pytest.mark.needs(Proc2Ctl.ENABLE_EPT, VmFunc.EPTP_SWITCHING)
def test_eptp_switching_needs_ept(l1: L1) -> None:
    """EPTP switching is refused without EPT; VM functions without it are not."""
    tries = _vm_functions(l1)
    without = tries.using(without=Proc2Ctl.ENABLE_EPT)
    switching = {Field.VM_FUNCTION_CONTROL: int(VmFunc.EPTP_SWITCHING)}
    expect_refused(tries, BAD_CONTROL, [{**without, **switching}])
    expect_accepted(tries, [switching, without])


# --- MSR areas ---

_AREAS = [
    pytest.param(
        Field.VM_EXIT_MSR_STORE_ADDR,
        Field.VM_EXIT_MSR_STORE_COUNT,
        id="exit-store",
        marks=pytest.mark.sdm("VM-Exit Control Fields"),
    ),
    pytest.param(
        Field.VM_EXIT_MSR_LOAD_ADDR,
        Field.VM_EXIT_MSR_LOAD_COUNT,
        id="exit-load",
        marks=pytest.mark.sdm("VM-Exit Control Fields"),
    ),
    pytest.param(
        Field.VM_ENTRY_MSR_LOAD_ADDR,
        Field.VM_ENTRY_MSR_LOAD_COUNT,
        id="entry-load",
        marks=pytest.mark.sdm("VM-Entry Control Fields"),
    ),
]


@pytest.mark.parametrize(("address", "count"), _AREAS)
def test_msr_area_address(l1: L1, address: Field, count: Field) -> None:
    """An MSR area that has entries is aligned to 16 bytes and inside the physical width."""
    tries = entries(l1)
    physical, _ = address_bits(l1)
    area = l1.alloc()
    bad = flips(area, [*range(4), *range(physical, 64)])
    expect_refused(tries, BAD_CONTROL, each(address, bad, {count: 1}))
    # With a count of 0 the address is ignored.
    expect_accepted(tries, each(address, [area, bad[0], bad[-1]], {count: 0}))


@pytest.mark.parametrize(("address", "count"), _AREAS)
def test_msr_area_end(l1: L1, address: Field, count: Field) -> None:
    """The last byte of an MSR area must be inside the physical width, too."""
    tries = entries(l1)
    physical, _ = address_bits(l1)
    top = 1 << physical
    bad = [
        {address: top - 16, count: 2},
        {address: top - 0x1000, count: 0x101},
        {address: top - 16 * 0x200, count: 0x201},
    ]
    expect_refused(tries, BAD_CONTROL, bad)


def test_msr_area_at_the_top(l1: L1) -> None:
    """An area that ends with the physical width passes the check of controls.

    There is no memory: its first entry, all ones, then makes the entry fail. Of the VM-exit areas
    the store area is not used by an entry that fails for its guest state.
    """
    tries = entries(l1)
    physical, _ = address_bits(l1)
    for count in (1, 2, 256):
        top = (1 << physical) - 16 * count
        loading = {Field.VM_ENTRY_MSR_LOAD_ADDR: top, Field.VM_ENTRY_MSR_LOAD_COUNT: count}
        expect_refused(tries, EntryFailure(ExitReason.MSR_LOAD_FAIL, qualification=1), [loading])
        storing = {Field.VM_EXIT_MSR_STORE_ADDR: top, Field.VM_EXIT_MSR_STORE_COUNT: count}
        expect_refused(tries, BAD_GUEST, [{**storing, Field.GUEST_RFLAGS: 0}])
