"""State of a vCPU that userspace sets in the middle of L2 takes effect whole, or not at all."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from kvmnest.kvm import Cap, KvmError, Memory, exits
from kvmnest.kvm.cpuid import CPUID_1_ECX_VMX, leaf
from kvmnest.l1 import L1, L2Mode, VmLost, code, vcpu_state
from kvmnest.suite.support.bitmaps import set_io_bitmaps
from kvmnest.suite.support.ept import RWX, WRITE_BACK, identity_entry
from kvmnest.suite.support.guest import NOT_VALID, Guest
from kvmnest.vmx import ExitReason, Field, Msr, Proc2Ctl, ProcCtl, Vector
from kvmnest.vmx.outcome import Exit, Fault, HostExit, Succeed

pytestmark = [
    pytest.mark.series(24),
    pytest.mark.sdm("VMX Non-Root Operation"),
    pytest.mark.needs(Cap.NESTED_STATE),
]

OUT_80 = code.out8(0x80)
#: Offsets and bits of struct kvm_nested_state (kernel documentation, "KVM_GET_NESTED_STATE").
_VMXON, _SMM_FLAGS = 8, 24
_GUEST_MODE, _RUN_PENDING = 1, 2
_NO_VMXON = b"\xff" * 8
#: kvm_vcpu_events.flags
_VALID_SMM, _PAYLOAD = 0x08, 0x10


def _stop(guest: Guest, behind: bytes = code.NOP, **fields: int) -> None:
    """Run L2 to an OUT that userspace sees and that is done; ``behind`` follows it."""
    seen = guest.run(OUT_80 + behind, **fields)
    assert isinstance(seen, HostExit)
    assert isinstance(seen.exit, exits.IoExit)
    assert isinstance(guest.l1.vcpu.run(immediate_exit=True), exits.IntrExit)


def _patched(state: bytes, value: int, other: int) -> bytes:
    """Replace a 64-bit value that occurs once in a nested state."""
    before = value.to_bytes(8, "little")
    assert state.count(before) == 1
    return state.replace(before, other.to_bytes(8, "little"))


def _error_of(l1: L1, state: bytes) -> int:
    """The errno of KVM_SET_NESTED_STATE with this state, 0 if KVM takes it."""
    try:
        l1.vcpu.set_nested_state(state)
    except KvmError as error:
        return error.errno or 0
    return 0


def _copied_table(l1: L1, name: str) -> int:
    """A copy of the topmost paging structure of that name: an address that occurs only once."""
    table = l1.alloc()
    l1.write(table, l1.read(l1.sym(name), 4096))
    return table


_FIELDS = {
    "control": Field.IO_BITMAP_A,
    "host-state": Field.HOST_CR3,
    "guest-CR3": Field.GUEST_CR3,
}


def _refused(l1: L1, field: str, pending: int) -> tuple[int, int, int]:
    """Give KVM a bad state of L2: the errno, a page, and the page to which L2's EPT moves it."""
    guest = Guest(l1, ProcCtl.USE_IO_BITMAPS, ept=True)
    set_io_bitmaps(l1, ())
    page, other = l1.alloc(), l1.alloc()
    l1.write_int(page, 0x1111)
    l1.write_int(other, 0x2222)
    l1.write_int(identity_entry(l1, page), other | WRITE_BACK | RWX)
    value = {
        "control": l1.alloc(),
        "host-state": _copied_table(l1, "l1_pml4"),
        "guest-CR3": _copied_table(l1, "l2_pml4"),
    }[field]
    guest.vmcs[_FIELDS[field]] = value
    _stop(guest)
    good = l1.vcpu.get_nested_state()
    bad = _patched(good, value, value + 1 if field == "control" else value | 1 << 60)
    return _error_of(l1, bytes([bad[0] | pending]) + bad[1:]), page, other


_REFUSED = [
    pytest.mark.needs(Proc2Ctl.ENABLE_EPT),
    pytest.mark.sdm("VM-Execution Control Fields"),
    pytest.mark.parametrize("pending", [0, _RUN_PENDING], ids=["", "run-pending"]),
    pytest.mark.parametrize("field", _FIELDS),
]


