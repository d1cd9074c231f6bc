"""Instruction information of RDRAND, RDSEED and INVPCID exits, and INVPCID's own faults."""

import pytest

from kvmnest.l1 import L1
from kvmnest.suite.support.guest import Guest, Masked
from kvmnest.suite.support.operands import Memory
from kvmnest.vmx import Cr4, ExitReason, Field, Proc2Ctl, ProcCtl, Vector
from kvmnest.vmx.outcome import Fault, Succeed

pytestmark = [
    pytest.mark.series(19),
    pytest.mark.sdm("VM-Exit Instruction Information as Used for RDRAND, RDSEED, TPAUSE, UMWAIT"),
]

RANDOM = {
    "RDRAND": (6, Proc2Ctl.RDRAND_EXITING, ExitReason.RDRAND),
    "RDSEED": (7, Proc2Ctl.RDSEED_EXITING, ExitReason.RDSEED),
}
INVPCID_OPCODE = b"\x0f\x38\x82"
RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI = range(8)
FS = 4


def _random(digit: int, register: int, size: int) -> bytes:
    rex = (8 if size == 2 else 0) | register >> 3
    prefix = (b"\x66" if size == 0 else b"") + (bytes([0x40 | rex]) if rex else b"")
    return prefix + b"\x0f\xc7" + bytes([0xC0 | digit << 3 | register & 7])


@pytest.mark.parametrize("size", range(3), ids=["16-bit", "32-bit", "64-bit"])
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.needs(c)) for n, (_, c, _) in RANDOM.items()]
)
def test_random_number(l1: L1, name: str, size: int) -> None:
    """The information names the destination register and the operand size."""
    digit, control, reason = RANDOM[name]
    guest = Guest(l1, control)
    for register in range(16):
        instruction = _random(digit, register, size)
        seen = guest.run(instruction)
        assert seen == guest.exit(
            reason,
            len(instruction),
            info=Masked(register << 3 | size << 11, 0xF << 3 | 3 << 11),
        ), f"{name} {instruction.hex()}"
        assert guest.changed(seen) == {}
    # A memory operand encodes another instruction or none.
    seen = guest.run(b"\x0f\xc7" + bytes([digit << 3 | RDI]), {"rdi": l1.sym("l2_data")})
    assert seen != guest.exit(reason, 3)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.needs(c)) for n, (_, c, _) in RANDOM.items()]
)
@pytest.mark.sdm("Instructions That Cause VM Exits Conditionally")
def test_random_number_without_exiting(l1: L1, name: str) -> None:
    """Without the control L2 gets a number, as long as the operand, and the flags of success."""
    digit, _, _ = RANDOM[name]
    guest = Guest(l1)
    upper = {0: ~0xFFFF, 1: 0, 2: 0}
    for size in range(3):
        values = set()
        for _ in range(8):
            program = _random(digit, RBX, size) + b"\x0f\x92\xc1"  # SETC CL
            seen = guest.run(program)
            assert seen == Succeed()
            assert guest.changed(seen, "rbx", "rcx") == {}
            if seen.regs["rcx"] & 0xFF:
                values.add(seen.regs["rbx"])
        before = guest.loaded["rbx"]
        if size == 1:
            assert all(value < 1 << 32 for value in values)
        elif size == 0:
            assert all(value & upper[0] == before & upper[0] for value in values)
        assert len(values) > 1


OPERANDS = (
    Memory(RDI),
    Memory(RBX, displacement=-8),
    Memory(RSP, displacement=0x12345),
    Memory(13, 14, 3, 0x10),
    Memory(None, RCX, 1, -0x2000),
    Memory(RDX, segment=FS),
    Memory(RSI, address_size=32, displacement=0x7F),
    Memory(relative=True, displacement=0x40),
)


@pytest.mark.needs(Proc2Ctl.ENABLE_INVPCID, ProcCtl.INVLPG_EXITING)
@pytest.mark.sdm("VM-Exit Instruction Information as Used for INVEPT, INVPCID, and INVVPID")
def test_invpcid(l1: L1) -> None:
    """INVPCID exits with "INVLPG exiting", and describes its register and memory operands."""
    guest = Guest(l1, Proc2Ctl.ENABLE_INVPCID, ProcCtl.INVLPG_EXITING)
    for number, operand in enumerate(OPERANDS):
        register = 2 * number + 1
        instruction = operand.encode(INVPCID_OPCODE, register, prefix=b"\x66")
        seen = guest.run(instruction)
        length = len(instruction)
        assert seen == guest.exit(
            ExitReason.INVPCID,
            length,
            qualification=operand.qualification(guest.at(length)),
            info=operand.info(register, reg2_bits=4),
        ), f"{operand} ({instruction.hex()})"
        assert guest.changed(seen) == {}


