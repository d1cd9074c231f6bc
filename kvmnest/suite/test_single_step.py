"""L2 single-steps (RFLAGS.TF) over instructions, also those that a hypervisor below L1 executes."""

from __future__ import annotations

import pytest

from kvmnest.l1 import L1, code
from kvmnest.suite.support.bitmaps import set_msr_bitmap
from kvmnest.suite.support.guest import Guest
from kvmnest.vmx import Field, Msr, ProcCtl, Rflags, Vector
from kvmnest.vmx.outcome import Fault, HostExit

pytestmark = [
    pytest.mark.series(21),
    pytest.mark.sdm("Basic VM-Exit Information"),
]

BS = 1 << 14
#: Breakpoint 0 was met.
B0 = 1
TF = 0x2 | Rflags.TF
DB = 1 << Vector.DB
WBINVD, INVD = b"\x0f\x09", b"\x0f\x08"
MOV_SS = b"\x8e\xd0"
#: Instruction -> code and registers.
INSTRUCTIONS = {
    "NOP": (code.NOP, {}),
    "MOV-to-CR0": (b"\x0f\x22\xc0", {}),
    "MOV-to-CR4": (b"\x0f\x22\xe0", {}),
    "MOV-to-CR8": (code.mov_to_cr(8), {"rax": 0}),
    "MOV-from-DR6": (b"\x0f\x21\xf0", {}),
    "RDMSR": (code.RDMSR, {"rcx": int(Msr.TSC_ADJUST)}),
    "WRMSR": (code.WRMSR, {"rcx": int(Msr.TSC_ADJUST), "rax": 0, "rdx": 0}),
    "WBINVD": (WBINVD, {}),
    "INVLPG": (b"\x0f\x01\x38", {"rax": 0x1000}),
    "OUT": (code.out8(0x80), {}),
    "IN": (b"\xe4\x80", {}),
    "RDTSC": (code.RDTSC, {}),
    "PAUSE": (b"\xf3\x90", {}),
}


def _guest(l1: L1) -> Guest:
    guest = Guest(l1, ProcCtl.USE_MSR_BITMAPS)
    set_msr_bitmap(l1)
    guest.off(
        *(ProcCtl.INVLPG_EXITING, ProcCtl.RDTSC_EXITING, ProcCtl.CR8_LOAD_EXITING),
        *(ProcCtl.MOV_DR_EXITING, ProcCtl.PAUSE_EXITING, ProcCtl.UNCONDITIONAL_IO_EXITING),
    )
    return guest


def _regs(guest: Guest, name: str) -> dict[str, int]:
    regs = dict(INSTRUCTIONS[name][1])
    for register in ("CR0", "CR4"):
        if name == f"MOV-to-{register}":
            regs["rax"] = guest.vmcs[Field[f"GUEST_{register}"]]
    return regs


@pytest.mark.parametrize("intercepted", [True, False], ids=["exit", "handler"])
@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_trap_behind_the_instruction(l1: L1, name: str, intercepted: bool) -> None:
    """The trap comes right behind the instruction, once, with BS as its cause."""
    guest = _guest(l1)
    program, _ = INSTRUCTIONS[name]
    fields = {"GUEST_RFLAGS": TF, "EXCEPTION_BITMAP": DB * intercepted}
    seen = guest.run(program + code.NOP * 2, _regs(guest, name), **fields)
    if isinstance(seen, HostExit):
        seen = guest.resume()
    behind = len(program)
    if not intercepted:
        assert seen == Fault(Vector.DB, error_code=0, rip=behind)
        return
    assert seen == guest.exception(Vector.DB, offset=behind, qualification=BS)
    assert guest.vmcs.read(Field.GUEST_PENDING_DBG_EXCEPTIONS) == (0,)
    # The next instruction traps for itself.
    expected = guest.exception(Vector.DB, offset=behind + 1, qualification=BS)
    assert guest.go_on(seen.regs) == expected


@pytest.mark.sdm("Debug Exceptions and Interrupt/Exception Priorities")
def test_data_breakpoint_of_mov_ss(l1: L1) -> None:
    """MOV SS from memory at a data breakpoint with TF set: one trap behind the next instruction.

    MOV SS holds it back, and the exit leaves DR6 as it is: the causes are in the qualification.
    """
    guest = Guest(l1)
    guest.off(ProcCtl.MOV_DR_EXITING)
    data = l1.sym("l2_data")
    l1.write_int(data, l1.sym("SEL_DATA"))
    # Data reads and writes of 2 bytes at DR0, enabled locally.
    dr7 = 0x400 | 1 | 0b0111 << 16
    program = b"\x0f\x23\xc0" + b"\x8e\x17" + code.NOP * 2  # MOV DR0, RAX; MOV SS, [RDI]
    seen = guest.run(
        program,
        {"rax": data, "rdi": data},
        GUEST_DR7=dr7,
        GUEST_RFLAGS=TF,
        EXCEPTION_BITMAP=DB,
    )
    assert seen == guest.exception(Vector.DB, offset=3, qualification=BS)
    seen = guest.go_on(seen.regs)
    assert seen == guest.exception(Vector.DB, offset=6, qualification=BS | B0)
    assert guest.vmcs.read(Field.GUEST_PENDING_DBG_EXCEPTIONS) == (0,)
    assert guest.go_on(seen.regs) == guest.exception(Vector.DB, offset=7, qualification=BS)
