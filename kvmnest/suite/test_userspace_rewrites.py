"""Userspace reads any state of a vCPU in L2 and writes it back: nothing changes, for L2 or L1."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from kvmnest.kvm import Cap, exits
from kvmnest.l1 import L1, L2Mode, code
from kvmnest.suite.support.apic import INIT, NMI, TO_APIC_0, Apic
from kvmnest.suite.support.guest import PATTERN, Guest
from kvmnest.vmx import ExitCtl, ExitReason, IntrType, Msr, PinCtl, Proc2Ctl, Vector, intr_info
from kvmnest.vmx.outcome import Exit, Fault, HostExit, Outcome, Succeed

pytestmark = [
    pytest.mark.series(24),
    pytest.mark.sdm("VMX Non-Root Operation"),
    pytest.mark.needs(Cap.NESTED_STATE, Proc2Ctl.ENABLE_EPT),
]

OUT_80 = code.out8(0x80)
VECTOR = 0x51
_MSRS = (
    *(Msr.SYSENTER_CS, Msr.SYSENTER_ESP, Msr.SYSENTER_EIP, Msr.STAR, Msr.LSTAR, Msr.CSTAR),
    *(Msr.KERNEL_GS_BASE, Msr.PAT, Msr.APIC_BASE, Msr.IA32_FEATURE_CONTROL),
)


def _msrs(l1: L1) -> None:
    l1.vcpu.set_msrs(l1.vcpu.get_msrs(_MSRS))


def _clock(l1: L1) -> None:
    l1.vm.set_clock(l1.vm.get_clock())


def _pair(name: str) -> Callable[[L1], None]:
    def rewrite(l1: L1) -> None:
        getattr(l1.vcpu, f"set_{name}")(getattr(l1.vcpu, f"get_{name}")())

    return rewrite


#: The ioctls that write the state of a vCPU, or time, each given what its counterpart has read.
REWRITES: dict[str, Callable[[L1], None]] = {
    **{
        name: _pair(name)
        for name in (
            *("regs", "sregs", "sregs2", "fpu", "xsave", "xcrs", "debugregs", "vcpu_events"),
            *("mp_state", "lapic", "cpuid", "nested_state", "tsc_khz"),
        )
    },
    "msrs": _msrs,
    "guest_debug": lambda l1: l1.vcpu.set_guest_debug(0),
    "clock": _clock,
}
_NEEDS = {
    "xcrs": Cap.XCRS,
    "sregs2": Cap.SREGS2,
    "tsc_khz": Cap.TSC_CONTROL,
    "guest_debug": Cap.SET_GUEST_DEBUG,
    "clock": Cap.ADJUST_CLOCK,
}
MODES = (L2Mode.LONG, L2Mode.PAE, L2Mode.PROTECTED, L2Mode.UNPAGED, L2Mode.REAL)


def _stop(guest: Guest, **fields: int) -> None:
    """Run L2 to an OUT that userspace sees and that is done."""
    seen = guest.run(OUT_80 + code.NOP, **fields)
    assert isinstance(seen, HostExit)
    assert isinstance(guest.l1.vcpu.run(immediate_exit=True), exits.IntrExit)


def _needed(l1: L1, name: str) -> None:
    if name in _NEEDS and not l1.kvm.check_extension(_NEEDS[name]):
        pytest.skip(f"needs {_NEEDS[name].name}")


def _offered(l1: L1) -> list[str]:
    offered = l1.kvm.check_extension
    return [name for name in REWRITES if name not in _NEEDS or offered(_NEEDS[name])]


@pytest.mark.parametrize("name", REWRITES)
def test_in_every_mode_of_l2(l1: L1, name: str) -> None:
    """L2 of each mode goes on with its registers, exits as it would have, and L1 is as before."""
    _needed(l1, name)
    modes = [m for m in MODES if m.name not in ("UNPAGED", "REAL")]
    if l1.caps.supports(Proc2Ctl.UNRESTRICTED_GUEST):
        modes = list(MODES)
    for mode in modes:
        guest = Guest(l1, mode=mode, ept=True)
        _stop(guest)
        for _ in range(2):
            REWRITES[name](l1)
        seen = guest.resume()
        assert seen == Succeed(), mode
        if mode is L2Mode.LONG:
            assert {key: seen.regs[key] for key in PATTERN} == guest.loaded, mode
        assert l1.read_cr(3) == Succeed(l1.sym("l1_pml4")), mode
        assert l1.vmptrst() == Succeed(guest.vmcs.address), mode
        assert l1.vmxoff() == Succeed(), mode


def _interrupt(l1: L1) -> None:
    assert l1.vm.signal_msi(TO_APIC_0, VECTOR) == 1


def _nmi(l1: L1) -> None:
    assert l1.vm.signal_msi(TO_APIC_0, NMI) == 1


_PENDING: dict[str, Callable[[L1], None]] = {
    "interrupt": _interrupt,
    "NMI": _nmi,
}


@pytest.mark.needs(
    Cap.SIGNAL_MSI,
    PinCtl.NMI_EXITING,
    PinCtl.EXTERNAL_INTERRUPT_EXITING,
    ExitCtl.ACKNOWLEDGE_INTERRUPT_ON_EXIT,
)
@pytest.mark.parametrize("pending", _PENDING)
@pytest.mark.parametrize("name", REWRITES)
def test_with_an_event_pending(l1: L1, name: str, pending: str) -> None:
    """What waits for L2 is not lost, nor does it come twice."""
    _needed(l1, name)
    Apic(l1)
    guest = Guest(l1, PinCtl.NMI_EXITING, PinCtl.EXTERNAL_INTERRUPT_EXITING)
    guest.on(ExitCtl.ACKNOWLEDGE_INTERRUPT_ON_EXIT)
    _stop(guest)
    _PENDING[pending](l1)
    for _ in range(2):
        REWRITES[name](l1)
    seen: Any = guest.resume()
    info = {
        "interrupt": (ExitReason.EXTERNAL_INTERRUPT, VECTOR, IntrType.EXTERNAL_INTERRUPT),
        "NMI": (ExitReason.EXCEPTION_NMI, Vector.NMI, IntrType.NMI),
    }[pending]
    reason, vector, kind = info
    assert seen == Exit(reason, rip=guest.at(len(OUT_80)), intr_info=intr_info(vector, kind))
    assert guest.go_on() == Succeed()


_PAYLOAD, _TRIPLE_FAULT, _GP = 0x10, 0x20, 13  # two of kvm_vcpu_events.flags, and a vector
_CODE = 0x28


def _event(l1: L1, **fields: int) -> None:
    events = l1.vcpu.get_vcpu_events()
    events.flags |= _PAYLOAD
    for name, value in {"nr": _GP, "has_error_code": 1, "error_code": _CODE, **fields}.items():
        setattr(events.exception, name, value)
    l1.vcpu.set_vcpu_events(events)


def _triple_fault(l1: L1) -> None:
    events = l1.vcpu.get_vcpu_events()
    events.flags |= _TRIPLE_FAULT
    events.triple_fault.pending = 1
    l1.vcpu.set_vcpu_events(events)


def _init(l1: L1) -> None:
    assert l1.vm.signal_msi(TO_APIC_0, INIT) == 1


def _handled(_: Guest, offset: int) -> Outcome:
    return Fault(_GP, error_code=_CODE, rip=offset)


#: KVM takes these for a new place in a program or a new L2: userspace writes events behind them.
_DROP_EVENTS = ("regs", "nested_state")
#: What waits for L2: how it gets there, L1's exception bitmap, and how L2 goes on.
_EXCEPTIONAL: dict[str, tuple[Callable[[L1], None], int, Callable[[Guest, int], object]]] = {
    "pending": (lambda l1: _event(l1, pending=1), 0, _handled),
    "pending-intercepted": (
        lambda l1: _event(l1, pending=1),
        1 << _GP,
        lambda guest, offset: guest.exception(Vector.GP, _CODE, offset=offset),
    ),
    "injected": (lambda l1: _event(l1, injected=1), 1 << _GP, _handled),
    "triple-fault": (
        _triple_fault,
        0,
        lambda guest, offset: Exit(ExitReason.TRIPLE_FAULT, rip=guest.at(offset)),
    ),
    "INIT": (_init, 0, lambda guest, offset: Exit(ExitReason.INIT_SIGNAL, rip=guest.at(offset))),
}


@pytest.mark.needs(Cap.EXCEPTION_PAYLOAD, Cap.X86_TRIPLE_FAULT_EVENT, Cap.SIGNAL_MSI)
@pytest.mark.parametrize("moved", [False, True], ids=["", "moved"])
@pytest.mark.parametrize("pending", _EXCEPTIONAL)
def test_with_an_exception_pending(l1: L1, pending: str, moved: bool) -> None:
    """Nor are exceptions, a triple fault or INIT, whatever userspace rewrites meanwhile."""
    for cap in (Cap.EXCEPTION_PAYLOAD, Cap.X86_TRIPLE_FAULT_EVENT):
        l1.enable_cap(cap)
    make, bitmap, expected = _EXCEPTIONAL[pending]
    Apic(l1)
    for name in _offered(l1):
        guest = Guest(l1, ept=True)
        _stop(guest, EXCEPTION_BITMAP=bitmap)
        make(l1)
        events = l1.vcpu.get_vcpu_events()
        for _ in range(2):
            REWRITES[name](l1)
        if name in _DROP_EVENTS:
            l1.vcpu.set_vcpu_events(events)
        if moved:
            l1.round_trip()
        assert guest.resume() == expected(guest, len(OUT_80)), name
        assert l1.vmptrst() == Succeed(guest.vmcs.address), name
        assert l1.vmxoff() == Succeed(), name


#: Where SMM starts after a reset, and what its code counts: INC WORD CS:[8100H].
_SMM_CODE, _SMM_COUNT = 0x38000, 0x38100
_COUNT = b"\x2e\xff\x06\x00\x81"
_IN_80, _RSM = b"\xe4\x80", b"\x0f\xaa"
_SMM = (Cap.X86_SMM, Cap.MULTI_ADDRESS_SPACE)


@pytest.mark.needs(*_SMM)
@pytest.mark.sdm("Default Treatment of SMI Delivery")
@pytest.mark.parametrize("moved", [False, True], ids=["", "moved"])
def test_with_an_smi_pending(l1: L1, moved: bool) -> None:
    """An SMI that waits for L2 comes once, and L2 goes on with all its registers after RSM."""
    l1.enable_smm()
    l1.write(_SMM_CODE, _COUNT + _RSM)
    for number, name in enumerate(_offered(l1), 1):
        guest = Guest(l1, ept=True)
        _stop(guest)
        l1.vcpu.smi()
        for _ in range(2):
            REWRITES[name](l1)
        assert l1.vcpu.get_vcpu_events().smi.pending == 1, name
        if moved:
            l1.round_trip()
        seen = guest.resume()
        assert seen == Succeed(), name
        assert guest.changed(seen) == {}, name
        assert l1.read_int(_SMM_COUNT, 2) == number, name
        assert l1.vmptrst() == Succeed(guest.vmcs.address), name
        assert l1.vmxoff() == Succeed(), name


@pytest.mark.needs(*_SMM)
@pytest.mark.sdm("Default Treatment of RSM")
@pytest.mark.parametrize("moved", [False, True], ids=["", "moved"])
@pytest.mark.parametrize("from_l2", [False, True], ids=["from-root", "from-L2"])
def test_in_smm(l1: L1, from_l2: bool, moved: bool) -> None:
    """A vCPU in SMM stays there, and RSM brings back L2, or L1 with its current VMCS."""
    l1.enable_smm()
    l1.write(_SMM_CODE, _COUNT + _IN_80 + _COUNT + _RSM)
    for number, name in enumerate(_offered(l1), 1):
        guest = Guest(l1, ept=True)
        if from_l2:
            _stop(guest)
        else:
            assert guest.run(code.NOP) == Succeed()
        l1.vcpu.smi()
        seen = guest.resume() if from_l2 else l1.cpuid(0)
        assert isinstance(seen, HostExit), name
        assert isinstance(l1.vcpu.run(immediate_exit=True), exits.IntrExit)
        for _ in range(2):
            REWRITES[name](l1)
        assert l1.vcpu.get_vcpu_events().smi.smm == 1, name
        if moved:
            l1.round_trip()
        after = guest.resume() if from_l2 else l1.resume()
        assert after == Succeed(), name
        assert l1.read_int(_SMM_COUNT, 2) == 2 * number, name
        if from_l2:
            assert guest.changed(after) == {}, name
        assert l1.vmptrst() == Succeed(guest.vmcs.address), name
        assert l1.vmxoff() == Succeed(), name


@pytest.mark.needs(
    *(Cap.EXCEPTION_PAYLOAD, Cap.X86_TRIPLE_FAULT_EVENT, Cap.SIGNAL_MSI),
    *(PinCtl.NMI_EXITING, PinCtl.EXTERNAL_INTERRUPT_EXITING),
)
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
def test_moved_in_every_mode_of_l2(l1: L1, mode: L2Mode) -> None:
    """What waits for an L2 of any mode comes in the VM to which it is moved, at the same place."""
    if mode.name in ("UNPAGED", "REAL") and not l1.caps.supports(Proc2Ctl.UNRESTRICTED_GUEST):
        pytest.skip("needs Proc2Ctl.UNRESTRICTED_GUEST")
    for cap in (Cap.EXCEPTION_PAYLOAD, Cap.X86_TRIPLE_FAULT_EVENT):
        l1.enable_cap(cap)
    Apic(l1)
    waits: dict[str, tuple[Callable[[L1], None], ExitReason]] = {
        "nothing": (lambda _: None, ExitReason.VMCALL),
        "interrupt": (_interrupt, ExitReason.EXTERNAL_INTERRUPT),
        "NMI": (_nmi, ExitReason.EXCEPTION_NMI),
        "exception": (lambda l1: _event(l1, pending=1), ExitReason.EXCEPTION_NMI),
        "triple-fault": (_triple_fault, ExitReason.TRIPLE_FAULT),
        "INIT": (_init, ExitReason.INIT_SIGNAL),
    }
    for name, (make, reason) in waits.items():
        guest = Guest(
            l1, PinCtl.NMI_EXITING, PinCtl.EXTERNAL_INTERRUPT_EXITING, mode=mode, ept=True
        )
        guest.on(ExitCtl.ACKNOWLEDGE_INTERRUPT_ON_EXIT)
        _stop(guest, EXCEPTION_BITMAP=1 << _GP)
        make(l1)
        before = l1.vcpu.get_regs().rip
        l1.round_trip()
        assert l1.vcpu.get_regs().rip == before, name
        seen: Any = l1.resume()
        assert seen.reason == reason, name
        assert seen.rip == before + (name == "nothing"), name
        if name == "interrupt":
            assert l1.wrmsr(Msr.X2APIC_EOI, 0) == Succeed()
        assert l1.vmxoff() == Succeed(), name
