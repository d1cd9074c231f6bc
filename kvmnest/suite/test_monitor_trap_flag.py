"""The monitor trap flag: an exit behind each instruction, or before the first."""

from __future__ import annotations

import pytest

from kvmnest.l1 import L1, code
from kvmnest.l1.baseline import L2Mode
from kvmnest.suite.support.bitmaps import set_msr_bitmap
from kvmnest.suite.support.guest import Guest
from kvmnest.vmx import (
    ExitReason,
    Field,
    IntrType,
    Msr,
    Proc2Ctl,
    ProcCtl,
    Rflags,
    Vector,
    intr_info,
)
from kvmnest.vmx.outcome import Exit, Fault, HostExit, Succeed

pytestmark = [
    pytest.mark.series(19),
    pytest.mark.sdm("Monitor Trap Flag"),
    pytest.mark.needs(ProcCtl.MONITOR_TRAP_FLAG),
]

MTF_EVENT = intr_info(0, IntrType.OTHER_EVENT)


def _guest(l1: L1, *flags: ProcCtl) -> Guest:
    guest = Guest(l1, ProcCtl.MONITOR_TRAP_FLAG, ProcCtl.USE_MSR_BITMAPS, *flags)
    set_msr_bitmap(l1)
    return guest


def _trap(guest: Guest, offset: int) -> Exit:
    return guest.exit(ExitReason.MONITOR_TRAP_FLAG, offset=offset)


def test_each_instruction(l1: L1) -> None:
    """With the control set L2 exits behind each instruction, and sees nothing of it."""
    guest = _guest(l1)
    program = code.NOP + code.mov("rbx", 7) + b"\x48\xff\xc3" + code.PUSHFQ + b"\x58"
    seen = guest.run(program)
    for offset in (1, 11, 14, 15, 16):
        assert seen == _trap(guest, offset)
        seen = guest.go_on(seen.regs)
    assert seen == Succeed()
    assert (seen.regs["rbx"], seen.regs["rax"]) == (8, 0x2)


def test_taken_jump(l1: L1) -> None:
    """RIP is where L2 goes on, also after a jump."""
    guest = _guest(l1)
    assert guest.run(b"\xeb\x02" + code.NOP * 4) == _trap(guest, 4)
    guest.off(ProcCtl.MONITOR_TRAP_FLAG)
    assert guest.go_on() == Succeed()


@pytest.mark.parametrize("name", ["OUT", "RDMSR", "WRMSR"])
def test_emulated_instructions(l1: L1, name: str) -> None:
    """An instruction that the hypervisor below L1 emulates is one instruction, too."""
    guest = _guest(l1)
    program, regs = {
        "OUT": (code.out8(0x80), {}),
        "RDMSR": (code.RDMSR, {"rcx": int(Msr.TSC_ADJUST)}),
        "WRMSR": (code.WRMSR, {"rcx": int(Msr.TSC_ADJUST), "rax": 0, "rdx": 0}),
    }[name]
    seen = guest.run(program + code.NOP * 2, regs)
    if name == "OUT":
        assert isinstance(seen, HostExit)
        seen = guest.resume()
    assert seen == _trap(guest, 2)
    assert guest.go_on(seen.regs) == _trap(guest, 3)


@pytest.mark.parametrize("name", ["NOP", "OUT"])
def test_with_a_pending_single_step(l1: L1, name: str) -> None:
    """The trap of TF stays pending over the exit, and is delivered at the next entry."""
    guest = _guest(l1)
    program = {"NOP": code.NOP * 2, "OUT": code.out8(0x80)}[name]
    seen = guest.run(program + code.NOP, GUEST_RFLAGS=0x2 | Rflags.TF, EXCEPTION_BITMAP=1 << 1)
    offset = 1
    if name == "OUT":
        assert isinstance(seen, HostExit)
        seen, offset = guest.resume(), 2
    assert seen == _trap(guest, offset)
    (pending,) = guest.vmcs.read(Field.GUEST_PENDING_DBG_EXCEPTIONS)
    assert pending == 1 << 14
    guest.off(ProcCtl.MONITOR_TRAP_FLAG)
    assert guest.go_on() == guest.exception(Vector.DB, offset=offset, qualification=1 << 14)


