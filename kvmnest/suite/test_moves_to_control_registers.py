"""MOV to CR0, CR4 and CR8 in L2 that L1 does not intercept: reserved bits, and refused values.

KVM carries these instructions out itself, so their faults are KVM's too.
"""

import pytest

from kvmnest.l1 import L1, code
from kvmnest.suite.support.guest import Guest
from kvmnest.vmx import Cr0, Field, ProcCtl, Rflags, Vector
from kvmnest.vmx.outcome import Fault, Succeed

pytestmark = pytest.mark.series(19)

#: Bits of CR0 that are reserved; ET is 1 whatever is written.
RESERVED = 0xFFFFFFFF & ~sum(flag.value for flag in Cr0)
ET = Cr0.ET.value
READ_CR0, WRITE_CR0 = code.mov_from_cr(0), code.mov_to_cr(0)
#: MOV RAX, CR4; BTS RAX, 31; MOV CR4, RAX.
RESERVED_OF_CR4 = code.mov_from_cr(4) + b"\x48\x0f\xba\xe8\x1f" + code.mov_to_cr(4)
#: MOV RAX, CR0; BTS RAX, 33; MOV CR0, RAX.
HIGH_OF_CR0 = READ_CR0 + b"\x48\x0f\xba\xe8\x21" + WRITE_CR0
#: Length of MOV RAX, imm64 before a MOV to CR8.
CR8_AT = len(code.mov("rax", 0))
CR8_OF_16 = code.mov("rax", 16) + code.mov_to_cr(8)
#: The same, and what faults by no help of KVM.
REFUSED = {
    "CR0": (HIGH_OF_CR0, Vector.GP, 0),
    "CR4": (RESERVED_OF_CR4, Vector.GP, 0),
    "CR8": (CR8_OF_16, Vector.GP, 0),
    "UD2": (b"\x90" + code.UD2, Vector.UD, None),
    # XOR ECX, ECX; DIV ECX
    "DIV": (b"\x31\xc9\xf7\xf1", Vector.DE, None),
}


@pytest.fixture
def guest(l1: L1) -> Guest:
    """An L2 without exits that L1 asks for."""
    return Guest(l1)


@pytest.mark.sdm("Control Registers")
@pytest.mark.parametrize("bits", [RESERVED, ET], ids=["reserved", "ET"])
def test_reserved_bits_of_cr0_stay(guest: Guest, bits: int) -> None:
    """Bits 31:0 of CR0 that are reserved ignore what is written, and so does ET.

    What L2 reads is what there is, and so is what the exit saves.
    """
    before = guest.vmcs.baseline[Field.GUEST_CR0]
    changed = code.mov("rax", before ^ bits)
    seen = guest.run(changed + WRITE_CR0 + READ_CR0)
    assert isinstance(seen, Succeed)
    assert seen.regs["rax"] == before
    assert guest.vmcs[Field.GUEST_CR0] == before


@pytest.mark.sdm("MOV - Move to/from Control Registers")
@pytest.mark.parametrize("bits", [range(4, 8), range(8, 64)], ids=["7:4", "63:8"])
def test_reserved_bits_of_cr8(guest: Guest, bits: range) -> None:
    """Bits 63:4 of CR8 are reserved: #GP(0) for each."""
    refused = Fault(Vector.GP, error_code=0, rip=CR8_AT)
    accepted = [
        bit for bit in bits if guest.run(code.mov("rax", 1 << bit) + code.mov_to_cr(8)) != refused
    ]
    assert accepted == []


@pytest.mark.sdm("Saving RIP, RSP, RFLAGS, and SSP")
@pytest.mark.parametrize("name", REFUSED)
def test_resume_flag_at_the_exit_for_a_fault(guest: Guest, name: str) -> None:
    """The RFLAGS saved by the exit for a fault are those that its delivery would have pushed."""
    instructions, vector, error = REFUSED[name]
    seen = guest.run(instructions, EXCEPTION_BITMAP=1 << vector)
    at = seen.rip - guest.start
    assert seen == guest.exception(vector, error, offset=at)
    assert guest.vmcs[Field.GUEST_RFLAGS] & Rflags.RF == Rflags.RF


@pytest.mark.sdm("Saving RIP, RSP, RFLAGS, and SSP")
@pytest.mark.parametrize("name", REFUSED)
def test_resume_flag_in_l2s_handler(guest: Guest, name: str) -> None:
    """The delivery of a fault pushes RFLAGS with RF set."""
    instructions, vector, error = REFUSED[name]
    seen = guest.run(instructions)
    assert seen == Fault(vector, error_code=error or 0)
    # Vector, error code, RIP, CS, RFLAGS.
    assert guest.l1.l2_frame(5)[4] & Rflags.RF == Rflags.RF


@pytest.mark.sdm("Saving RIP, RSP, RFLAGS, and SSP")
def test_no_resume_flag_at_a_trap(guest: Guest) -> None:
    """INT3 is a trap: its exit leaves RF alone."""
    seen = guest.run(code.INT3, EXCEPTION_BITMAP=1 << Vector.BP)
    assert seen.rip == guest.start
    assert guest.vmcs[Field.GUEST_RFLAGS] & Rflags.RF == 0


@pytest.mark.sdm("MOV - Move to/from Control Registers")
@pytest.mark.needs(ProcCtl.USE_TPR_SHADOW)
@pytest.mark.parametrize("bit", [4, 7, 8, 63])
def test_reserved_bits_of_cr8_with_tpr_shadow(l1: L1, bit: int) -> None:
    """With "use TPR shadow" too, where the processor carries the move out."""
    guest = Guest(l1, ProcCtl.USE_TPR_SHADOW)
    move = code.mov("rax", 1 << bit)
    fields = {"VIRTUAL_APIC_PAGE_ADDR": l1.sym("virtual_apic"), "TPR_THRESHOLD": 0}
    seen = guest.run(move + code.mov_to_cr(8), **fields)
    assert seen == Fault(Vector.GP, error_code=0, rip=CR8_AT)
