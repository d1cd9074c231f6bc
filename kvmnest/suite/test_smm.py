"""System-management interrupts under the default treatment: VMX operation survives SMI and RSM."""

from __future__ import annotations

import errno

import pytest

from kvmnest.kvm import Cap, KvmError, exits
from kvmnest.l1 import L1, code
from kvmnest.suite.support.guest import Guest
from kvmnest.vmx import Cr4, ExitReason, Field, VmxError
from kvmnest.vmx.outcome import Exit, HostExit, Succeed, VMfailValid

pytestmark = [
    pytest.mark.series(24),
    pytest.mark.sdm("Default Treatment of SMI Delivery"),
    pytest.mark.needs(Cap.X86_SMM, Cap.MULTI_ADDRESS_SPACE),
]

#: SMBASE after a reset; SMM starts 8000h above it, in an environment like real mode.
SMBASE = 0x30000
SEEN_CR4 = SMBASE + 0x8100
#: MOV EAX, CR4; MOV CS:[8100h], EAX; INC WORD CS:[8104h]; RSM
HANDLER = b"\x0f\x20\xe0\x2e\x66\xa3\x00\x81\x2e\xff\x06\x04\x81\x0f\xaa"
PORT = 0x30
#: A handler that comes to userspace in its middle: OUT 30h, AL; RSM
STOPS = b"\xe6\x30\x0f\xaa"
#: Flags in the nested state's header, and where they are: whether VMX operation, and L2, wait for
#: RSM (kernel documentation, "KVM_GET_NESTED_STATE").
_SMM_FLAGS = 24
_IN_GUEST_MODE, _IN_VMX = 1, 2


def _install(l1: L1) -> None:
    l1.enable_smm()
    # The pages there are a spare VMCS region and, for the save area, virtual-APIC page.
    l1.write(SMBASE + 0x8000, HANDLER)
    l1.write(SEEN_CR4, b"\xff" * 4 + bytes(4))


def _smi(l1: L1) -> None:
    """Let L1 take an SMI before its next instruction, and check what the handler saw."""
    count = l1.read_int(SEEN_CR4 + 4, 2)
    l1.vcpu.smi()
    assert l1.cpuid(0) == Succeed()
    _taken(l1, count + 1)


def _taken(l1: L1, count: int) -> None:
    assert l1.read_int(SEEN_CR4 + 4, 2) == count
    # CR4.VMXE is 0 in SMM, so that the handler is outside VMX operation.
    assert not l1.read_int(SEEN_CR4, 4) & Cr4.VMXE


def test_outside_vmx_operation(l1: L1) -> None:
    """RSM brings CR4 back with VMXE, and VMXON works."""
    _install(l1)
    cr4 = l1.read_cr(4)
    _smi(l1)
    assert l1.read_cr(4) == cr4
    l1.enter_vmx()
    _smi(l1)
    assert l1.vmxoff() == Succeed()


@pytest.mark.sdm("Default Treatment of RSM")
def test_in_root_operation(l1: L1) -> None:
    """RSM returns to VMX root operation with the current VMCS and its launch state."""
    _install(l1)
    vmcs = l1.launchable()
    _smi(l1)
    assert l1.vmptrst() == Succeed(vmcs.address)
    assert l1.vmresume() == VMfailValid(VmxError.VMRESUME_NONLAUNCHED_VMCS)
    assert l1.vmlaunch() == Exit(ExitReason.VMCALL)
    _smi(l1)
    assert l1.vmresume() == Exit(ExitReason.VMCALL)
    assert l1.vmread(Field.VM_EXIT_REASON) == Succeed(int(ExitReason.VMCALL))
    assert l1.vmxoff() == Succeed()


@pytest.mark.sdm("Default Treatment of RSM")
def test_in_l2(l1: L1) -> None:
    """An SMI in L2 is no VM exit: after RSM L2 goes on where it was."""
    _install(l1)
    guest = Guest(l1)
    assert guest.run(code.NOP) == Succeed()
    for count in (1, 2):
        seen = guest.run(code.out8(0x80) + code.NOP * 2, GUEST_RFLAGS=0x202)
        assert isinstance(seen, HostExit)
        assert isinstance(seen.exit, exits.IoExit)
        l1.vcpu.smi()
        seen = guest.resume()
        assert seen == Succeed()
        assert guest.changed(seen) == {}
        _taken(l1, count)
    assert guest.vmcs.read(Field.GUEST_CR4) == (guest.vmcs.baseline[Field.GUEST_CR4],)
    assert l1.vmptrst() == Succeed(guest.vmcs.address)


