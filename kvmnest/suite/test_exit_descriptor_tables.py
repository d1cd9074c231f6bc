"""SGDT, SIDT, LGDT, LIDT, SLDT, STR, LLDT, LTR of L2, with "descriptor-table exiting" and not."""

import pytest

from kvmnest.l1 import L1, L2Mode
from kvmnest.suite.support.guest import Guest, Masked
from kvmnest.suite.support.operands import Memory, register_info
from kvmnest.vmx import Cr4, ExitReason, Field, Proc2Ctl, Vector
from kvmnest.vmx.exitinfo import DescriptorTableOp, SystemSegmentOp
from kvmnest.vmx.outcome import ANY, Fault, Succeed

pytestmark = [
    pytest.mark.series(19),
    pytest.mark.sdm("VM-Exit Instruction Information as Used for LIDT, LGDT, SIDT, or SGDT"),
    pytest.mark.needs(Proc2Ctl.DESCRIPTOR_TABLE_EXITING),
]

RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI = range(8)
ES, CS, SS, DS, FS, GS = range(6)

#: Name: opcode, /digit, exit reason, identity in the instruction information.
INSTRUCTIONS = {
    "SGDT": (b"\x0f\x01", 0, ExitReason.GDTR_IDTR, DescriptorTableOp.SGDT),
    "SIDT": (b"\x0f\x01", 1, ExitReason.GDTR_IDTR, DescriptorTableOp.SIDT),
    "LGDT": (b"\x0f\x01", 2, ExitReason.GDTR_IDTR, DescriptorTableOp.LGDT),
    "LIDT": (b"\x0f\x01", 3, ExitReason.GDTR_IDTR, DescriptorTableOp.LIDT),
    "SLDT": (b"\x0f\x00", 0, ExitReason.LDTR_TR, SystemSegmentOp.SLDT),
    "STR": (b"\x0f\x00", 1, ExitReason.LDTR_TR, SystemSegmentOp.STR),
    "LLDT": (b"\x0f\x00", 2, ExitReason.LDTR_TR, SystemSegmentOp.LLDT),
    "LTR": (b"\x0f\x00", 3, ExitReason.LDTR_TR, SystemSegmentOp.LTR),
}
OPERANDS = (
    Memory(RDI),
    Memory(RAX, displacement=0x7F),
    Memory(RBX, displacement=-0x80),
    Memory(RCX, displacement=0x12345678),
    Memory(RDX, displacement=-0x12345678),
    Memory(RSI, displacement=4, wide=True),
    Memory(RBP, displacement=-8),
    Memory(RSP, displacement=16),
    Memory(12),
    Memory(13),
    Memory(RAX, RCX),
    Memory(8, RDX, 1),
    Memory(15, 14, 2, 0x40),
    Memory(RBX, 12, 3, -0x400),
    Memory(None, RSI, 3, 0x1000),
    Memory(None, None, 0, 0x7FFFFFF0),
    Memory(None, None, 0, -0x10),
    Memory(relative=True, displacement=0x100),
    Memory(relative=True, displacement=-0x100),
    Memory(RDI, segment=FS, displacement=1),
    Memory(RBP, segment=GS),
    Memory(RDI, address_size=32),
    Memory(RDX, RBX, 2, 0x20, address_size=32),
    Memory(RSI, displacement=-4, address_size=32),
)


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_memory_operand(l1: L1, name: str) -> None:
    """The exit describes the operand in full: base, index, scale, segment, displacement, sizes."""
    opcode, digit, reason, identity = INSTRUCTIONS[name]
    guest = Guest(l1, Proc2Ctl.DESCRIPTOR_TABLE_EXITING)
    for operand in OPERANDS:
        instruction = operand.encode(opcode, digit)
        seen = guest.run(instruction)
        length = len(instruction)
        assert seen == guest.exit(
            reason,
            length,
            qualification=operand.qualification(guest.at(length)),
            info=operand.info(identity),
        ), f"{name} {operand} ({instruction.hex()})"
        assert guest.changed(seen) == {}


