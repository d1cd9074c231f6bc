"""Two vCPUs of L1: a VMCS that moves between them, and what one sends the other in L2."""

from __future__ import annotations

from typing import Any

import pytest

from kvmnest.kvm import Cap
from kvmnest.l1 import L1, code
from kvmnest.l1.cpu import Cpu
from kvmnest.suite.support.apic import FIXED, INIT, NMI, Apic
from kvmnest.suite.support.bitmaps import set_msr_bitmap
from kvmnest.suite.support.ept import RWX, identity_entry, poke
from kvmnest.suite.support.guest import NOT_VALID, Guest
from kvmnest.suite.support.virtual_apic import NOTIFICATION, POSTED, PostedInterrupts
from kvmnest.vmx import (
    Cr4,
    ExitCtl,
    ExitReason,
    Field,
    IntrType,
    Msr,
    PinCtl,
    Proc2Ctl,
    ProcCtl,
    Vector,
    VmxError,
    intr_info,
)
from kvmnest.vmx.outcome import Exit, Fault, HostExit, Succeed, VMfailInvalid, VMfailValid

pytestmark = [
    pytest.mark.series(8),
    pytest.mark.sdm("Software Use of Virtual-Machine Control Structures"),
]

OUT_80 = code.out8(0x80)
VECTOR = 0x51
IF = 0x202
X2APIC_BASE = 0xFEE00C00
STATE = (Field.GUEST_RIP, Field.GUEST_CR3, Field.GUEST_RFLAGS, Field.EXCEPTION_BITMAP)


def _second(l1: L1) -> Cpu:
    """The second vCPU, in VMX operation."""
    cpu = l1.add_cpu()
    l1.enter_vmx(cpu)
    return cpu


def _values(l1: L1, cpu: Cpu) -> list[int]:
    return [l1.vmread(field, cpu=cpu).value for field in STATE]


def _send(l1: L1, cpu: Cpu, mode: int, vector: int = 0) -> None:
    """Let the second vCPU send the first one an interrupt, by its local APIC."""
    for msr, value in ((Msr.APIC_BASE, X2APIC_BASE), (Msr.X2APIC_SIVR, 0x1FF)):
        assert l1.wrmsr(msr, value, cpu=cpu) == Succeed()
    assert l1.wrmsr(Msr.X2APIC_ICR, mode | 1 << 14 | vector, cpu=cpu) == Succeed()


# --- each has its own VMX operation and its own current VMCS ---


@pytest.mark.sdm("VMXON - Enter VMX Operation")
def test_vmx_operation_is_per_vcpu(l1: L1) -> None:
    """VMXON on one is not VMX operation on the other, and VMXOFF leaves the other in it."""
    second = l1.add_cpu()
    l1.enter_vmx()
    assert l1.vmptrst(cpu=second) == Fault(Vector.UD)
    l1.enter_vmx(second)
    assert l1.vmptrst(cpu=second) == Succeed(~0 & (1 << 64) - 1)
    assert l1.vmxoff() == Succeed()
    assert l1.vmptrst() == Fault(Vector.UD)
    assert l1.vmptrst(cpu=second) == Succeed(~0 & (1 << 64) - 1)
    assert l1.vmxoff(cpu=second) == Succeed()


@pytest.mark.sdm("Overview")
def test_current_vmcs_is_per_vcpu(l1: L1) -> None:
    """VMPTRLD on one changes nothing on the other; VMREAD without a current VMCS fails there."""
    second = _second(l1)
    first_vmcs = l1.launchable()
    assert l1.vmread(Field.GUEST_RIP, cpu=second) == VMfailInvalid()
    other = l1.load_vmcs("vmcs_b", cpu=second)
    assert l1.vmptrst() == Succeed(first_vmcs.address)
    assert l1.vmptrst(cpu=second) == Succeed(other.address)
    for cpu, value in ((l1.cpu, 0x1111), (second, 0x2222)):
        assert l1.vmwrite(Field.EXCEPTION_BITMAP, value, cpu=cpu) == Succeed()
    assert l1.vmread(Field.EXCEPTION_BITMAP) == Succeed(0x1111)
    assert l1.vmread(Field.EXCEPTION_BITMAP, cpu=second) == Succeed(0x2222)
    # VMCLEAR of the one leaves the other current.
    assert l1.vmclear(other.address, cpu=second) == Succeed()
    assert l1.vmread(Field.EXCEPTION_BITMAP) == Succeed(0x1111)


# --- a VMCS moves ---


