"""Saving and restoring a vCPU whose L2 runs: nothing is lost, and a bad state is refused."""

from __future__ import annotations

import struct

import pytest

from kvmnest.kvm import Cap, KvmError
from kvmnest.kvm.exits import IO_OUT, IoExit
from kvmnest.l1 import L1, code
from kvmnest.suite.support.bitmaps import set_io_bitmaps, set_msr_bitmap
from kvmnest.suite.support.guest import Guest
from kvmnest.vmx import EntryCtl, ExitCtl, ExitReason, Field, Msr, PinCtl, ProcCtl
from kvmnest.vmx.outcome import HostExit, Succeed

pytestmark = [
    pytest.mark.series(24),
    pytest.mark.sdm("Software Use of Virtual-Machine Control Structures"),
    pytest.mark.needs(Cap.NESTED_STATE),
]

PORT = 0x30
OUT = code.out8(PORT)
_HEADER = 128
_VMXON, _VMCS, _SMM_FLAGS, _FLAGS = 8, 16, 24, 28
_GUEST_MODE, _RUN_PENDING = 1, 2


def _stopped(l1: L1, *flags: PinCtl | ProcCtl | ExitCtl | EntryCtl) -> Guest:
    """A guest whose OUTs come to userspace and whose MSR accesses do not exit."""
    guest = Guest(l1, ProcCtl.USE_IO_BITMAPS, ProcCtl.USE_MSR_BITMAPS, *flags)
    set_io_bitmaps(l1, ())
    set_msr_bitmap(l1)
    return guest


def _is_out(seen: object) -> bool:
    return (
        isinstance(seen, HostExit)
        and isinstance(seen.exit, IoExit)
        and (seen.exit.direction, seen.exit.port) == (IO_OUT, PORT)
    )


def _patched(state: bytes, offset: int, value: int, size: int = 8) -> bytes:
    return state[:offset] + value.to_bytes(size, "little") + state[offset + size :]


def _refused(l1: L1, state: bytes) -> bool:
    try:
        l1.vcpu.set_nested_state(state)
    except KvmError as error:
        return error.errno == 22
    return False


@pytest.mark.sdm("Saving Segment Registers and Descriptor-Table Registers")
def test_l2_moves_with_what_it_changed(l1: L1) -> None:
    """L2 that changed segment bases and MSRs goes on in another VM with the new values."""
    guest = _stopped(l1)
    values = {
        Msr.FS_BASE: 0x123456789000,
        Msr.GS_BASE: 0x7FFF12345000,
        Msr.KERNEL_GS_BASE: 0x7FFF54321000,
        Msr.SYSENTER_CS: 0x1238,
        Msr.SYSENTER_ESP: 0x112233445566,
        Msr.SYSENTER_EIP: 0x665544332211,
    }
    for msr, value in values.items():
        regs = {"rcx": msr, "rax": value & 0xFFFFFFFF, "rdx": value >> 32}
        snippet = code.WRMSR + OUT + code.RDMSR
        assert _is_out(guest.run(snippet, regs)), msr
        l1.round_trip()
        seen = guest.resume()
        assert seen == Succeed(), msr
        assert seen.regs["rdx"] << 32 | seen.regs["rax"] & 0xFFFFFFFF == value, msr
        # What was left of OUT and RDMSR in RAX does not count above its 32 bits.
    fields = {
        Field.GUEST_FS_BASE: values[Msr.FS_BASE],
        Field.GUEST_GS_BASE: values[Msr.GS_BASE],
        Field.GUEST_SYSENTER_CS: values[Msr.SYSENTER_CS],
        Field.GUEST_SYSENTER_ESP: values[Msr.SYSENTER_ESP],
        Field.GUEST_SYSENTER_EIP: values[Msr.SYSENTER_EIP],
    }
    assert guest.vmcs.read(*fields) == tuple(fields.values())