def _of_refused(case: Any) -> Any:
    for mark in _REFUSED:
        case = mark(case)
    return case


@_of_refused
def test_refused_state_is_told(l1: L1, field: str, pending: int) -> None:
    """KVM_SET_NESTED_STATE says EINVAL for a state of L2 that it does not take."""
    assert _refused(l1, field, pending)[0] == errno.EINVAL


@_of_refused
def test_refused_state_leaves_l1s_memory(l1: L1, field: str, pending: int) -> None:
    """A state of L2 that is refused, early or late, leaves L1 with memory as L1 sees it.

    L2's EPT maps one page elsewhere, so that an L1 whose accesses went through it would be seen.
    """
    _, page, other = _refused(l1, field, pending)
    assert not l1.vcpu.get_nested_state()[0] & _GUEST_MODE
    assert l1.vcpu.translate(page).physical_address == page
    # The refusal took the vCPU out of L2: L1 goes on at HOST_RIP and finishes its command.
    assert isinstance(l1.cpu.resume(), list)
    read = l1.call(b"\x48\x8b\x07", regs={"rdi": page})  # MOV RAX, [RDI]
    assert read.regs["rax"] == 0x1111
    assert l1.call(b"\x48\x89\x07", regs={"rdi": page, "rax": 0x3333}) == Succeed()
    assert (l1.read_int(page), l1.read_int(other)) == (0x3333, 0x2222)
    assert l1.vmptrst() == Succeed(l1.sym("vmcs_a"))


@pytest.mark.needs(Cap.X86_SMM, Cap.MULTI_ADDRESS_SPACE)
@pytest.mark.sdm("Default Treatment of SMI Delivery")
@pytest.mark.parametrize("where", ["L2", "root"])
def test_smm_set_by_userspace(l1: L1, where: str) -> None:
    """Userspace that puts a vCPU into SMM ends its nested operation; a restore brings it back."""
    l1.enable_smm()
    guest = Guest(l1)
    assert guest.run(code.NOP) == Succeed()
    if where == "L2":
        _stop(guest)
    saved = vcpu_state.save(l1.kvm, l1.vcpu)
    for smm in (1, 0):
        events = l1.vcpu.get_vcpu_events()
        events.smi.smm = smm
        events.flags |= _VALID_SMM
        l1.vcpu.set_vcpu_events(events)
        state = l1.vcpu.get_nested_state()
        assert state[0] & _GUEST_MODE == 0
        assert state[_VMXON : _VMXON + 8] == _NO_VMXON
    vcpu_state.restore(l1.vcpu, saved)
    if where == "L2":
        assert guest.resume() == Succeed()
    assert l1.vmptrst() == Succeed(guest.vmcs.address)
    assert guest.run(code.NOP) == Succeed()


def _tr_unusable(sregs: Any) -> None:
    sregs.tr.unusable = 1


def _cs_data(sregs: Any) -> None:
    sregs.cs.type = 2


def _cs_absent(sregs: Any) -> None:
    sregs.cs.present = 0


def _ss_code(sregs: Any) -> None:
    sregs.ss.type = 0xB


def _tr_available(sregs: Any) -> None:
    sregs.tr.type = 9


def _ldt_code(sregs: Any) -> None:
    sregs.ldt.unusable, sregs.ldt.present, sregs.ldt.s, sregs.ldt.type = 0, 1, 1, 0xB


_DAMAGE = {
    "TR-unusable": (_tr_unusable, "TR"),
    "TR-available": (_tr_available, "TR"),
    "CS-data": (_cs_data, "CS"),
    "CS-absent": (_cs_absent, "CS"),
    "SS-code": (_ss_code, "SS"),
    "LDTR-code": (_ldt_code, "LDTR"),
}