@pytest.mark.sdm("VM-Exit Instruction Information as Used for LLDT, LTR, SLDT, and STR")
@pytest.mark.parametrize("name", ["SLDT", "STR", "LLDT", "LTR"])
def test_register_operand(l1: L1, name: str) -> None:
    """With a register operand the information names it."""
    opcode, digit, reason, identity = INSTRUCTIONS[name]
    guest = Guest(l1, Proc2Ctl.DESCRIPTOR_TABLE_EXITING)
    for register in range(16):
        for wide in (b"", b"\x66", b"\x48"):
            if wide == b"\x48":
                rex = bytes([0x48 | register >> 3])
            else:
                rex = wide + (b"\x41" if register > 7 else b"")
            instruction = rex + opcode + bytes([0xC0 | digit << 3 | register & 7])
            seen = guest.run(instruction)
            assert seen == guest.exit(
                reason,
                len(instruction),
                qualification=ANY,
                info=register_info(register, identity),
            ), f"{name} {instruction.hex()}"
            assert guest.changed(seen) == {}


@pytest.mark.sdm("Exit Qualification for Instructions with a Displacement")
@pytest.mark.parametrize("name", ["SLDT", "STR", "LLDT", "LTR"])
def test_register_operand_has_no_displacement(l1: L1, name: str) -> None:
    """Without a displacement the qualification is 0."""
    opcode, digit, reason, _ = INSTRUCTIONS[name]
    guest = Guest(l1, Proc2Ctl.DESCRIPTOR_TABLE_EXITING)
    for register in range(8):
        instruction = opcode + bytes([0xC0 | digit << 3 | register])
        assert guest.run(instruction) == guest.exit(reason, 3), instruction.hex()


def test_operand_is_not_looked_at(l1: L1) -> None:
    """The exit comes before the operand's address is used: no fault on a bad one."""
    guest = Guest(l1, Proc2Ctl.DESCRIPTOR_TABLE_EXITING)
    for name, (opcode, digit, reason, _) in INSTRUCTIONS.items():
        for address in (0x50000000, 1 << 63):
            seen = guest.run(Memory(RDI).encode(opcode, digit), {"rdi": address})
            assert seen == guest.exit(reason, 3), f"{name} {address:#x}"


def _lgdt32(operand: Memory, tail: bytes, *, narrow: bool) -> tuple[bytes, Masked]:
    """LGDT of 32-bit code with this ModR/M byte and displacement; its information."""
    modrm = bytes([tail[0] & 0xC7 | DescriptorTableOp.LGDT << 3])
    instruction = (b"\x66" if narrow else b"") + b"\x0f\x01" + modrm + tail[1:]
    return instruction, operand.info(DescriptorTableOp.LGDT)


OPERANDS32 = (
    (Memory(RDI, displacement=0x11223344, segment=DS, address_size=32), b"\x87\x44\x33\x22\x11"),
    (Memory(RBP, displacement=-4, segment=SS, address_size=32), b"\x45\xfc"),
)


@pytest.mark.parametrize("mode", [L2Mode.PROTECTED, L2Mode.PAE], ids=["32-bit", "PAE"])
def test_32_bit_code(l1: L1, mode: L2Mode) -> None:
    """In 32-bit code the information has addresses of 32 and 16 bits."""
    guest = Guest(l1, Proc2Ctl.DESCRIPTOR_TABLE_EXITING, mode=mode)
    for operand, tail in OPERANDS32:
        instruction, info = _lgdt32(operand, tail, narrow=False)
        assert guest.run(instruction) == guest.exit(
            ExitReason.GDTR_IDTR,
            len(instruction),
            qualification=operand.qualification(0),
            info=info,
        ), instruction.hex()
    # 16-bit addressing: [BX+SI+1234H].
    seen = guest.run(b"\x67\x0f\x01\x80\x34\x12")
    assert seen == guest.exit(
        ExitReason.GDTR_IDTR,
        6,
        qualification=Masked(0x1234, 0xFFFF),
        info=Memory(RBX, RSI, address_size=16).info(DescriptorTableOp.SGDT),
    )


