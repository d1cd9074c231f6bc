"""Pointers that L1 hands over: to memory that is not there, and to memory in other use."""

from __future__ import annotations

import pytest

from kvmnest.l1 import L1, VmLost, code
from kvmnest.suite.support.guest import Guest, Masked
from kvmnest.suite.support.shadowing import READ, WRITE, Shadowing
from kvmnest.vmx import EptVpidCap, ExitReason, Field, Msr, Proc2Ctl, ProcCtl, VmxError
from kvmnest.vmx.outcome import (
    EntryFailure,
    Exit,
    Outcome,
    Succeed,
    VMfailInvalid,
    VMfailValid,
)

pytestmark = [
    pytest.mark.series(7),
    pytest.mark.sdm("Software Use of the VMCS and Related Structures"),
]

#: Guest-physical addresses that no memory slot covers; L1 maps them one to one.
NOWHERE = (0x800000, 0x10000000, 0x3F000000)


@pytest.mark.sdm("VMPTRLD - Load Pointer to Virtual-Machine Control Structure")
def test_vmptrld_of_no_memory(l1: L1) -> None:
    """Reads of absent memory give all ones: no revision identifier, error 11."""
    vmcs = l1.launchable()
    expected = VMfailValid(VmxError.VMPTRLD_INCORRECT_REVISION_ID)
    for address in NOWHERE:
        assert l1.vmptrld(address) == expected, hex(address)
        assert l1.vmptrst() == Succeed(vmcs.address)
    assert l1.vmlaunch() == Exit(ExitReason.VMCALL)


@pytest.mark.sdm("VMPTRLD - Load Pointer to Virtual-Machine Control Structure")
def test_vmptrld_of_no_memory_without_current_vmcs(l1: L1) -> None:
    """The same without a current VMCS: VMfailInvalid."""
    l1.enter_vmx()
    for address in NOWHERE:
        assert l1.vmptrld(address) == VMfailInvalid(), hex(address)


@pytest.mark.sdm("VMXON - Enter VMX Operation")
def test_vmxon_of_no_memory(l1: L1) -> None:
    """A VMXON region without memory has no revision identifier: VMfailInvalid."""
    for address in NOWHERE:
        assert l1.vmxon(address) == VMfailInvalid(), hex(address)
    assert l1.vmxon() == Succeed()


@pytest.mark.sdm("VMCLEAR - Clear Virtual-Machine Control Structure")
def test_vmclear_of_no_memory(l1: L1) -> None:
    """VMCLEAR of absent memory: the writes go nowhere, the instruction succeeds."""
    vmcs = l1.launchable()
    for address in NOWHERE:
        assert l1.vmclear(address) == Succeed(), hex(address)
        assert l1.vmptrst() == Succeed(vmcs.address)
    assert l1.vmlaunch() == Exit(ExitReason.VMCALL)


@pytest.mark.parametrize(
    "name",
    ["vmptrld", "vmxon", pytest.param("invvpid", marks=pytest.mark.needs(EptVpidCap.INVVPID))],
)
@pytest.mark.sdm("Conventions")
def test_operand_in_no_memory(l1: L1, name: str) -> None:
    """An operand read from absent memory is no fault of L1: all ones, or KVM gives up openly."""
    if name == "vmxon":
        seen = _lost_or(l1, name)
    else:
        l1.launchable()
        seen = _lost_or(l1, name)
    failed = (VMfailInvalid, VMfailValid)
    assert seen is None or isinstance(seen, failed), repr(seen)


def _lost_or(l1: L1, name: str) -> Outcome | None:
    """The outcome, or None after KVM_EXIT_INTERNAL_ERROR."""
    at = NOWHERE[1]
    try:
        match name:
            case "vmptrld":
                return l1.vmptrld(0, at=at)
            case "vmxon":
                return l1.vmxon(0, at=at)
            case _:
                return l1.invvpid(1, at=at)
    except VmLost as lost:
        l1.touched = True
        if lost.kind != "internal error":
            raise
        return None


# --- what L1's own pointers in the VMCS lead to ---


@pytest.mark.sdm("I/O-Bitmap Addresses")
def test_io_bitmaps_in_no_memory(l1: L1) -> None:
    """I/O bitmaps of all ones: every port exits."""
    guest = Guest(l1, ProcCtl.USE_IO_BITMAPS)
    guest.vmcs[Field.IO_BITMAP_A] = guest.vmcs[Field.IO_BITMAP_B] = NOWHERE[0]
    for port in (0, 0x80, 0x7FFF, 0x8000, 0xFFFF):
        seen = guest.run(b"\xee", {"rdx": port})
        assert seen == guest.exit(ExitReason.IO_INSTRUCTION, 1, qualification=port << 16)


@pytest.mark.sdm("MSR-Bitmap Address")
def test_msr_bitmap_in_no_memory(l1: L1) -> None:
    """An MSR bitmap of all ones: every MSR exits."""
    guest = Guest(l1, ProcCtl.USE_MSR_BITMAPS)
    guest.vmcs[Field.MSR_BITMAP] = NOWHERE[0]
    for msr in (Msr.SYSENTER_CS, Msr.FS_BASE, Msr.IA32_EFER):
        assert guest.run(code.RDMSR, {"rcx": msr}) == guest.exit(ExitReason.RDMSR, 2)
        assert guest.run(code.WRMSR, {"rcx": msr}) == guest.exit(ExitReason.WRMSR, 2)