@pytest.mark.parametrize("back", [False, True], ids=["once", "and-back"])
def test_vmcs_moves(l1: L1, back: bool) -> None:
    """VMCLEAR here, VMPTRLD there: the fields go along, and the launch state is clear."""
    second = _second(l1)
    vmcs = l1.launchable(l2=code.NOP)
    assert l1.vmlaunch().reason == ExitReason.VMCALL
    before = _values(l1, l1.cpu)
    way = [(l1.cpu, second), (second, l1.cpu)][: 1 + back]
    for old, new in way:
        assert l1.vmclear(vmcs.address, cpu=old) == Succeed()
        assert l1.vmread(Field.GUEST_RIP, cpu=old) == VMfailInvalid()
        assert l1.vmptrld(vmcs.address, cpu=new) == Succeed()
        assert _values(l1, new) == before
        resumed = l1.vmresume(cpu=new)
        assert resumed == VMfailValid(VmxError.VMRESUME_NONLAUNCHED_VMCS)
        for field, value in _host_of(l1, new).items():
            assert l1.vmwrite(field, value, cpu=new) == Succeed()
        assert l1.vmwrite(Field.GUEST_RIP, l1.sym("l2_code"), cpu=new) == Succeed()
        seen = l1.vmlaunch(cpu=new)
        assert (seen.reason, seen.rip) == (ExitReason.VMCALL, l1.sym("l2_code") + 1)
        assert l1.vmwrite(Field.GUEST_RIP, before[0], cpu=new) == Succeed()
        before = _values(l1, new)


def _host_of(l1: L1, cpu: Cpu) -> dict[Field, int]:
    """Host state that differs between the vCPUs: stack, task register."""
    at = cpu.index
    return {
        Field.HOST_RSP: cpu.block,
        Field.HOST_TR_SELECTOR: l1.sym(f"SEL_TSS{at}"),
        Field.HOST_TR_BASE: l1.sym(f"tss{at}"),
    }


@pytest.mark.sdm("Overview")
def test_both_run_an_l2(l1: L1) -> None:
    """While one is stopped in L2, the other launches its own L2 and both end as they should."""
    second = _second(l1)
    guest = Guest(l1)
    seen = guest.run(OUT_80 + code.NOP, {"rax": 1})
    assert isinstance(seen, HostExit)
    other = l1.load_vmcs("vmcs_b", l2="l2_registers", cpu=second)
    for turn in range(3):
        enter = l1.vmresume if turn else l1.vmlaunch
        other[Field.GUEST_RIP] = l1.sym("l2_registers")
        seen = enter(cpu=second, regs={"rax": turn, "rbx": 5})
        assert seen.reason == ExitReason.VMCALL
        assert (seen.regs["rax"], seen.regs["rbx"]) == (turn + 1, ~5 & (1 << 64) - 1)
    assert guest.resume() == Succeed()
    assert l1.vmptrst() == Succeed(guest.vmcs.address)


# --- what one sends while the other is in L2 ---


def _stopped(l1: L1, *flags: PinCtl | ExitCtl) -> Guest:
    """The first vCPU stopped in L2 by an OUT, its local APIC ready."""
    Apic(l1)
    guest = Guest(l1, *flags)
    set_msr_bitmap(l1)
    guest.on(ProcCtl.USE_MSR_BITMAPS)
    assert isinstance(guest.run(OUT_80 + code.NOP, {"rax": 1}, GUEST_RFLAGS=IF), HostExit)
    return guest


def _exit(guest: Guest, reason: ExitReason, info: Any = NOT_VALID) -> Exit:
    return guest.exit(reason, offset=len(OUT_80), intr_info=info)


@pytest.mark.series(20)
@pytest.mark.sdm("External interrupts")
@pytest.mark.needs(PinCtl.EXTERNAL_INTERRUPT_EXITING, ExitCtl.ACKNOWLEDGE_INTERRUPT_ON_EXIT)
def test_interrupt_from_the_other(l1: L1) -> None:
    """An interrupt that the second vCPU sends exits from L2 on the first, acknowledged."""
    second = l1.add_cpu()
    guest = _stopped(l1, PinCtl.EXTERNAL_INTERRUPT_EXITING, ExitCtl.ACKNOWLEDGE_INTERRUPT_ON_EXIT)
    _send(l1, second, FIXED, VECTOR)
    info = intr_info(VECTOR, IntrType.EXTERNAL_INTERRUPT)
    assert guest.resume() == _exit(guest, ExitReason.EXTERNAL_INTERRUPT, info)


@pytest.mark.series(20)
@pytest.mark.sdm("External interrupts")
def test_interrupt_for_l2_from_the_other(l1: L1) -> None:
    """Without external-interrupt exiting L2's own handler gets it."""
    second = l1.add_cpu()
    guest = _stopped(l1)
    _send(l1, second, FIXED, VECTOR)
    assert guest.resume() == Fault(VECTOR, error_code=0, rip=len(OUT_80))


