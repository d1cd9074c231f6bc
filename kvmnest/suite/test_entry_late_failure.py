"""VM entries that fail by a control of which KVM learns from the processor alone.

By then KVM has loaded much of L2's state; L1 must not see any of it.
"""

from __future__ import annotations

import pytest

from kvmnest.l1 import L1
from kvmnest.l1.vmcs import Vmcs
from kvmnest.suite.support.failures import write_msr_area
from kvmnest.vmx import EntryCtl, ExitReason, Field, Msr, ProcCtl, VmxError
from kvmnest.vmx.outcome import Exit, Succeed, VMfailValid
from kvmnest.vmx.registers import PAT_RESET

pytestmark = [
    pytest.mark.series(14),
    pytest.mark.sdm("Checks on VMX Controls"),
    pytest.mark.needs(ProcCtl.USE_TPR_SHADOW),
]

FAILS = VMfailValid(VmxError.ENTRY_INVALID_CONTROL_FIELD)
_HIGH = 0xFFFF800000001000
#: MSRs that an MSR area may load, with a value of L1 and another one of L2.
_MSRS = {
    Msr.KERNEL_GS_BASE: (0x1000, _HIGH),
    Msr.LSTAR: (0x2000, _HIGH + 8),
    Msr.SYSENTER_EIP: (0x3000, _HIGH + 16),
    Msr.SYSENTER_CS: (0x18, 0x20),
    Msr.PAT: (PAT_RESET, 0x0606060606060606),
}


def _late(l1: L1) -> Vmcs:
    """A VMCS whose TPR threshold is above the TPR in the virtual-APIC page."""
    vmcs = l1.launchable()
    vmcs.set_bits(Field.CPU_BASED_VM_EXEC_CONTROL, ProcCtl.USE_TPR_SHADOW)
    vmcs[Field.VIRTUAL_APIC_PAGE_ADDR] = l1.alloc()
    vmcs[Field.TPR_THRESHOLD] = 1
    return vmcs


def _areas(l1: L1, vmcs: Vmcs, entry: dict[Msr, int], exit_: dict[Msr, int]) -> None:
    for values, label, address, count in (
        (entry, "entry_load_msrs", Field.VM_ENTRY_MSR_LOAD_ADDR, Field.VM_ENTRY_MSR_LOAD_COUNT),
        (exit_, "exit_load_msrs", Field.VM_EXIT_MSR_LOAD_ADDR, Field.VM_EXIT_MSR_LOAD_COUNT),
    ):
        write_msr_area(l1, l1.sym(label), *((int(msr), value) for msr, value in values.items()))
        vmcs[address], vmcs[count] = l1.sym(label), len(values)


@pytest.mark.parametrize("msr", _MSRS, ids=lambda msr: msr.name)
@pytest.mark.sdm("VM Entries")
def test_msr_of_both_areas_is_as_before(l1: L1, msr: Msr) -> None:
    """MSRs are loaded after the checks on controls; the exit area has L1's own value."""
    vmcs = _late(l1)
    before, other = _MSRS[msr]
    assert l1.wrmsr(msr, before) == Succeed()
    _areas(l1, vmcs, {msr: other}, {Msr.FMASK: 0x200, msr: before})
    assert l1.vmlaunch() == FAILS
    assert l1.rdmsr(msr) == Succeed(before)


@pytest.mark.parametrize("msr", _MSRS, ids=lambda msr: msr.name)
@pytest.mark.sdm("VM Entries")
def test_msr_with_one_value_in_both_areas(l1: L1, msr: Msr) -> None:
    """An entry that would change nothing changes nothing."""
    vmcs = _late(l1)
    before, _ = _MSRS[msr]
    assert l1.wrmsr(msr, before) == Succeed()
    _areas(l1, vmcs, {msr: before}, {msr: before})
    assert l1.vmlaunch() == FAILS
    assert l1.rdmsr(msr) == Succeed(before)
    vmcs[Field.TPR_THRESHOLD] = 0
    assert l1.vmlaunch() == Exit(ExitReason.VMCALL)


@pytest.mark.parametrize("msr", _MSRS, ids=lambda msr: msr.name)
@pytest.mark.sdm("VM Entries")
def test_msr_of_the_entry_area_alone_is_as_before(l1: L1, msr: Msr) -> None:
    """MSRs are loaded after the checks on controls: no area need tell L1's value."""
    vmcs = _late(l1)
    before, other = _MSRS[msr]
    assert l1.wrmsr(msr, before) == Succeed()
    _areas(l1, vmcs, {msr: other}, {})
    assert l1.vmlaunch() == FAILS
    assert l1.rdmsr(msr) == Succeed(before)


@pytest.mark.sdm("VM Entries")
@pytest.mark.needs(EntryCtl.LOAD_DEBUG_CONTROLS)
def test_dr7_is_as_before(l1: L1) -> None:
    """DR7 and IA32_DEBUGCTL are loaded from the VMCS by an entry that succeeds, not by this one."""
    vmcs = _late(l1)
    vmcs.set_bits(Field.VM_ENTRY_CONTROLS, EntryCtl.LOAD_DEBUG_CONTROLS)
    vmcs[Field.GUEST_DR7] = 0x403
    assert l1.write_dr(7, 0x500) == Succeed()
    assert l1.vmlaunch() == FAILS
    assert l1.read_dr(7) == Succeed(0x500)


@pytest.mark.parametrize(
    ("control", "field", "msr", "value"),
    [
        (EntryCtl.LOAD_PAT, Field.GUEST_IA32_PAT, Msr.PAT, 0x0606060606060606),
        (EntryCtl.LOAD_EFER, Field.GUEST_IA32_EFER, Msr.IA32_EFER, 0x501),
    ],
    ids=["PAT", "EFER"],
)
@pytest.mark.needs(EntryCtl.LOAD_PAT, EntryCtl.LOAD_EFER)
@pytest.mark.sdm("VM Entries")
def test_msr_of_the_guest_area_is_as_before(
    l1: L1, control: EntryCtl, field: Field, msr: Msr, value: int
) -> None:
    """IA32_PAT and IA32_EFER are L1's, whatever the guest-state area holds."""
    vmcs = _late(l1)
    vmcs.set_bits(Field.VM_ENTRY_CONTROLS, control)
    vmcs[field] = value
    before = l1.rdmsr(msr)
    assert l1.vmlaunch() == FAILS
    assert l1.rdmsr(msr) == before