@pytest.mark.kvm_param(emulate_invalid_guest_state=True)
@pytest.mark.sdm("Checks on Guest Segment Registers")
@pytest.mark.parametrize("what", _DAMAGE)
def test_state_that_cannot_run(l1: L1, what: str) -> None:
    """A restricted L2 that userspace gives a state VMX cannot run is ended; L1 is unharmed."""
    damage, register = _DAMAGE[what]
    guest = Guest(l1)
    _stop(guest)
    sregs = l1.vcpu.get_sregs()
    damage(sregs)
    l1.vcpu.set_sregs(sregs)
    seen = guest.resume()
    assert seen == Exit(ExitReason.TRIPLE_FAULT, qualification=0, intr_info=NOT_VALID)
    l1s = l1.vcpu.get_sregs()
    assert (l1s.cr3, l1s.tr.selector) == (l1.sym("l1_pml4"), l1.sym("SEL_TSS0"))
    assert l1s.cs.selector == l1.sym("SEL_CODE64")
    for part in ("SELECTOR", "BASE", "LIMIT", "ACCESS_RIGHTS"):
        field = Field[f"GUEST_{register}_{part}"]
        guest.vmcs[field] = guest.vmcs.baseline[field]
    assert guest.run(code.NOP) == Succeed()


@pytest.mark.sdm("Interruption Information for VM Exits Due to Vectored Events")
@pytest.mark.needs(Cap.EXCEPTION_PAYLOAD)
@pytest.mark.parametrize("intercepted", [False, True], ids=["", "intercepted"])
@pytest.mark.parametrize("how", ["pending", "injected"])
def test_error_code_of_32_bits(l1: L1, how: str, intercepted: bool) -> None:
    """Of an error code that userspace gives only the low 16 bits count."""
    l1.enable_cap(Cap.EXCEPTION_PAYLOAD)
    guest = Guest(l1)
    _stop(guest, EXCEPTION_BITMAP=1 << Vector.GP if intercepted else 0)
    events = l1.vcpu.get_vcpu_events()
    setattr(events.exception, how, 1)
    events.exception.nr, events.exception.has_error_code = Vector.GP, 1
    events.exception.error_code = 0x12340028
    events.flags |= _PAYLOAD
    l1.vcpu.set_vcpu_events(events)
    seen = guest.resume()
    if intercepted and how == "pending":
        assert seen == guest.exception(Vector.GP, 0x28, offset=len(OUT_80))
    else:
        assert seen == Fault(Vector.GP, error_code=0x28, rip=len(OUT_80))


def _without_vmx(cpuid: Any) -> None:
    leaf(cpuid, 1).ecx &= ~CPUID_1_ECX_VMX


def _wider(cpuid: Any) -> None:
    leaf(cpuid, 0x80000008).eax -= 1


@pytest.mark.sdm("Discovering Support for VMX")
@pytest.mark.parametrize("change", [_without_vmx, _wider], ids=["VMX", "MAXPHYADDR"])
def test_cpuid_while_l2_is_active(l1: L1, change: Any) -> None:
    """KVM refuses another CPUID for a vCPU that never ran and whose restored L2 is active."""
    guest = Guest(l1)
    _stop(guest)
    l1.round_trip()
    cpuid = l1.vcpu.get_cpuid()
    change(cpuid)
    with pytest.raises(KvmError):
        l1.vcpu.set_cpuid(cpuid)
    assert guest.resume() == Succeed()


@pytest.mark.sdm("VMX Capability Reporting Facility")
def test_capability_msr_while_l2_is_active(l1: L1) -> None:
    """KVM refuses other VMX capabilities for a vCPU whose restored L2 is active."""
    guest = Guest(l1)
    _stop(guest)
    l1.round_trip()
    index = Msr.IA32_VMX_TRUE_PROCBASED_CTLS
    value = l1.vcpu.get_msrs([index])[index]
    allowed = ProcCtl.HLT_EXITING << 32
    assert value & allowed
    with pytest.raises(KvmError):
        l1.vcpu.set_msrs({index: value & ~allowed})
    assert guest.resume() == Succeed()


#: Where SMM starts after a reset; IN AL, 77h stops in userspace, RSM ends it.
_SMM_CODE = 0x38000
_SMM_HANDLER = b"\xe4\x77\x0f\xaa"