@pytest.mark.series(20)
@pytest.mark.sdm("NMI-window exiting")
@pytest.mark.needs(PinCtl.NMI_EXITING)
def test_nmi_from_the_other(l1: L1) -> None:
    """An NMI that the second vCPU sends exits from L2 on the first."""
    second = l1.add_cpu()
    guest = _stopped(l1, PinCtl.NMI_EXITING)
    _send(l1, second, NMI)
    info = intr_info(Vector.NMI, IntrType.NMI)
    assert guest.resume() == _exit(guest, ExitReason.EXCEPTION_NMI, info)


@pytest.mark.series(19)
@pytest.mark.sdm("Other Causes of VM Exits")
def test_init_from_the_other(l1: L1) -> None:
    """An INIT that the second vCPU sends exits from L2 on the first and resets nothing."""
    second = l1.add_cpu()
    guest = _stopped(l1)
    _send(l1, second, INIT)
    assert guest.resume() == _exit(guest, ExitReason.INIT_SIGNAL)


@pytest.mark.series(20)
@pytest.mark.sdm("Posted-Interrupt Processing")
@pytest.mark.needs(*POSTED)
def test_posted_interrupt_from_the_other(l1: L1) -> None:
    """The second vCPU posts a vector and sends the notification: L2 gets it without an exit."""
    second = l1.add_cpu()
    posted = PostedInterrupts(l1)
    guest = posted.guest
    assert isinstance(guest.run(OUT_80 + code.NOP, {"rax": 1}, GUEST_RFLAGS=IF), HostExit)
    posted.post([VECTOR])
    _send(l1, second, FIXED, NOTIFICATION)
    assert guest.resume() == Fault(VECTOR, error_code=0, rip=len(OUT_80))
    assert posted.virtual.state() == ([], [VECTOR], 0, VECTOR)
    assert posted.left() == ([], False)


# --- one changes what the other uses ---


@pytest.mark.series(19)
@pytest.mark.sdm("Operations that Invalidate Cached Mappings")
@pytest.mark.needs(Proc2Ctl.ENABLE_EPT)
@pytest.mark.parametrize("running", [False, True], ids=["in-L1", "in-L2"])
def test_ept_changed_by_the_other(l1: L1, running: bool) -> None:
    """The second vCPU takes a page away; after INVEPT on the first L2 gets a violation there."""
    second = _second(l1)
    guest = Guest(l1, ept=True)
    page = l1.alloc()
    load = b"\x48\x8b\x07"  # MOV RAX, [RDI]
    assert guest.run(load, {"rdi": page}) == Succeed()
    entry = identity_entry(l1, page)
    kept = l1.read_int(entry)
    if running:
        assert isinstance(guest.run(OUT_80 + load, {"rdi": page}), HostExit)
    store = b"\x48\x89\x07"  # MOV [RDI], RAX
    assert l1.call(store, regs={"rdi": entry, "rax": kept & ~RWX}, cpu=second) == Succeed()
    if running:
        assert isinstance(guest.resume(), Succeed | Exit)  # before INVEPT both are right
    assert l1.invept(1, guest.vmcs[Field.EPT_POINTER]) == Succeed()
    seen = guest.run(load, {"rdi": page})
    assert isinstance(seen, Exit)
    assert (seen.reason, seen.physical) == (ExitReason.EPT_VIOLATION, page)
    poke(l1, entry, kept)
    assert guest.go_on() == Succeed()


@pytest.mark.series(24)
@pytest.mark.needs(Cap.NESTED_STATE)
def test_both_in_l2_are_saved_and_restored(l1: L1) -> None:
    """Both stopped in L2 when the VM is saved: each goes on in its own L2 in the new VM."""
    second = _second(l1)
    other = l1.load_vmcs("vmcs_b", cpu=second)
    page = l1.alloc()
    # MOV AL, 2; OUT 80H, AL; INC RBX; VMCALL
    l1.write(page, b"\xb0\x02" + OUT_80 + b"\x48\xff\xc3" + code.VMCALL)
    other[Field.GUEST_RIP] = page
    guest = Guest(l1)
    assert isinstance(guest.run(OUT_80 + code.NOP, {"rax": 1}), HostExit)
    assert isinstance(l1.vmlaunch(cpu=second, regs={"rbx": 6}), HostExit)
    l1.round_trip()
    assert guest.resume() == Succeed()
    seen = l1.resume(second)
    assert (seen.reason, seen.regs["rbx"]) == (ExitReason.VMCALL, 7)
    assert l1.read_cr(4, cpu=second).value & Cr4.VMXE
