"""Every VMX instruction that L2 executes exits to L1, with reason, displacement, operands."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest

from kvmnest.l1 import L1, L2Mode, code
from kvmnest.suite.support.guest import Guest, Masked
from kvmnest.suite.support.operands import Memory
from kvmnest.vmx import ExitReason, Field, InstructionInfo, Proc2Ctl, Vector
from kvmnest.vmx.outcome import Fault, Succeed

pytestmark = [
    pytest.mark.series(17),
    pytest.mark.sdm("VM-Exit Instruction Information"),
]

RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI = range(8)


@dataclass(frozen=True)
class Insn:
    """A VMX instruction with a memory operand: prefix, opcode, its number in ModR/M or None.

    With ``number`` None the other operand is a register, which the exit names as register 2.
    """

    reason: ExitReason
    opcode: bytes
    prefix: bytes = b""
    number: int | None = None

    def encode(self, memory: Memory, register: int = RAX) -> bytes:
        """Machine code."""
        reg = register if self.number is None else self.number
        return memory.encode(self.opcode, reg, prefix=self.prefix)

    def info(self, memory: Memory, register: int = RAX) -> Masked:
        """Instruction information."""
        return memory.info(register, 4) if self.number is None else memory.info(0, 0)


MEMORY = {
    "VMCLEAR": Insn(ExitReason.VMCLEAR, b"\x0f\xc7", b"\x66", 6),
    "VMPTRLD": Insn(ExitReason.VMPTRLD, b"\x0f\xc7", number=6),
    "VMPTRST": Insn(ExitReason.VMPTRST, b"\x0f\xc7", number=7),
    "VMXON": Insn(ExitReason.VMXON, b"\x0f\xc7", b"\xf3", 6),
    "VMREAD": Insn(ExitReason.VMREAD, b"\x0f\x78"),
    "VMWRITE": Insn(ExitReason.VMWRITE, b"\x0f\x79"),
    "INVEPT": Insn(ExitReason.INVEPT, b"\x0f\x38\x80", b"\x66"),
    "INVVPID": Insn(ExitReason.INVVPID, b"\x0f\x38\x81", b"\x66"),
}
EACH = pytest.mark.parametrize(
    "insn", [pytest.param(insn, id=name) for name, insn in MEMORY.items()]
)
#: Every register as base and as index, each scale, segment, displacement width, address size.
OPERANDS = [
    *(Memory(base=n) for n in range(16)),
    *(Memory(base=RBX, index=n, scale=n % 4) for n in range(16) if n != RSP),
    *(Memory(base=RAX, index=RCX, scale=n, displacement=0x40) for n in range(4)),
    # Prefixes for ES, CS, SS and DS mean nothing in 64-bit mode.
    *(Memory(base=base, segment=n, displacement=-8) for n in (4, 5) for base in (RSI, RBP)),
    *(Memory(base=RDI, displacement=n) for n in (1, 0x7F, -0x80, 0x80, 0x7FFFFFFF, -0x80000000)),
    Memory(base=RDI, displacement=0x10, wide=True),
    Memory(displacement=0x1234),
    Memory(displacement=-0x1000),
    Memory(index=15, scale=3, displacement=0x20),
    Memory(relative=True, displacement=0x100),
    Memory(relative=True, displacement=-0x2000),
    Memory(base=RDX, address_size=32, displacement=0x44),
    Memory(base=RDX, index=9, scale=2, address_size=32, displacement=-4),
    Memory(base=12, index=13, scale=1, segment=5, address_size=32, displacement=0x12345678),
]


@EACH
def test_operands(l1: L1, insn: Insn) -> None:
    """Displacement in the qualification, registers, scale, segment and address size in the info.

    The operand is not accessed: most of these addresses are not canonical or not mapped.
    """
    guest = Guest(l1)
    for memory in OPERANDS:
        text = insn.encode(memory, RDX)
        seen = guest.run(text)
        assert seen == guest.exit(
            insn.reason,
            len(text),
            qualification=memory.qualification(guest.at(len(text))),
            info=insn.info(memory, RDX),
        ), str(memory)
        assert guest.changed(seen) == {}, str(memory)
    assert guest.go_on(skip=len(text)) == Succeed()


def test_second_register(l1: L1) -> None:
    """Bits 31:28 name the register operand, r8 to r15 and RSP included."""
    guest = Guest(l1)
    memory = Memory(base=RBX, displacement=8)
    insns = [insn for insn in MEMORY.values() if insn.number is None]
    for insn, register in itertools.product(insns, range(16)):
        text = insn.encode(memory, register)
        seen = guest.run(text)
        assert seen == guest.exit(
            insn.reason,
            len(text),
            qualification=memory.qualification(0),
            info=insn.info(memory, register),
        ), register


@pytest.mark.parametrize("name", ["VMREAD", "VMWRITE"])
def test_register_operands(l1: L1, name: str) -> None:
    """VMREAD and VMWRITE between registers: bit 10 set, bits 6:3 and 31:28 name them."""
    guest = Guest(l1)
    insn = MEMORY[name]
    pairs = [(n, (n * 7 + 3) % 16) for n in range(16)] + [(RSP, RSP), (15, 0), (8, 8)]
    for operand, field in pairs:
        rex = 0x40 | (field >> 3) << 2 | operand >> 3
        modrm = 0xC0 | (field & 7) << 3 | operand & 7
        text = (bytes([rex]) if rex != 0x40 else b"") + insn.opcode + bytes([modrm])
        info = InstructionInfo(register=True, reg1=operand, reg2=field)
        seen = guest.run(text)
        # The qualification is the displacement of a memory operand; there is none.
        expected = guest.exit(
            insn.reason,
            len(text),
            qualification=Masked(0, 0),
            info=Masked(info.encode(), 0xF << 28 | 1 << 10 | 0xF << 3),
        )
        assert seen == expected, f"operand {operand}, field {field}"
        assert guest.changed(seen) == {}


NO_OPERAND = {
    ExitReason.VMCALL: code.VMCALL,
    ExitReason.VMLAUNCH: code.VMLAUNCH,
    ExitReason.VMRESUME: code.VMRESUME,
    ExitReason.VMXOFF: code.VMXOFF,
}


@pytest.mark.parametrize("reason", NO_OPERAND, ids=lambda reason: reason.name)
@pytest.mark.sdm("Instructions That Cause VM Exits Unconditionally")
def test_without_operand(l1: L1, reason: ExitReason) -> None:
    """VMCALL, VMLAUNCH, VMRESUME and VMXOFF exit at any CPL; L1 stays in VMX operation."""
    guest = Guest(l1)
    for cpl in (0, 3):
        guest.set_cpl(cpl)
        # The NOP keeps a VMCALL apart from the one at the end of the code.
        seen = guest.run(NO_OPERAND[reason] + code.NOP)
        assert seen == guest.exit(reason, 3), cpl
        assert guest.changed(seen) == {}
        assert guest.go_on(skip=3) == Succeed()


@pytest.mark.sdm("Instructions That Cause VM Exits Unconditionally")
def test_at_cpl_3(l1: L1) -> None:
    """The exit comes before the privilege check."""
    guest = Guest(l1)
    guest.set_cpl(3)
    memory = Memory(base=RSI, displacement=0x20)
    for name, insn in MEMORY.items():
        text = insn.encode(memory, RDX)
        seen = guest.run(text)
        assert seen == guest.exit(
            insn.reason,
            len(text),
            qualification=memory.qualification(0),
            info=insn.info(memory, RDX),
        ), name
        assert guest.go_on(skip=len(text)) == Succeed()


@pytest.mark.sdm("Relative Priority of Faults and VM Exits")
def test_before_operand_faults(l1: L1) -> None:
    """The exit comes before #PF, #GP and #SS of the operand, and RFLAGS stay."""
    guest = Guest(l1)
    operands = (
        (Memory(base=RDI), {"rdi": 0x40000000}),
        (Memory(base=RDI), {"rdi": 1 << 63}),
        (Memory(base=RBP, displacement=8), {"rbp": 1 << 62}),
    )
    for name, insn in MEMORY.items():
        for memory, regs in operands:
            text = insn.encode(memory)
            seen = guest.run(text, regs, GUEST_RFLAGS=0x8D7)
            assert seen == guest.exit(
                insn.reason,
                len(text),
                qualification=memory.qualification(0),
                info=insn.info(memory),
            ), f"{name} {memory}"
            assert l1.vmread(Field.GUEST_RFLAGS) == Succeed(0x8D7)