@pytest.mark.needs(Proc2Ctl.ENABLE_INVPCID, ProcCtl.INVLPG_EXITING)
@pytest.mark.sdm("Relative Priority of Faults and VM Exits")
def test_invpcid_at_cpl_3(l1: L1) -> None:
    """The privilege check of INVPCID comes before its VM exit."""
    guest = Guest(l1, Proc2Ctl.ENABLE_INVPCID, ProcCtl.INVLPG_EXITING)
    guest.set_cpl(3)
    seen = guest.run(Memory(RDI).encode(INVPCID_OPCODE, RAX, prefix=b"\x66"))
    assert seen == Fault(Vector.GP, error_code=0, rip=0)


@pytest.mark.needs(Proc2Ctl.ENABLE_INVPCID)
@pytest.mark.sdm("INVPCID: Invalidate Process-Context Identifier")
def test_invpcid_without_exiting(l1: L1) -> None:
    """Enabled and not intercepted, INVPCID takes each type and refuses bad descriptors."""
    guest = Guest(l1, Proc2Ctl.ENABLE_INVPCID)
    data = l1.sym("l2_data")
    instruction = Memory(RDI).encode(INVPCID_OPCODE, RAX, prefix=b"\x66")
    general = Fault(Vector.GP, error_code=0, rip=0)
    cr4 = guest.vmcs[Field.GUEST_CR4] & ~Cr4.PCIDE
    accepted = [(0, 0, 0x1000), (1, 0, 0), (2, 0, 0), (3, 0, 0), (2, 5, 0)]
    refused = [(4, 0, 0), (0, 1 << 12, 0), (0, 1 << 63, 0), (0, 0, 1 << 63)]
    # Without PCIDs only PCID 0 exists for the types that name one.
    refused += [(0, 1, 0), (1, 1, 0)]
    for pcide, kind, pcid, linear in (
        *((False, *case) for case in accepted + refused),
        *((True, *case) for case in ((0, 1, 0x1000), (1, 0xFFF, 0), (2, 0, 0), (3, 0, 0))),
        *((True, *case) for case in ((4, 0, 0), (0, 0x1000, 0), (0, 1, 1 << 63))),
    ):
        l1.write_int(data, pcid)
        l1.write_int(data + 8, linear)
        seen = guest.run(
            instruction, {"rdi": data, "rax": kind}, GUEST_CR4=cr4 | (Cr4.PCIDE if pcide else 0)
        )
        bad = kind > 3 or pcid >> 12 or (kind == 0 and linear >> 63)
        bad = bad or (not pcide and kind in (0, 1) and pcid)
        text = f"PCIDE {pcide} type {kind} PCID {pcid:#x} address {linear:#x}"
        assert seen == (general if bad else Succeed()), text
        assert guest.changed(seen) == {}
    # A fault on the descriptor is L2's.
    seen = guest.run(instruction, {"rdi": 0x50000000, "rax": 2})
    assert seen == Fault(Vector.PF, error_code=0, cr2=0x50000000, rip=0)


@pytest.mark.needs(Proc2Ctl.ENABLE_INVPCID)
@pytest.mark.sdm("INVPCID: Invalidate Process-Context Identifier")
def test_invpcid_type_has_64_bits(l1: L1) -> None:
    """In 64-bit mode the whole register is the type: one above 3 is #GP(0)."""
    guest = Guest(l1, Proc2Ctl.ENABLE_INVPCID)
    l1.write(l1.sym("l2_data"), bytes(16))
    instruction = Memory(RDI).encode(INVPCID_OPCODE, RAX, prefix=b"\x66")
    for kind in (1 << 32, 1 << 63 | 2):
        seen = guest.run(instruction, {"rdi": l1.sym("l2_data"), "rax": kind})
        assert seen == Fault(Vector.GP, error_code=0, rip=0), hex(kind)
