"""A vCPU that is saved inside SMM goes on in another VM, and RSM brings VMX operation back."""

from __future__ import annotations

import struct

import pytest

from kvmnest.kvm import Cap, exits
from kvmnest.l1 import L1, code
from kvmnest.suite.support.guest import Guest
from kvmnest.vmx import Cr4, ExitReason, Vector, VmxError
from kvmnest.vmx.outcome import Exit, HostExit, Outcome, Succeed, VMfailValid

pytestmark = [
    pytest.mark.series(24),
    pytest.mark.sdm("Default Treatment of SMI Delivery"),
    pytest.mark.needs(Cap.X86_SMM, Cap.MULTI_ADDRESS_SPACE, Cap.NESTED_STATE),
]

NONE = 0xFFFFFFFFFFFFFFFF
#: Where SMM starts after a reset.
_SMBASE, _ENTRY = 0x30000, 0x38000
_PORT = 0x77
IN_PORT = b"\xe4\x77"
RSM = b"\x0f\xaa"
#: kvm_nested_state: flags, VMXON pointer, VMCS pointer, flags of SMM.
_STATE = struct.Struct("<H6xQQH")
_GUEST_MODE, _SMM_GUEST_MODE, _SMM_VMXON = 1, 1, 2


def _state(l1: L1) -> tuple[int, int, int, int]:
    flags, vmxon, vmcs, smm = _STATE.unpack_from(l1.vcpu.get_nested_state())
    return flags & _GUEST_MODE, vmxon, vmcs, smm


def _install(l1: L1, handler: bytes = IN_PORT + IN_PORT + RSM) -> None:
    l1.enable_smm()
    l1.write(_ENTRY, handler)


def _check_in_smm(l1: L1, seen: Outcome) -> None:
    assert isinstance(seen, HostExit)
    assert isinstance(seen.exit, exits.IoExit)
    assert seen.exit.port == _PORT
    # Complete the IN, so that what is saved is between two instructions.
    assert isinstance(l1.vcpu.run(immediate_exit=True), exits.IntrExit)
    assert l1.vcpu.get_vcpu_events().smi.smm == 1


def test_outside_vmx_operation(l1: L1) -> None:
    """Without VMX operation there is nothing of it in the state."""
    _install(l1)
    l1.vcpu.smi()
    _check_in_smm(l1, l1.cpuid(0))
    assert _state(l1) == (0, NONE, NONE, 0)
    l1.round_trip()
    _check_in_smm(l1, l1.resume())
    assert l1.resume() == Succeed()
    l1.enter_vmx()


@pytest.mark.parametrize("current", [False, True], ids=["no-VMCS", "VMCS"])
def test_from_root_operation(l1: L1, current: bool) -> None:
    """In SMM the state says that VMX operation waits; RSM returns to it, in the other VM too."""
    _install(l1)
    guest = None
    if current:
        guest = Guest(l1)
        assert guest.run(code.NOP) == Succeed()
    else:
        l1.enter_vmx()
    vmcs = guest.vmcs.address if guest else NONE
    l1.vcpu.smi()
    _check_in_smm(l1, l1.cpuid(0))
    for _ in range(2):
        assert _state(l1) == (0, l1.sym("vmxon_region"), vmcs, _SMM_VMXON)
        l1.round_trip()
    _check_in_smm(l1, l1.resume())
    assert l1.resume() == Succeed()
    assert _state(l1) == (0, l1.sym("vmxon_region"), vmcs, 0)
    assert l1.vmptrst() == Succeed(vmcs)
    if guest:
        assert l1.vmlaunch() == VMfailValid(VmxError.VMLAUNCH_NONCLEAR_VMCS)
        assert guest.run(code.NOP) == Succeed()
    assert l1.vmxoff() == Succeed()


