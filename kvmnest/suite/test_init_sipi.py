"""INIT signals and start-up IPIs that arrive while L2 runs, halts or waits for SIPI."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import pytest

from kvmnest.errors import HarnessError
from kvmnest.kvm import Cap, Kvm, KvmError, exits
from kvmnest.l1 import L1, VmLost, code
from kvmnest.suite.support.apic import ENABLED, INIT, SIPI, TO_APIC_0, X2APIC, Apic
from kvmnest.suite.support.guest import Guest
from kvmnest.vmx import ActivityState, Cr0, ExitReason, Field, Misc, Msr, Rflags, Vector
from kvmnest.vmx.outcome import Exit, HostExit, Succeed

pytestmark = [
    pytest.mark.series(19),
    pytest.mark.sdm("Other Causes of VM Exits"),
    pytest.mark.needs(Cap.SIGNAL_MSI),
]

OUT_80 = code.out8(0x80)
_RUNNABLE, _INIT_RECEIVED = 0, 2
#: Of a command that never returns.
_SECONDS = 0.5


def _guest(l1: L1) -> Guest:
    Apic(l1)  # no IPI reaches an APIC that software has not enabled
    return Guest(l1)


def _stopped(l1: L1, behind: bytes = code.NOP, **fields: int) -> Guest:
    """L2 stopped by an OUT that userspace sees, and which is done; ``behind`` follows it."""
    guest = _guest(l1)
    seen = guest.run(OUT_80 + behind, **fields)
    assert isinstance(seen, HostExit)
    assert isinstance(l1.vcpu.run(immediate_exit=True), exits.IntrExit)
    return guest


def _exit(guest: Guest, reason: ExitReason, qualification: int, offset: int) -> Exit:
    return guest.exit(reason, offset=offset, qualification=qualification)


def test_init_in_l2(l1: L1) -> None:
    """INIT exits before L2's next instruction, whatever RFLAGS.IF is, and resets nothing."""
    for flags in (0x2, 0x202):
        guest = _stopped(l1, GUEST_RFLAGS=flags)
        before = l1.vcpu.get_regs()
        assert l1.vm.signal_msi(TO_APIC_0, INIT) == 1
        seen = guest.resume()
        assert seen == _exit(guest, ExitReason.INIT_SIGNAL, 0, 2)
        assert guest.changed(seen) == {}
        assert guest.vmcs.read(Field.GUEST_RFLAGS, Field.GUEST_ACTIVITY_STATE) == (flags, 0)
        assert guest.vmcs[Field.GUEST_RSP] == before.rsp
        # The signal is used up by the exit: L2 goes on.
        assert guest.go_on() == Succeed()
        assert l1.vmxoff() == Succeed()


@pytest.mark.sdm("Saving Non-Register State")
def test_init_keeps_a_pending_single_step(l1: L1) -> None:
    """The trap of TF behind an instruction stays pending over the exit for INIT."""
    l1.enable_cap(Cap.EXCEPTION_PAYLOAD)  # so that a pending exception can be saved as such
    guest = _guest(l1)
    # L2 sets TF itself (PUSH RAX; POPFQ), so that the OUT is the instruction that traps.
    program = b"\x50\x9d" + OUT_80 + code.NOP
    seen = guest.run(program, {"rax": 0x2 | Rflags.TF}, EXCEPTION_BITMAP=1 << 1)
    assert isinstance(seen, HostExit)
    assert l1.vm.signal_msi(TO_APIC_0, INIT) == 1
    assert guest.resume() == _exit(guest, ExitReason.INIT_SIGNAL, 0, 4)
    assert guest.vmcs[Field.GUEST_PENDING_DBG_EXCEPTIONS] == 1 << 14
    assert guest.go_on() == guest.exception(Vector.DB, offset=4, qualification=1 << 14)


@pytest.mark.needs(Misc.ACTIVITY_HLT)
def test_init_wakes_from_hlt(l1: L1) -> None:
    """INIT exits from the HLT state too."""
    guest = _guest(l1)
    assert guest.run(code.NOP) == Succeed()
    assert l1.vm.signal_msi(TO_APIC_0, INIT) == 1
    # INIT is blocked in VMX root operation: it waits until L2 is entered.
    seen = guest.run(code.NOP, GUEST_ACTIVITY_STATE=ActivityState.HLT)
    assert seen == _exit(guest, ExitReason.INIT_SIGNAL, 0, 0)


