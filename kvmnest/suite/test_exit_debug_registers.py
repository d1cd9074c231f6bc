"""DR0 to DR7 of L2: MOV-DR exiting, and who sees and keeps which value (series 15 and 19)."""

import pytest

from kvmnest.l1 import L1, code
from kvmnest.suite.support.bitmaps import set_msr_bitmap
from kvmnest.suite.support.guest import Guest
from kvmnest.vmx import (
    Cr4,
    Dr6,
    Dr7,
    DrAccess,
    EntryCtl,
    ExitCtl,
    ExitReason,
    Field,
    Msr,
    ProcCtl,
    Vector,
)
from kvmnest.vmx.outcome import Exit, Fault, Succeed

pytestmark = [
    pytest.mark.series(19),
    pytest.mark.sdm("Instructions That Cause VM Exits Conditionally"),
]

GPRS = (
    *("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi"),
    *(f"r{number}" for number in range(8, 16)),
)
DR6_INIT = 0xFFFF0FF0
DR7_INIT = int(Dr7.RESERVED1)


def _dr_exit(guest: Guest, dr: int, *, read: bool, register: int = 0) -> Exit:
    length = 3 if register < 8 else 4
    qualification = DrAccess(dr, read, register).encode()
    return guest.exit(ExitReason.DR_ACCESS, length, qualification=qualification)


@pytest.mark.needs(ProcCtl.MOV_DR_EXITING)
def test_mov_dr_exiting(l1: L1) -> None:
    """Every MOV to and from a debug register exits, before it has an effect."""
    guest = Guest(l1, ProcCtl.MOV_DR_EXITING)
    assert l1.write_dr(3, 0x1234) == Succeed()
    for dr in (0, 1, 2, 3, 6, 7):
        seen = guest.run(code.mov_to_dr(dr))
        assert seen == _dr_exit(guest, dr, read=False), f"MOV to DR{dr}"
        assert guest.changed(seen) == {}
        seen = guest.run(code.mov_from_dr(dr))
        assert seen == _dr_exit(guest, dr, read=True), f"MOV from DR{dr}"
        assert guest.changed(seen) == {}
    assert l1.read_dr(3) == Succeed(0x1234)
    assert guest.vmcs.read(Field.GUEST_DR7) == (DR7_INIT,)


@pytest.mark.needs(ProcCtl.MOV_DR_EXITING)
@pytest.mark.sdm("Exit Qualification for MOV DR")
def test_general_register_in_the_qualification(l1: L1) -> None:
    """The qualification names the general register and the direction."""
    guest = Guest(l1, ProcCtl.MOV_DR_EXITING)
    for number, name in enumerate(GPRS):
        seen = guest.run(code.mov_to_dr(2, name))
        assert seen == _dr_exit(guest, 2, read=False, register=number), name
        seen = guest.run(code.mov_from_dr(1, name))
        assert seen == _dr_exit(guest, 1, read=True, register=number), name
        assert guest.changed(seen) == {}


@pytest.mark.needs(ProcCtl.MOV_DR_EXITING)
def test_exit_comes_before_the_privilege_check(l1: L1) -> None:
    """With "MOV-DR exiting" the exit of MOV DR comes before #GP for the privilege level."""
    guest = Guest(l1, ProcCtl.MOV_DR_EXITING)
    guest.set_cpl(3)
    assert guest.run(code.mov_from_dr(0)) == _dr_exit(guest, 0, read=True)
    assert guest.run(code.mov_to_dr(7)) == _dr_exit(guest, 7, read=False)
    guest.off(ProcCtl.MOV_DR_EXITING)
    general = Fault(Vector.GP, error_code=0, rip=0)
    assert guest.run(code.mov_from_dr(0)) == general
    assert guest.run(code.mov_to_dr(7)) == general


@pytest.mark.needs(ProcCtl.MOV_DR_EXITING)
@pytest.mark.parametrize("dr", [4, 5])
def test_exit_comes_before_undefined_dr4_and_dr5(l1: L1, dr: int) -> None:
    """With "MOV-DR exiting" the exit comes before #UD for DR4 and DR5 with CR4.DE 1."""
    guest = Guest(l1, ProcCtl.MOV_DR_EXITING)
    cr4 = guest.vmcs[Field.GUEST_CR4] | Cr4.DE
    seen = guest.run(code.mov_from_dr(dr), GUEST_CR4=cr4)
    assert seen == _dr_exit(guest, dr, read=True)
    guest.off(ProcCtl.MOV_DR_EXITING)
    assert guest.run(code.mov_from_dr(dr)) == Fault(Vector.UD, error_code=0, rip=0)
    # With CR4.DE 0 they are other names of DR6 and DR7.
    seen = guest.run(code.mov_from_dr(dr), GUEST_CR4=cr4 & ~Cr4.DE)
    assert seen == Succeed()
    assert seen.regs["rax"] == (DR6_INIT if dr == 4 else DR7_INIT)