def test_operand_size(l1: L1) -> None:
    """Outside 64-bit mode bit 11 of the information is the operand size."""
    guest = Guest(l1, Proc2Ctl.DESCRIPTOR_TABLE_EXITING, mode=L2Mode.PROTECTED)
    for operand, tail in OPERANDS32:
        for narrow in (False, True):
            instruction, info = _lgdt32(operand, tail, narrow=narrow)
            size = 0 if narrow else 1 << 11
            assert guest.run(instruction) == guest.exit(
                ExitReason.GDTR_IDTR,
                len(instruction),
                qualification=operand.qualification(0),
                info=Masked(info.value | size, info.mask | 1 << 11),
            ), instruction.hex()


@pytest.mark.sdm("Relative Priority of Faults and VM Exits")
def test_privilege_comes_first(l1: L1) -> None:
    """At CPL 3 the loads are #GP, the stores exit as they would execute."""
    guest = Guest(l1, Proc2Ctl.DESCRIPTOR_TABLE_EXITING)
    guest.set_cpl(3)
    for name, (opcode, digit, reason, _) in INSTRUCTIONS.items():
        seen = guest.run(Memory(RDI).encode(opcode, digit), {"rdi": l1.sym("l2_data")})
        if name.startswith("L"):
            assert seen == Fault(Vector.GP, error_code=0, rip=0), name
        else:
            assert seen == guest.exit(reason, 3), name


STORES = ("SGDT", "SIDT", "SLDT", "STR")


def _require_umip(l1: L1) -> None:
    if not l1.caps.cr4_fixed1 & Cr4.UMIP:
        pytest.skip("needs Cr4.UMIP: IA32_VMX_CR4_FIXED1 does not allow it")


@pytest.mark.sdm("Relative Priority of Faults and VM Exits")
@pytest.mark.parametrize("exiting", [False, True], ids=["not-exiting", "exiting"])
def test_umip(l1: L1, exiting: bool) -> None:
    """With CR4.UMIP 1 the stores are #GP(0) at CPL 3, before any exit."""
    _require_umip(l1)
    guest = Guest(l1, *([Proc2Ctl.DESCRIPTOR_TABLE_EXITING] if exiting else []))
    guest.set_cpl(3)
    cr4 = guest.vmcs[Field.GUEST_CR4] | Cr4.UMIP
    for name in STORES:
        opcode, digit, _, _ = INSTRUCTIONS[name]
        seen = guest.run(
            Memory(RDI).encode(opcode, digit), {"rdi": l1.sym("l2_data")}, GUEST_CR4=cr4
        )
        assert seen == Fault(Vector.GP, error_code=0, rip=0), name


# --- not intercepted ---


@pytest.mark.parametrize("umip", [False, True], ids=["UMIP-0", "UMIP-1"])
def test_stores_without_exiting(l1: L1, umip: bool) -> None:
    """Without the control the stores give L2's own registers, at CPL 0 with CR4.UMIP too."""
    if umip:
        _require_umip(l1)
    guest = Guest(l1)
    cr4 = guest.vmcs[Field.GUEST_CR4] | (Cr4.UMIP if umip else 0)
    data = l1.sym("l2_data")
    gdtr = 0x123 | 0x00007FFF12345678 << 16
    idtr = guest.vmcs[Field.GUEST_IDTR_LIMIT] | guest.vmcs[Field.GUEST_IDTR_BASE] << 16
    expected = {
        "SGDT": (gdtr, 10),
        "SIDT": (idtr, 10),
        "SLDT": (l1.sym("SEL_LDT"), 2),
        "STR": (l1.sym("SEL_TSS_L2"), 2),
    }
    state = {
        **{"GUEST_GDTR_BASE": gdtr >> 16, "GUEST_GDTR_LIMIT": gdtr & 0xFFFF},
        **{"GUEST_LDTR_SELECTOR": l1.sym("SEL_LDT"), "GUEST_LDTR_ACCESS_RIGHTS": 0x82},
    }
    for name, (value, size) in expected.items():
        opcode, digit, _, _ = INSTRUCTIONS[name]
        l1.write(data, b"\xaa" * 16)
        seen = guest.run(
            Memory(RDI, displacement=1).encode(opcode, digit), {"rdi": data}, GUEST_CR4=cr4, **state
        )
        assert seen == Succeed(), name
        assert l1.read_int(data + 1, size) == value, name
        assert l1.read_int(data + 1 + size, 1) == 0xAA, f"{name} writes {size} bytes"
        assert guest.changed(seen) == {}
    for name in ("SLDT", "STR"):
        opcode, digit, _, _ = INSTRUCTIONS[name]
        seen = guest.run(opcode + bytes([0xC0 | digit << 3 | RBX]))
        assert seen == Succeed()
        assert seen.regs["rbx"] == expected[name][0]