def test_state_follows_the_mode(l1: L1) -> None:
    """The header tells VMX operation, the current VMCS, and whether L2 runs."""
    off = 0xFFFFFFFFFFFFFFFF
    state = l1.vcpu.get_nested_state()
    assert (len(state), state[0]) == (_HEADER, 0)
    assert struct.unpack_from("<QQ", state, _VMXON) == (off, off)
    l1.enter_vmx()
    state = l1.vcpu.get_nested_state()
    assert (len(state), state[0]) == (_HEADER, 0)
    assert struct.unpack_from("<QQ", state, _VMXON) == (l1.sym("vmxon_region"), off)
    assert l1.vmxoff() == Succeed()
    guest = _stopped(l1)
    state = l1.vcpu.get_nested_state()
    assert state[0] & _GUEST_MODE == 0
    assert struct.unpack_from("<QQ", state, _VMXON) == (l1.sym("vmxon_region"), l1.sym("vmcs_a"))
    assert _is_out(guest.run(OUT))
    assert l1.vcpu.get_nested_state()[0] & (_GUEST_MODE | _RUN_PENDING) == _GUEST_MODE
    assert guest.resume() == Succeed()
    assert l1.vcpu.get_nested_state()[0] & _GUEST_MODE == 0


def test_inconsistent_header(l1: L1) -> None:
    """A state whose regions overlap, are not aligned or not addresses is refused as invalid."""
    guest = _stopped(l1)
    vmxon, vmcs = l1.sym("vmxon_region"), l1.sym("vmcs_a")
    good = l1.vcpu.get_nested_state()
    bad = {
        "VMCS is the VMXON region": _patched(good, _VMCS, vmxon),
        "VMXON region not aligned": _patched(good, _VMXON, vmxon + 8),
        "VMCS not aligned": _patched(good, _VMCS, vmcs + 8),
        "VMXON region beyond the address width": _patched(good, _VMXON, 1 << 52),
        "VMCS beyond the address width": _patched(good, _VMCS, 1 << 52),
        "VMCS without VMX operation": _patched(good, _VMXON, 0xFFFFFFFFFFFFFFFF),
        "unknown flag": _patched(good, 0, 0x8000, 2),
        "state of another architecture": _patched(good, 2, 1, 2),
        "unknown VMX flag": _patched(good, _FLAGS, 0x80, 4),
        "unknown SMM flag": _patched(good, _SMM_FLAGS, 0x80, 2),
        "run pending outside guest mode": _patched(good, 0, _RUN_PENDING, 2),
        "size without the VMCS": _patched(good, 4, _HEADER, 4),
    }
    for what, state in bad.items():
        assert _refused(l1, state), what
    l1.vcpu.set_nested_state(good)
    assert l1.vmptrst() == Succeed(vmcs)
    assert guest.run(b"") == Succeed()


def test_refused_state_leaves_nothing_pending(l1: L1) -> None:
    """After a state of an L2 with a bad control field was refused, L1 runs on."""
    guest = _stopped(l1)
    page = l1.alloc()
    guest.vmcs[Field.IO_BITMAP_A] = page
    assert _is_out(guest.run(OUT))
    good = l1.vcpu.get_nested_state()
    assert good.count(page.to_bytes(8, "little")) == 1
    at = good.index(page.to_bytes(8, "little"))
    bad = _patched(_patched(good, at, page + 1), 0, good[0] | _RUN_PENDING, 2)
    assert _refused(l1, bad)
    # The refusal took the vCPU out of L2; L1 goes on at HOST_RIP and finishes its command.
    assert isinstance(l1.cpu.resume(), list)
    assert l1.vmptrst() == Succeed(l1.sym("vmcs_a"))


@pytest.mark.needs(Cap.X86_TRIPLE_FAULT_EVENT)
@pytest.mark.sdm("Information for VM Exits That Occur During Event Delivery")
def test_triple_fault_ends_an_event(l1: L1) -> None:
    """The IDT-vectoring information of a triple-fault exit is not valid."""
    l1.enable_cap(Cap.X86_TRIPLE_FAULT_EVENT)
    guest = _stopped(l1)
    assert _is_out(guest.run(OUT))
    # KVM ends the OUT at the next KVM_RUN; before that no event can be in flight.
    l1.vcpu.run(immediate_exit=True)
    events = l1.vcpu.get_vcpu_events()
    events.exception.injected, events.exception.nr = 1, 6
    events.triple_fault.pending = 1
    events.flags |= 0x20  # KVM_VCPUEVENT_VALID_TRIPLE_FAULT
    l1.vcpu.set_vcpu_events(events)
    assert guest.resume() == guest.exit(ExitReason.TRIPLE_FAULT, offset=len(OUT))
    assert guest.run(b"") == Succeed()