@pytest.mark.needs(Cap.X86_SMM, Cap.MULTI_ADDRESS_SPACE)
@pytest.mark.sdm("Default Treatment of RSM")
@pytest.mark.parametrize("damage", ["", "control", "host-state"])
def test_vmcs_changed_in_smm(l1: L1, damage: str) -> None:
    """RSM to an L2 whose VMCS has become invalid in SMM ends the vCPU; a valid one goes on."""
    l1.enable_smm()
    l1.write(_SMM_CODE, _SMM_HANDLER)
    guest = Guest(l1, ProcCtl.USE_IO_BITMAPS)
    set_io_bitmaps(l1, ())
    pages = {"control": l1.alloc(), "host-state": _copied_table(l1, "l1_pml4")}
    guest.vmcs[Field.IO_BITMAP_A] = pages["control"]
    guest.vmcs[Field.HOST_CR3] = pages["host-state"]
    _stop(guest)
    l1.vcpu.smi()
    seen = guest.resume()
    assert isinstance(seen, HostExit)
    assert isinstance(seen.exit, exits.IoExit)
    assert seen.exit.port == 0x77
    assert isinstance(l1.vcpu.run(immediate_exit=True), exits.IntrExit)
    state = l1.vcpu.get_nested_state()
    assert state[_SMM_FLAGS] == 3  # L2 was active, after VMXON
    if damage:
        value = pages[damage]
        bad = _patched(state, value, value + 1 if damage == "control" else value | 1 << 60)
        l1.vcpu.set_nested_state(bad)
        with pytest.raises(VmLost, match="SHUTDOWN"):
            guest.resume()
    else:
        l1.vcpu.set_nested_state(state)
        assert guest.resume() == Succeed()


@pytest.mark.sdm("Guest Non-Register State")
def test_mode_of_l2_after_restore(l1: L1) -> None:
    """L2 of each mode that is restored without its SREGS being written again goes on."""
    for mode in (L2Mode.LONG, L2Mode.PAE, L2Mode.PROTECTED):
        guest = Guest(l1, mode=mode)
        _stop(guest)
        l1.vcpu.set_nested_state(l1.vcpu.get_nested_state())
        assert l1.vcpu.get_nested_state()[0] & _GUEST_MODE
        assert guest.resume() == Succeed(), mode
        assert l1.vmxoff() == Succeed()


@pytest.mark.sdm("Virtualizing Memory-Mapped APIC Accesses")
@pytest.mark.needs(Proc2Ctl.VIRTUALIZE_APIC_ACCESSES)
@pytest.mark.parametrize("runs", [0, 1, 3])
def test_memory_that_comes_later(l1: L1, runs: int) -> None:
    """A restored L2 whose APIC-access page has no memory yet runs as soon as it has.

    KVM_RUN before that is an internal error of KVM, as often as it is tried.
    """
    if l1.nested_roundtrip:
        pytest.skip("a VM that replaces another one has no such memory slot")
    guest, memory, page = Guest(l1, Proc2Ctl.VIRTUALIZE_APIC_ACCESSES), Memory(4096), 0x20000000
    guest.vmcs[Field.APIC_ACCESS_ADDR] = page
    l1.vm.add_memory(7, page, memory)
    load = b"\x8b\x07"  # MOV EAX, [RDI]
    assert isinstance(guest.run(OUT_80 + load, {"rdi": page}), HostExit)
    assert isinstance(l1.vcpu.run(immediate_exit=True), exits.IntrExit)
    l1.vm.remove_memory(7)
    l1.vcpu.set_nested_state(l1.vcpu.get_nested_state())
    for _ in range(runs):
        seen = l1.vcpu.run()
        assert isinstance(seen, exits.InternalErrorExit)
        assert l1.vcpu.get_nested_state()[0] & _GUEST_MODE
    l1.vm.add_memory(7, page, memory)
    assert guest.resume() == Exit(ExitReason.APIC_ACCESS, rip=guest.at(len(OUT_80)))