@pytest.mark.sdm("Saving Segment Registers and Descriptor-Table Registers")
def test_loads_without_exiting(l1: L1) -> None:
    """Without the control the loads change L2's registers, which the exit saves; L1 keeps its."""
    guest = Guest(l1)
    data = l1.sym("l2_data")
    regs = {"rdi": data}
    for name, base, limit in (
        ("LGDT", Field.GUEST_GDTR_BASE, Field.GUEST_GDTR_LIMIT),
        ("LIDT", Field.GUEST_IDTR_BASE, Field.GUEST_IDTR_LIMIT),
    ):
        before = guest.vmcs.read(base, limit)
        opcode, digit, _, _ = INSTRUCTIONS[name]
        l1.write_int(data, 0xFFFF800012340000 << 16 | 0x7FF, 10)
        assert guest.run(Memory(RDI).encode(opcode, digit), regs) == Succeed(), name
        assert guest.vmcs.read(base, limit) == (0xFFFF800012340000, 0x7FF)
        # L1's own come from the host-state area.
        loads = l1.cpu.host_loads()
        assert (loads.gdtr_base, loads.idtr_base) == (l1.sym("l1_gdt"), l1.sym("l1_idt"))
        # A base that is not canonical is #GP; nothing is loaded.
        guest.vmcs[base], guest.vmcs[limit] = before
        l1.write_int(data, 0x8000800012340000 << 16 | 0x7FF, 10)
        seen = guest.run(Memory(RDI).encode(opcode, digit), regs)
        assert seen == Fault(Vector.GP, error_code=0, rip=0), name
        assert guest.vmcs.read(base, limit) == before
    # LLDT and LTR take descriptors from a copy of the table, where the TSS is not yet busy.
    start, size = guest.vmcs.read(Field.GUEST_GDTR_BASE, Field.GUEST_GDTR_LIMIT)
    table, tss, ldt = l1.alloc(), l1.sym("SEL_TSS_L2"), l1.sym("SEL_LDT")
    l1.write(table, l1.read(start, size + 1))
    l1.write_int(table + tss + 5, 0x89, 1)
    guest.vmcs[Field.GUEST_GDTR_BASE] = table
    for name, selector in (("LLDT", ldt), ("LTR", tss)):
        opcode, digit, _, _ = INSTRUCTIONS[name]
        l1.write_int(data, selector, 2)
        assert guest.run(Memory(RDI).encode(opcode, digit), regs) == Succeed(), name
    assert l1.read_int(table + tss + 5, 1) == 0x8B
    assert guest.vmcs.read(
        *(Field.GUEST_LDTR_SELECTOR, Field.GUEST_LDTR_LIMIT, Field.GUEST_LDTR_BASE),
        *(Field.GUEST_LDTR_ACCESS_RIGHTS, Field.GUEST_TR_SELECTOR, Field.GUEST_TR_BASE),
        *(Field.GUEST_TR_LIMIT, Field.GUEST_TR_ACCESS_RIGHTS),
    ) == (ldt, 7, l1.sym("l1_gdt"), 0x82, tss, l1.sym("l2_tss"), 0x67, 0x8B)
    assert l1.cpu.host_loads().ldtr == 0