@pytest.mark.sdm("Instructions That Cause VM Exits Unconditionally")
def test_state_of_l1_is_untouched(l1: L1) -> None:
    """What L2 tried changes neither L1's current VMCS nor any region that it named."""
    guest = Guest(l1)
    other = l1.prepare_region(l1.sym("vmcs_b"))
    l1.write_int(l1.sym("l2_data"), other)
    content = l1.read(other, 4096)
    for name in ("VMCLEAR", "VMPTRLD", "VMPTRST", "VMXON"):
        text = MEMORY[name].encode(Memory(base=RDI))
        seen = guest.run(text, {"rdi": l1.sym("l2_data")})
        info = MEMORY[name].info(Memory(base=RDI))
        assert seen == guest.exit(MEMORY[name].reason, len(text), info=info)
        assert l1.read_int(l1.sym("l2_data")) == other
        assert l1.read(other, 4096) == content
        assert l1.vmptrst() == Succeed(guest.vmcs.address)
    for text in (code.VMXOFF, code.VMLAUNCH, code.VMRESUME):
        guest.run(text)
        assert l1.vmptrst() == Succeed(guest.vmcs.address)
    assert guest.run(code.NOP) == Succeed()


@pytest.mark.sdm("Relative Priority of Faults and VM Exits")
def test_undefined_forms(l1: L1) -> None:
    """A LOCK prefix, and INVEPT or INVVPID with a register as descriptor: #UD, no exit."""
    guest = Guest(l1)
    forms = {name: b"\xf0" + insn.encode(Memory(base=RDI)) for name, insn in MEMORY.items()}
    for name in ("INVEPT", "INVVPID"):
        forms[f"{name} register"] = b"\x66" + MEMORY[name].opcode + b"\xc3"
    for name, text in forms.items():
        assert guest.run(text) == Fault(Vector.UD, error_code=0, rip=0), name