@pytest.mark.series(15)
def test_without_exiting(l1: L1) -> None:
    """Without "MOV-DR exiting" L2 uses DR0 to DR3 and DR6 as L1 left them, and L1 sees L2's."""
    for dr in range(4):
        assert l1.write_dr(dr, 0x1000 * (dr + 1)) == Succeed()
    assert l1.write_dr(6, DR6_INIT | Dr6.B1) == Succeed()
    guest = Guest(l1)
    names = ("rax", "rcx", "rdx", "rbx", "rsi")
    read = b"".join(code.mov_from_dr(dr, names[i]) for i, dr in enumerate((0, 1, 2, 3, 6)))
    seen = guest.run(read)
    assert seen == Succeed()
    assert guest.changed(seen) == {
        **{name: 0x1000 * (i + 1) for i, name in enumerate(names[:4])},
        "rsi": DR6_INIT | Dr6.B1,
    }
    values = {name: 0x20000 + 0x1000 * i for i, name in enumerate(names[:4])}
    values["rsi"] = DR6_INIT | Dr6.BS
    write = b"".join(code.mov_to_dr(dr, names[i]) for i, dr in enumerate((0, 1, 2, 3, 6)))
    seen = guest.run(write + read, values)
    assert seen == Succeed()
    assert guest.changed(seen) == {}
    for dr in range(4):
        assert l1.read_dr(dr) == Succeed(0x20000 + 0x1000 * dr)
    assert l1.read_dr(6) == Succeed(DR6_INIT | Dr6.BS)
    # Again, after L1 changed one.
    assert l1.write_dr(2, 0x5555) == Succeed()
    seen = guest.run(read)
    assert seen.regs["rdx"] == 0x5555


@pytest.mark.series(15)
@pytest.mark.sdm("Loading Guest Control Registers, Debug Registers, and MSRs")
def test_dr7(l1: L1) -> None:
    """DR7 is loaded and saved by the debug controls; L1 has 400H after every exit."""
    guest = Guest(l1, EntryCtl.LOAD_DEBUG_CONTROLS, ExitCtl.SAVE_DEBUG_CONTROLS)
    assert l1.write_dr(7, DR7_INIT | Dr7.L1) == Succeed()
    value = DR7_INIT | Dr7.G0 | Dr7.L0
    seen = guest.run(code.mov_from_dr(7) + code.mov_to_dr(7, "rcx") + code.mov_from_dr(7, "rdx"),
                     {"rcx": DR7_INIT | Dr7.G3}, GUEST_DR7=value)  # fmt: skip
    assert seen == Succeed()
    assert (seen.regs["rax"], seen.regs["rdx"]) == (value, DR7_INIT | Dr7.G3)
    assert guest.vmcs.read(Field.GUEST_DR7) == (DR7_INIT | Dr7.G3,)
    assert l1.read_dr(7) == Succeed(DR7_INIT)
    # L2 has it again with the next entry.
    seen = guest.run(code.mov_from_dr(7))
    assert seen.regs["rax"] == DR7_INIT | Dr7.G3


@pytest.mark.series(15)
@pytest.mark.needs(ExitCtl.SAVE_DEBUG_CONTROLS, EntryCtl.LOAD_DEBUG_CONTROLS)
@pytest.mark.sdm("Saving Control Registers, Debug Registers, and MSRs")
def test_dr7_without_the_controls(l1: L1) -> None:
    """Without the debug controls DR7 is neither loaded nor saved: L2 starts with L1's."""
    guest = Guest(l1)
    guest.off(EntryCtl.LOAD_DEBUG_CONTROLS, ExitCtl.SAVE_DEBUG_CONTROLS)
    assert l1.write_dr(7, DR7_INIT | Dr7.G2) == Succeed()
    seen = guest.run(code.mov_from_dr(7) + code.mov_to_dr(7, "rcx"),
                     {"rcx": DR7_INIT | Dr7.L2}, GUEST_DR7=DR7_INIT | Dr7.L3)  # fmt: skip
    assert seen == Succeed()
    assert seen.regs["rax"] == DR7_INIT | Dr7.G2
    assert guest.vmcs.read(Field.GUEST_DR7) == (DR7_INIT | Dr7.L3,)
    assert l1.read_dr(7) == Succeed(DR7_INIT)