def _saved_in_smm(l1: L1, seen: object) -> bytes:
    """The nested state while the handler is stopped at its OUT."""
    assert isinstance(seen, HostExit)
    assert isinstance(seen.exit, exits.IoExit)
    assert seen.exit.port == PORT
    # KVM finishes the OUT at the next KVM_RUN.
    l1.vcpu.run(immediate_exit=True)
    return l1.vcpu.get_nested_state()


def _smm_flags(state: bytes) -> int:
    return int.from_bytes(state[_SMM_FLAGS : _SMM_FLAGS + 2], "little")


@pytest.mark.sdm("Default Treatment of RSM")
@pytest.mark.needs(Cap.NESTED_STATE)
def test_state_saved_in_smm_from_l2(l1: L1) -> None:
    """Nested state that is saved in SMM tells that L2 waits for RSM, and can be set there."""
    _install(l1)
    l1.write(SMBASE + 0x8000, STOPS)
    guest = Guest(l1)
    seen = guest.run(code.out8(0x80) + code.NOP * 2, GUEST_RFLAGS=0x202)
    assert isinstance(seen, HostExit)
    l1.vcpu.smi()
    state = _saved_in_smm(l1, guest.resume())
    assert _smm_flags(state) == _IN_GUEST_MODE | _IN_VMX
    l1.vcpu.set_nested_state(state)
    assert l1.vcpu.get_nested_state() == state
    seen = guest.resume()
    assert seen == Succeed()
    assert guest.changed(seen) == {}


@pytest.mark.sdm("Default Treatment of RSM")
@pytest.mark.needs(Cap.NESTED_STATE)
def test_state_saved_in_smm_from_root_operation(l1: L1) -> None:
    """In SMM from VMX root operation it tells that VMX operation waits for RSM, but no L2."""
    _install(l1)
    l1.write(SMBASE + 0x8000, STOPS)
    vmcs = l1.launchable()
    l1.vcpu.smi()
    state = _saved_in_smm(l1, l1.cpuid(0))
    assert _smm_flags(state) == _IN_VMX
    l1.vcpu.set_nested_state(state)
    assert l1.resume() == Succeed()
    assert l1.vmptrst() == Succeed(vmcs.address)


@pytest.mark.sdm("Default Treatment of SMI Delivery")
@pytest.mark.needs(Cap.NESTED_STATE)
def test_state_that_smm_cannot_have(l1: L1) -> None:
    """L2 does not run in SMM, nor does VMX operation wait for RSM outside of it: EINVAL."""
    _install(l1)
    l1.write(SMBASE + 0x8000, STOPS)
    l1.launchable()
    outside = l1.vcpu.get_nested_state()
    for flags in (_IN_VMX, _IN_GUEST_MODE | _IN_VMX):
        assert _refused(l1, _patched(outside, _SMM_FLAGS, flags))
    l1.vcpu.smi()
    inside = _saved_in_smm(l1, l1.cpuid(0))
    both = _patched(inside, _SMM_FLAGS, _IN_GUEST_MODE | _IN_VMX)
    # Bit 0 of the state's own flags: L2 runs now.
    for state in (
        _patched(inside, 0, int.from_bytes(inside[:2], "little") | 1),
        _patched(both, 0, int.from_bytes(inside[:2], "little") | 1),
        _patched(inside, _SMM_FLAGS, 1 << 2),
        _patched(inside, _SMM_FLAGS, _IN_GUEST_MODE),
    ):
        assert _refused(l1, state)
    l1.vcpu.set_nested_state(inside)
    assert l1.resume() == Succeed()


def _patched(state: bytes, offset: int, value: int) -> bytes:
    return state[:offset] + value.to_bytes(2, "little") + state[offset + 2 :]


def _refused(l1: L1, state: bytes) -> bool:
    try:
        l1.vcpu.set_nested_state(state)
    except KvmError as error:
        return error.errno == errno.EINVAL
    return False