@pytest.mark.needs(Proc2Ctl.VMCS_SHADOWING)
@pytest.mark.sdm("VMCS Shadowing Bitmap Addresses")
def test_shadowing_bitmaps_in_no_memory(l1: L1) -> None:
    """VMREAD and VMWRITE bitmaps of all ones: every access exits."""
    shadowing = Shadowing(l1)
    guest = shadowing.guest
    guest.vmcs[Field.VMREAD_BITMAP] = guest.vmcs[Field.VMWRITE_BITMAP] = NOWHERE[0]
    for field in (Field.GUEST_RIP, Field.TSC_OFFSET, 0x7FFF):
        for text, reason in ((READ, ExitReason.VMREAD), (WRITE, ExitReason.VMWRITE)):
            seen = guest.run(text, {"rax": field})
            assert seen == guest.exit(reason, 3, qualification=Masked(0, 0)), hex(field)


@pytest.mark.sdm("Loading MSRs")
def test_entry_msr_area_in_no_memory(l1: L1) -> None:
    """An entry of all ones in the VM-entry MSR area has reserved bits set: the entry fails."""
    vmcs = l1.launchable()
    vmcs[Field.VM_ENTRY_MSR_LOAD_ADDR] = NOWHERE[0]
    vmcs[Field.VM_ENTRY_MSR_LOAD_COUNT] = 2
    assert l1.vmlaunch() == EntryFailure(ExitReason.MSR_LOAD_FAIL, qualification=1)
    vmcs[Field.VM_ENTRY_MSR_LOAD_COUNT] = 0
    assert l1.vmlaunch() == Exit(ExitReason.VMCALL)


@pytest.mark.needs(Proc2Ctl.ENABLE_EPT)
@pytest.mark.sdm("EPT Misconfigurations")
def test_ept_tables_in_no_memory(l1: L1) -> None:
    """EPT tables in absent memory: no entry that could translate the first fetch of L2."""
    vmcs = l1.launchable(ept=True)
    good, start = vmcs[Field.EPT_POINTER], vmcs[Field.GUEST_RIP]
    vmcs[Field.EPT_POINTER] = NOWHERE[0] | 0x1E
    seen = l1.vmlaunch()
    # All ones would be a misconfiguration; a walk that gives up reports a violation.
    assert isinstance(seen, Exit), repr(seen)
    assert seen.reason in (ExitReason.EPT_MISCONFIG, ExitReason.EPT_VIOLATION)
    assert seen.rip == start
    vmcs[Field.EPT_POINTER] = good
    assert l1.vmresume() == Exit(ExitReason.VMCALL)


@pytest.mark.needs(Proc2Ctl.VIRTUALIZE_APIC_ACCESSES)
@pytest.mark.sdm("Virtualizing Memory-Mapped APIC Accesses")
@pytest.mark.parametrize("address", NOWHERE, ids=hex)
def test_apic_access_page_in_no_memory(l1: L1, address: int) -> None:
    """L2 never runs without the page: KVM, which cannot make one up, gives the entry up.

    A processor needs no memory there. Without the control L2's accesses would reach L1's devices.
    """
    guest = Guest(l1, Proc2Ctl.VIRTUALIZE_APIC_ACCESSES)
    guest.vmcs[Field.APIC_ACCESS_ADDR] = address
    with pytest.raises(VmLost, match="internal error"):
        guest.run(code.NOP)


# --- the VMXON region and the current VMCS ---


@pytest.mark.sdm("VMXON Region")
def test_vmxon_region_is_not_touched(l1: L1) -> None:
    """Software sees no change of the VMXON region by instructions that name it in vain."""
    vmcs = l1.launchable()
    region = l1.sym("vmxon_region")
    before = l1.read(region, 4096)
    assert l1.vmclear(region) == VMfailValid(VmxError.VMCLEAR_VMXON_POINTER)
    assert l1.vmptrld(region) == VMfailValid(VmxError.VMPTRLD_VMXON_POINTER)
    assert l1.read(region, 4096) == before
    assert l1.vmptrst() == Succeed(vmcs.address)


@pytest.mark.sdm("VMXON Region")
def test_old_vmxon_region_becomes_a_vmcs(l1: L1) -> None:
    """Only the region of the present VMX operation is special: an old one can hold a VMCS."""
    l1.enter_vmx()
    assert l1.vmxoff() == Succeed()
    region = l1.prepare_region(l1.sym("vmcs_d"))
    assert l1.vmxon(region) == Succeed()
    old = l1.sym("vmxon_region")
    l1.load_vmcs(old)
    assert l1.vmptrst() == Succeed(old)
    assert l1.vmlaunch() == Exit(ExitReason.VMCALL)
    assert l1.vmptrld(region) == VMfailValid(VmxError.VMPTRLD_VMXON_POINTER)
    assert l1.vmclear(region) == VMfailValid(VmxError.VMCLEAR_VMXON_POINTER)
    assert l1.vmresume() == Exit(ExitReason.VMCALL)


@pytest.mark.sdm("VMPTRST - Store Pointer to Virtual-Machine Control Structure")
def test_operand_inside_the_region(l1: L1) -> None:
    """The operand may lie in any memory, in a region that is not in use as well."""
    vmcs = l1.launchable()
    region = l1.prepare_region(l1.sym("vmcs_b"))
    l1.write_int(region + 0x800, region)
    assert l1.vmclear(region, at=region + 0x800) == Succeed()
    l1.write_int(region + 0x800, vmcs.address)
    assert l1.vmptrld(0, at=region + 0x800) == Succeed()
    l1.cpu.current = vmcs.address
    assert l1.vmlaunch() == Exit(ExitReason.VMCALL)