@pytest.mark.sdm("Exit Qualification for Debug Exceptions")
@pytest.mark.parametrize("number", range(4), ids=lambda n: f"DR{n}")
def test_breakpoint(l1: L1, number: int) -> None:
    """A breakpoint of L2 is a #DB that names it: in the qualification for L1, in DR6 for L2."""
    guest = Guest(l1, EntryCtl.LOAD_DEBUG_CONTROLS)
    data = l1.sym("l2_data")
    assert l1.write_dr(number, data + 8) == Succeed()
    assert l1.write_dr(6, DR6_INIT) == Succeed()
    # Data writes, 4 bytes; global enable.
    dr7 = DR7_INIT | 2 << 2 * number | 0xD << 16 + 4 * number
    store = b"\x89\x07" + code.NOP  # MOV [RDI], EAX
    seen = guest.run(store, {"rdi": data + 8}, GUEST_DR7=dr7, EXCEPTION_BITMAP=1 << Vector.DB)
    assert seen == guest.exception(Vector.DB, offset=2, qualification=1 << number)
    # A debug exception that causes a VM exit does not update DR6.
    assert l1.read_dr(6) == Succeed(DR6_INIT)
    seen = guest.run(store, {"rdi": data + 8}, EXCEPTION_BITMAP=0, GUEST_DR7=dr7)
    assert seen == Fault(Vector.DB, error_code=0, rip=2)
    assert l1.read_dr(6) == Succeed(DR6_INIT | 1 << number)
    # Only the addressed bytes count.
    assert guest.run(store, {"rdi": data}, GUEST_DR7=dr7) == Succeed()
    # An instruction breakpoint is a fault.
    dr7 = DR7_INIT | 2 << 2 * number
    assert l1.write_dr(number, guest.at(1)) == Succeed()
    seen = guest.run(code.NOP * 2, GUEST_DR7=dr7, EXCEPTION_BITMAP=1 << Vector.DB)
    assert seen == guest.exception(Vector.DB, offset=1, qualification=1 << number)


@pytest.mark.sdm("Exit Qualification for Debug Exceptions")
def test_general_detect(l1: L1) -> None:
    """MOV DR with DR7.GD 1 is #DB with BD; MOV-DR exiting comes first."""
    guest = Guest(l1, EntryCtl.LOAD_DEBUG_CONTROLS, ExitCtl.SAVE_DEBUG_CONTROLS)
    dr7 = DR7_INIT | Dr7.GD
    assert l1.write_dr(6, DR6_INIT) == Succeed()
    for instruction in (code.mov_from_dr(0), code.mov_to_dr(6), code.mov_to_dr(7)):
        seen = guest.run(instruction, GUEST_DR7=dr7, EXCEPTION_BITMAP=1 << Vector.DB)
        assert seen == guest.exception(Vector.DB, qualification=Dr6.BD)
        assert guest.vmcs.read(Field.GUEST_DR7) == (dr7,)
        assert l1.read_dr(6) == Succeed(DR6_INIT)
    seen = guest.run(code.mov_from_dr(0), EXCEPTION_BITMAP=0)
    assert seen == Fault(Vector.DB, error_code=0, rip=0)
    # L2's own handler has BD in DR6 and GD cleared.
    assert l1.read_dr(6) == Succeed(DR6_INIT | Dr6.BD)
    assert guest.vmcs.read(Field.GUEST_DR7) == (DR7_INIT,)


@pytest.mark.needs(ProcCtl.MOV_DR_EXITING)
def test_mov_dr_exiting_comes_before_general_detect(l1: L1) -> None:
    """With DR7.GD 1 and "MOV-DR exiting" 1 L1 sees either the exit or #DB, and L2 nothing."""
    guest = Guest(l1, EntryCtl.LOAD_DEBUG_CONTROLS, ProcCtl.MOV_DR_EXITING)
    seen = guest.run(
        code.mov_from_dr(0), GUEST_DR7=DR7_INIT | Dr7.GD, EXCEPTION_BITMAP=1 << Vector.DB
    )
    assert seen == _dr_exit(guest, 0, read=True)
    assert guest.vmcs.read(Field.GUEST_DR7) == (DR7_INIT | Dr7.GD,)


#: MOV DR6, RBX; MOV RBX, DR6.
_WRITE_DR6, _READ_DR6 = b"\x0f\x23\xf3", b"\x0f\x21\xf3"
_NEW_DR6 = 0xFFFF0FF3


@pytest.mark.sdm("Debug Status Register (DR6)")
@pytest.mark.needs(ProcCtl.USE_MSR_BITMAPS)
@pytest.mark.parametrize("level", ["L1", "L2"])
@pytest.mark.parametrize(
    ("msr", "value"),
    [(Msr.X2APIC_ICR, 0x51), (Msr.X2APIC_SELF_IPI, 0x51), (Msr.TSC_DEADLINE, 0)],
    ids=["ICR", "SELF_IPI", "TSC_DEADLINE"],
)
def test_dr6_over_a_fast_exit(l1: L1, msr: Msr, value: int, level: str) -> None:
    """DR6 keeps what was written over a WRMSR that KVM handles without leaving its inner loop."""
    assert l1.wrmsr(Msr.APIC_BASE, l1.rdmsr(Msr.APIC_BASE).value | 0xC00) == Succeed()
    assert l1.wrmsr(Msr.X2APIC_SIVR, 0x1FF) == Succeed()
    guest = Guest(l1, ProcCtl.USE_MSR_BITMAPS)
    set_msr_bitmap(l1)
    program = _WRITE_DR6 + code.WRMSR + _READ_DR6
    regs = {"rcx": msr, "rax": value, "rdx": 0, "rbx": _NEW_DR6}
    seen = guest.run(program, regs) if level == "L2" else l1.call(program, regs=regs)
    assert seen == Succeed()
    assert seen.regs["rbx"] == _NEW_DR6
