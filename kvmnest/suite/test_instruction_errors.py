"""Every VM-instruction error that L1 can reach, by its number, with the flags of VMfailValid."""

import pytest

from kvmnest.l1 import L1, Shadow
from kvmnest.vmx import EptVpidCap, ExitReason, Field, Misc, VmxError
from kvmnest.vmx.outcome import Exit, Succeed, VMfailInvalid, VMfailValid

pytestmark = [pytest.mark.series(13), pytest.mark.sdm("VM Instruction Error Numbers")]


def _other(l1: L1) -> int:
    return l1.prepare_region(l1.sym("vmcs_b"))


CAUSES = {
    VmxError.VMCALL_IN_ROOT: lambda l1: l1.vmcall(),
    VmxError.VMCLEAR_INVALID_ADDRESS: lambda l1: l1.vmclear(_other(l1) + 1),
    VmxError.VMCLEAR_VMXON_POINTER: lambda l1: l1.vmclear(l1.sym("vmxon_region")),
    VmxError.VMLAUNCH_NONCLEAR_VMCS: lambda l1: l1.vmlaunch(),
    VmxError.VMPTRLD_INVALID_ADDRESS: lambda l1: l1.vmptrld(_other(l1) + 1),
    VmxError.VMPTRLD_VMXON_POINTER: lambda l1: l1.vmptrld(l1.sym("vmxon_region")),
    VmxError.VMPTRLD_INCORRECT_REVISION_ID: lambda l1: l1.vmptrld(l1.sym("l2_data")),
    VmxError.UNSUPPORTED_VMCS_COMPONENT: lambda l1: l1.vmread(0x6BFE),
    VmxError.VMXON_IN_ROOT: lambda l1: l1.vmxon(),
    VmxError.ENTRY_EVENTS_BLOCKED_BY_MOV_SS: lambda l1: l1.vmresume(shadow=Shadow.MOV_SS),
    VmxError.INVALID_OPERAND_TO_INVEPT_INVVPID: lambda l1: l1.invept(0x7F),
}


def _require(l1: L1, error: VmxError) -> None:
    invept = error is VmxError.INVALID_OPERAND_TO_INVEPT_INVVPID
    if invept and not l1.caps.supports(EptVpidCap.INVEPT):
        pytest.skip("needs EptVpidCap.INVEPT: IA32_VMX_EPT_VPID_CAP allows only 0")


@pytest.mark.parametrize("error", CAUSES, ids=lambda error: f"{error.value}-{error.name}")
def test_error(l1: L1, error: VmxError) -> None:
    """The instruction fails with this number, and the number stays until the next failure."""
    _require(l1, error)
    l1.launchable()
    assert l1.vmlaunch() == Exit(ExitReason.VMCALL)
    assert CAUSES[error](l1) == VMfailValid(error)
    assert l1.vmread(Field.VM_INSTRUCTION_ERROR) == Succeed(error)


@pytest.mark.parametrize("error", CAUSES, ids=lambda error: f"{error.value}-{error.name}")
def test_error_without_current_vmcs(l1: L1, error: VmxError) -> None:
    """Without a current VMCS the same failure is VMfailInvalid."""
    _require(l1, error)
    l1.enter_vmx()
    assert CAUSES[error](l1) == VMfailInvalid()


def test_error_5_vmresume_of_clear_vmcs(l1: L1) -> None:
    """VMRESUME of a VMCS that was never launched."""
    l1.launchable()
    assert l1.vmresume() == VMfailValid(VmxError.VMRESUME_NONLAUNCHED_VMCS)
    assert l1.vmread(Field.VM_INSTRUCTION_ERROR) == Succeed(5)


def test_error_7_control_field(l1: L1) -> None:
    """An entry with a reserved control bit."""
    vmcs = l1.launchable()
    vmcs[Field.PIN_BASED_VM_EXEC_CONTROL] = 0xFFFFFFFF
    assert l1.vmlaunch() == VMfailValid(VmxError.ENTRY_INVALID_CONTROL_FIELD)
    assert l1.vmread(Field.VM_INSTRUCTION_ERROR) == Succeed(7)


def test_error_8_host_state_field(l1: L1) -> None:
    """An entry with a host CS selector of 0."""
    vmcs = l1.launchable()
    vmcs[Field.HOST_CS_SELECTOR] = 0
    assert l1.vmlaunch() == VMfailValid(VmxError.ENTRY_INVALID_HOST_STATE_FIELD)
    assert l1.vmread(Field.VM_INSTRUCTION_ERROR) == Succeed(8)


def test_error_13_read_only_field(l1: L1) -> None:
    """VMWRITE to a read-only field, where IA32_VMX_MISC does not allow it."""
    l1.launchable()
    outcome = l1.vmwrite(Field.VM_EXIT_REASON, 0)
    if l1.caps.supports(Misc.VMWRITE_ANY_FIELD):
        assert outcome == Succeed()
    else:
        assert outcome == VMfailValid(VmxError.VMWRITE_READ_ONLY_COMPONENT)


def test_success_keeps_the_number(l1: L1) -> None:
    """An instruction that succeeds leaves the VM-instruction error field alone."""
    l1.launchable()
    assert l1.vmresume() == VMfailValid(VmxError.VMRESUME_NONLAUNCHED_VMCS)
    assert l1.vmwrite(Field.GUEST_RSP, 0) == Succeed()
    assert l1.vmclear(_other(l1)) == Succeed()
    assert l1.vmread(Field.VM_INSTRUCTION_ERROR) == Succeed(5)


@pytest.mark.parametrize("error", CAUSES, ids=lambda error: f"{error.value}-{error.name}")
def test_failure_belongs_to_the_current_vmcs(l1: L1, error: VmxError) -> None:
    """The number is written to the VMCS that is current; the others keep theirs."""
    _require(l1, error)
    current = l1.launchable()
    assert l1.vmlaunch() == Exit(ExitReason.VMCALL)
    others = [l1.prepare_region(page) for page in (l1.sym("vmcs_c"), l1.alloc())]
    for other in others:
        assert l1.vmclear(other) == Succeed()
        assert l1.vmptrld(other) == Succeed()
        assert l1.vmresume() == VMfailValid(VmxError.VMRESUME_NONLAUNCHED_VMCS)
    assert l1.vmptrld(current.address) == Succeed()
    assert CAUSES[error](l1) == VMfailValid(error)
    assert l1.vmread(Field.VM_INSTRUCTION_ERROR) == Succeed(error)
    for other in others:
        assert l1.vmptrld(other) == Succeed()
        assert l1.vmread(Field.VM_INSTRUCTION_ERROR) == Succeed(5)
    assert l1.vmptrld(current.address) == Succeed()
    assert l1.vmread(Field.VM_INSTRUCTION_ERROR) == Succeed(error)