def test_behind_an_injected_event(l1: L1) -> None:
    """An injected event counts as the first instruction: the exit is at its handler."""
    guest = _guest(l1)
    for vector, kind in ((0x30, IntrType.EXTERNAL_INTERRUPT), (6, IntrType.HARDWARE_EXCEPTION)):
        info = intr_info(vector, kind)
        seen = guest.run(code.NOP, GUEST_RFLAGS=0x202, VM_ENTRY_INTR_INFO_FIELD=info)
        assert seen == _trap(guest, guest.handler(vector))


def test_exception_of_the_instruction(l1: L1) -> None:
    """A fault is delivered first, and the exit is at its handler; or L1 intercepts it."""
    guest = _guest(l1)
    seen = guest.run(code.UD2, EXCEPTION_BITMAP=0)
    assert seen == _trap(guest, guest.handler(Vector.UD))
    seen = guest.run(code.UD2, EXCEPTION_BITMAP=1 << Vector.UD)
    assert seen == guest.exception(Vector.UD)


@pytest.mark.sdm("Injection of Pending MTF VM Exits")
def test_injected_trap(l1: L1) -> None:
    """Type 7, vector 0 injects the exit itself, before the first instruction, control or not."""
    guest = _guest(l1)
    for control in (True, False):
        (guest.on if control else guest.off)(ProcCtl.MONITOR_TRAP_FLAG)
        seen = guest.run(code.NOP, VM_ENTRY_INTR_INFO_FIELD=MTF_EVENT)
        assert seen == _trap(guest, 0), control
        assert guest.vmcs.read(Field.VM_ENTRY_INTR_INFO_FIELD) == (MTF_EVENT & 0x7FFFFFFF,)
    assert guest.go_on() == Succeed()


def test_exit_has_priority(l1: L1) -> None:
    """An instruction that exits does so instead of trapping behind itself."""
    guest = _guest(l1)
    assert guest.run(code.CPUID) == guest.exit(ExitReason.CPUID, 2)
    assert guest.run(code.UD2, EXCEPTION_BITMAP=0) != Fault(Vector.UD)


@pytest.mark.parametrize("name", ["INT1", "INT3", "WRMSR", "UD2"])
def test_exception_that_is_delivered(l1: L1, name: str) -> None:
    """An instruction that raises an exception: the exit is at the handler's first instruction.

    INT1 is delivered like a trap, the #GP of WRMSR is found by the hypervisor that emulates it.
    """
    guest = _guest(l1)
    program, vector, behind = {
        "INT1": (b"\xf1", Vector.DB, 1),
        "INT3": (b"\xcc", Vector.BP, 1),
        "WRMSR": (code.WRMSR, Vector.GP, 0),
        "UD2": (code.UD2, Vector.UD, 0),
    }[name]
    seen = guest.run(program + code.NOP, {"rcx": Msr.APIC_BASE, "rax": 0, "rdx": 1 << 31})
    assert seen == _trap(guest, guest.handler(vector))
    guest.off(ProcCtl.MONITOR_TRAP_FLAG)
    assert guest.go_on() == Fault(vector, error_code=0, rip=behind)


@pytest.mark.needs(Proc2Ctl.ENABLE_EPT, Proc2Ctl.UNRESTRICTED_GUEST)
@pytest.mark.sdm("Saving Guest State")
def test_paging_is_turned_on(l1: L1) -> None:
    """MOV to CR0 that turns on PAE paging loads the PDPTEs; the exit behind it saves them."""
    guest = Guest(l1, ProcCtl.MONITOR_TRAP_FLAG, mode=L2Mode.PAE, ept=True)
    fields = (Field.GUEST_PDPTR0, Field.GUEST_PDPTR1, Field.GUEST_PDPTR2, Field.GUEST_PDPTR3)
    guest.on(Proc2Ctl.UNRESTRICTED_GUEST)
    cr0, cr3 = guest.vmcs[Field.GUEST_CR0], guest.vmcs[Field.GUEST_CR3]
    in_memory = tuple(l1.read_int(cr3 + 8 * number) for number in range(4))
    assert any(in_memory)
    seen = guest.run(
        b"\x0f\x22\xc0" + code.NOP,  # MOV CR0, EAX
        {"rax": cr0},
        GUEST_CR0=cr0 & ~(1 << 31),
        CR0_GUEST_HOST_MASK=0,
        **{field.name: 0 for field in fields},
    )
    assert seen == _trap(guest, 3)
    assert guest.vmcs.read(Field.GUEST_CR0) == (cr0,)
    assert guest.vmcs.read(*fields) == in_memory
    guest.off(ProcCtl.MONITOR_TRAP_FLAG)
    assert guest.go_on() == Succeed()