@pytest.mark.parametrize("current", [False, True], ids=["no-VMCS", "VMCS"])
def test_handler_goes_on(l1: L1, current: bool) -> None:
    """SMM code sets CR4.PAE, as firmware does, after a move too: VMXE is not fixed there."""
    # MOV EAX, CR4; OR EAX, 20H; MOV CR4, EAX
    _install(l1, IN_PORT + b"\x0f\x20\xe0\x66\x83\xc8\x20\x0f\x22\xe0" + IN_PORT + RSM)
    l1.enter_vmx()
    if current:
        l1.load_vmcs()
    l1.vcpu.smi()
    _check_in_smm(l1, l1.cpuid(0))
    l1.round_trip()
    _check_in_smm(l1, l1.resume())
    assert l1.vcpu.get_sregs().cr4 == Cr4.PAE
    assert l1.resume() == Succeed()
    assert l1.vmxoff() == Succeed()


def test_from_l2(l1: L1) -> None:
    """In SMM entered from L2 the state says so; RSM returns to L2 in the other VM."""
    _install(l1)
    guest = Guest(l1)
    for _ in range(2):
        seen = guest.run(code.out8(0x80) + code.NOP * 2, GUEST_RFLAGS=0x202)
        assert isinstance(seen, HostExit)
        l1.vcpu.smi()
        _check_in_smm(l1, guest.resume())
        regs = l1.vcpu.get_regs()
        waiting = (0, l1.sym("vmxon_region"), guest.vmcs.address, _SMM_GUEST_MODE | _SMM_VMXON)
        assert _state(l1) == waiting
        l1.round_trip()
        assert _state(l1) == waiting
        assert l1.vcpu.get_regs().rip == regs.rip
        _check_in_smm(l1, guest.resume())
        seen = guest.resume()
        assert seen == Succeed()
        assert guest.changed(seen) == {}
        assert _state(l1)[0] == 0
    assert l1.vmptrst() == Succeed(guest.vmcs.address)
    assert l1.vmlaunch() == VMfailValid(VmxError.VMLAUNCH_NONCLEAR_VMCS)
    assert l1.vmresume() == Exit(ExitReason.VMCALL)


@pytest.mark.parametrize(
    "instruction",
    [
        pytest.param(b"\xf3\x0f\xc7\x36\x00\x82", id="VMXON"),
        pytest.param(b"\x66\x0f\xc7\x36\x00\x82", id="VMCLEAR"),
        pytest.param(b"\x0f\xc7\x36\x00\x82", id="VMPTRLD"),
        pytest.param(b"\x0f\xc7\x3e\x00\x82", id="VMPTRST"),
        pytest.param(code.VMXOFF, id="VMXOFF"),
        pytest.param(code.VMLAUNCH, id="VMLAUNCH"),
        pytest.param(code.VMRESUME, id="VMRESUME"),
    ],
)
@pytest.mark.parametrize("where", ["root", "L2"])
def test_instructions_in_smm(l1: L1, instruction: bytes, where: str) -> None:
    """SMM is outside VMX operation: its instructions are #UD there, and change nothing."""
    # On entry there is neither an IDT nor a stack: MOV AX, 3000H; MOV SS, AX; MOV SP, 8700H;
    # LIDT CS:[8300H].
    prepare = b"\xb8\x00\x30\x8e\xd0\xbc\x00\x87" + b"\x2e\x0f\x01\x1e\x00\x83"
    undefined, vectors = 0x8100, 0x38400
    _install(l1, prepare + instruction + b"\xe4\x76" + RSM)
    l1.write(_SMBASE + undefined, IN_PORT + RSM)
    l1.write(_SMBASE + 0x8300, struct.pack("<HI", 0x3FF, vectors))
    l1.write(vectors + 4 * Vector.UD, struct.pack("<HH", undefined, _SMBASE >> 4))
    guest = Guest(l1)
    if where == "L2":
        assert isinstance(guest.run(code.out8(0x80) + code.NOP), HostExit)
        l1.vcpu.smi()
        seen = guest.resume()
    else:
        assert guest.run(code.NOP) == Succeed()
        l1.vcpu.smi()
        seen = l1.cpuid(0)
    _check_in_smm(l1, seen)
    # The frame of #UD: IP of the instruction.
    assert l1.read_int(_SMBASE + 0x8700 - 6, 2) == _ENTRY - _SMBASE + len(prepare)
    assert (guest.resume() if where == "L2" else l1.resume()) == Succeed()
    assert l1.vmptrst() == Succeed(guest.vmcs.address)
    assert guest.run(code.NOP) == Succeed()