@pytest.mark.sdm("Restrictions on VMX Operation")
def test_init_is_blocked_in_root_operation(l1: L1) -> None:
    """In VMX root operation INIT waits: L1 runs on, and the next entry to L2 exits."""
    guest = _guest(l1)
    assert l1.vm.signal_msi(TO_APIC_0, INIT) == 1
    cr3 = l1.read_cr(3)
    assert cr3 == Succeed(l1.sym("l1_pml4"))
    for _ in range(2):
        assert l1.cpuid(0) == Succeed()
    assert guest.run(code.NOP) == _exit(guest, ExitReason.INIT_SIGNAL, 0, 0)
    assert guest.go_on() == Succeed()


@pytest.mark.sdm("VMXOFF - Leave VMX Operation")
@pytest.mark.parametrize("index", [0, 1], ids=["bootstrap", "application"])
def test_latched_init_is_taken_after_vmxoff(kvm: Kvm, index: int) -> None:
    """INIT that waited in VMX root operation resets the processor when it leaves that.

    The bootstrap processor begins at the reset vector; another waits for a start-up IPI.
    """
    with contextlib.closing(L1(kvm, budget=_SECONDS)) as l1:
        while len(l1.cpus) <= index:
            l1.add_cpu()
        cpu = l1.cpus[index]
        base = l1.rdmsr(Msr.APIC_BASE, cpu=cpu).value
        for msr, value in ((Msr.APIC_BASE, base | X2APIC), (Msr.X2APIC_SIVR, ENABLED)):
            assert l1.wrmsr(msr, value, cpu=cpu) == Succeed()
        l1.enter_vmx(cpu)
        assert l1.vm.signal_msi(TO_APIC_0 + (index << 12), INIT) == 1
        assert l1.cpuid(0, cpu=cpu) == Succeed()
        # Nothing of L1 is at the reset vector.
        with pytest.raises(VmLost):
            l1.vmxoff(cpu=cpu)
        vcpu = cpu.vcpu
        sregs, regs = vcpu.get_sregs(), vcpu.get_regs()
        assert (sregs.cs.selector, sregs.cs.base, regs.rip) == (0xF000, 0xFFFF0000, 0xFFF0)
        # RFLAGS.RF is of the fetch that failed.
        assert (sregs.cr0, sregs.cr4, sregs.efer) == (Cr0.ET, 0, 0)
        assert regs.rflags & ~Rflags.RF == 2
        assert vcpu.get_mp_state() == (_INIT_RECEIVED if index else _RUNNABLE)


def test_sipi_does_not_touch_an_active_l2(l1: L1) -> None:
    """A start-up IPI counts only in the wait-for-SIPI state: L2 that is active goes on."""
    guest = _stopped(l1)
    l1.vm.signal_msi(TO_APIC_0, SIPI | 0x12)
    seen = guest.resume()
    assert seen == Succeed()
    assert guest.changed(seen) == {}
    # Nothing of it is left for later.
    assert guest.run(code.NOP) == Succeed()


@contextlib.contextmanager
def _sender(l1: L1, *modes: int) -> Iterator[None]:
    """A thread that sends these IPIs again and again: KVM drops a SIPI that nobody waits for."""
    done = threading.Event()

    def send() -> None:
        while not done.wait(0.002):
            for mode in modes:
                # A round trip may just have closed the VM.
                with contextlib.suppress(KvmError, HarnessError):
                    l1.vm.signal_msi(TO_APIC_0, mode)

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@pytest.mark.needs(Misc.ACTIVITY_WAIT_FOR_SIPI)
def test_sipi_to_a_waiting_l2(l1: L1) -> None:
    """L2 entered in the wait-for-SIPI state exits for the start-up IPI, with its vector."""
    guest = _guest(l1)
    assert guest.run(code.NOP) == Succeed()
    for vector in (0x9A, 0x00, 0xFF):
        with _sender(l1, SIPI | vector):
            seen = guest.run(
                code.NOP,
                GUEST_RFLAGS=0x202,
                GUEST_ACTIVITY_STATE=ActivityState.WAIT_FOR_SIPI,
            )
        assert seen == _exit(guest, ExitReason.SIPI_SIGNAL, vector, 0)
        assert guest.changed(seen) == {}
        assert guest.vmcs[Field.GUEST_ACTIVITY_STATE] == ActivityState.WAIT_FOR_SIPI
        guest.vmcs[Field.GUEST_ACTIVITY_STATE] = ActivityState.ACTIVE
        assert guest.go_on() == Succeed()