# --- other modes ---

_ADDRESSING = {
    # 32-bit code: [EBX+ESI*4+0x12345678], and [BX+0x1234] by address-size prefix.
    32: (b"\xb4\xb3\x78\x56\x34\x12", 0x12345678, InstructionInfo(
        scale=2, address_size=32, segment=3, index=RSI, base=RBX)),
    16: (b"\xb7\x34\x12", 0x1234, InstructionInfo(address_size=16, segment=3, base=RBX)),
}  # fmt: skip


@pytest.mark.parametrize("size", [32, 16], ids=["a32", "a16"])
def test_in_32_bit_mode(l1: L1, size: int) -> None:
    """In 32-bit code addresses have 32 or 16 bits, and the information says so."""
    guest = Guest(l1, mode=L2Mode.PROTECTED)
    operand, displacement, info = _ADDRESSING[size]
    mask = 3 | 7 << 7 | 1 << 10 | 7 << 15 | 0xF << 23 | 1 << 22 | 1 << 27
    if info.index is None:
        mask &= ~3
    else:
        mask |= 0xF << 18
    for name, insn in MEMORY.items():
        reg = RDX if insn.number is None else insn.number
        modrm = bytes([operand[0] & ~0x38 | reg << 3])
        text = insn.prefix + insn.opcode + modrm + operand[1:]
        if size == 16:
            text = b"\x67" + text
        seen = guest.run(text)
        assert seen == guest.exit(
            insn.reason,
            len(text),
            qualification=Masked(displacement, (1 << size) - 1),
            info=Masked(info.encode(), mask),
        ), name


@pytest.mark.needs(Proc2Ctl.UNRESTRICTED_GUEST)
@pytest.mark.sdm("Relative Priority of Faults and VM Exits")
def test_in_real_mode(l1: L1) -> None:
    """Without CR0.PE all but VMCALL are undefined: #UD in L2; VMCALL exits."""
    guest = Guest(l1, mode=L2Mode.REAL)
    undefined = {name: insn.encode(Memory(base=RBX)) for name, insn in MEMORY.items()}
    # ModR/M 3 means [BP+DI] here; the operand does not matter.
    undefined |= {
        "VMLAUNCH": code.VMLAUNCH, "VMRESUME": code.VMRESUME, "VMXOFF": code.VMXOFF,
    }  # fmt: skip
    for name, text in undefined.items():
        seen = guest.run(text)
        assert isinstance(seen, Fault), f"{name}: {seen!r}"
        assert seen.vector == Vector.UD, name
    assert guest.run(code.VMCALL + code.NOP) == guest.exit(ExitReason.VMCALL, 3)


@pytest.mark.sdm("Relative Priority of Faults and VM Exits")
def test_in_compatibility_mode(l1: L1) -> None:
    """In compatibility mode all but VMCALL are undefined: #UD in L2."""
    guest = Guest(l1)
    guest.vmcs[Field.GUEST_CS_SELECTOR] = l1.sym("SEL_CODE32")
    guest.vmcs[Field.GUEST_CS_ACCESS_RIGHTS] = 0xC09B
    undefined = {name: insn.encode(Memory(base=RBX)) for name, insn in MEMORY.items()}
    undefined |= {
        "VMLAUNCH": code.VMLAUNCH, "VMRESUME": code.VMRESUME, "VMXOFF": code.VMXOFF,
    }  # fmt: skip
    for name, text in undefined.items():
        guest.vmcs[Field.GUEST_CS_SELECTOR] = l1.sym("SEL_CODE32")
        guest.vmcs[Field.GUEST_CS_ACCESS_RIGHTS] = 0xC09B
        assert guest.run(text) == Fault(Vector.UD, error_code=0, rip=0), name
    guest.vmcs[Field.GUEST_CS_SELECTOR] = l1.sym("SEL_CODE32")
    guest.vmcs[Field.GUEST_CS_ACCESS_RIGHTS] = 0xC09B
    assert guest.run(code.VMCALL + code.NOP) == guest.exit(ExitReason.VMCALL, 3)
