"""Descriptor-table and other instructions of L2 that KVM emulates: what L1 is told of the exit.

See ``test_emulated_l2_io``. INS, OUTS, IN and OUT are there.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from kvmnest.l1 import L1, code
from kvmnest.suite.support.emulation import PREFIX, forced
from kvmnest.suite.support.guest import Guest
from kvmnest.suite.support.operands import Memory, register_info
from kvmnest.vmx import Cr4, ExitReason, Field, Msr, Proc2Ctl, ProcCtl, Vector
from kvmnest.vmx.exitinfo import DescriptorTableOp, SystemSegmentOp
from kvmnest.vmx.outcome import ANY, Fault, HostExit, Succeed

__all__ = ["forced"]

pytestmark = [pytest.mark.series(19)]

FS = 4
AT = len(PREFIX)


# --- SGDT, SIDT, LGDT, LIDT, SLDT, STR, LLDT, LTR ---

#: Name: opcode, /digit, exit reason, identity in the instruction information.
TABLES = {
    "SGDT": (b"\x0f\x01", 0, ExitReason.GDTR_IDTR, DescriptorTableOp.SGDT),
    "SIDT": (b"\x0f\x01", 1, ExitReason.GDTR_IDTR, DescriptorTableOp.SIDT),
    "LGDT": (b"\x0f\x01", 2, ExitReason.GDTR_IDTR, DescriptorTableOp.LGDT),
    "LIDT": (b"\x0f\x01", 3, ExitReason.GDTR_IDTR, DescriptorTableOp.LIDT),
    "SLDT": (b"\x0f\x00", 0, ExitReason.LDTR_TR, SystemSegmentOp.SLDT),
    "STR": (b"\x0f\x00", 1, ExitReason.LDTR_TR, SystemSegmentOp.STR),
    "LLDT": (b"\x0f\x00", 2, ExitReason.LDTR_TR, SystemSegmentOp.LLDT),
    "LTR": (b"\x0f\x00", 3, ExitReason.LDTR_TR, SystemSegmentOp.LTR),
}
RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI = range(8)
OPERANDS = (
    Memory(RDI),
    Memory(RBX, displacement=-0x80),
    Memory(RCX, displacement=0x1234),
    Memory(RSP, displacement=-16),
    Memory(13),
    Memory(15, 14, 2, 0x40),
    Memory(None, RSI, 3, 0x1000),
    Memory(relative=True, displacement=0x100),
    Memory(RDI, segment=FS, displacement=1),
    Memory(RDX, RBX, 2, 0x20, address_size=32),
)


def _table_regs(l1: L1, operand: Memory) -> dict[str, int]:
    """Registers with which the operand is in L2's data: what it names holds zeros."""
    data = l1.sym("l2_data") + 0x400
    regs = dict.fromkeys(("rax", "rcx", "rdx", "rbx", "rbp", "rsi", "rdi", "r13", "r14", "r15"), 0)
    if operand.base is not None and operand.base != RSP:
        names = (
            "rax",
            "rcx",
            "rdx",
            "rbx",
            "",
            "rbp",
            "rsi",
            "rdi",
            *(f"r{n}" for n in range(8, 16)),
        )
        regs[names[operand.base]] = data - operand.displacement
    return regs


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.needs(Proc2Ctl.DESCRIPTOR_TABLE_EXITING)
@pytest.mark.sdm("Instructions That Cause VM Exits Conditionally")
def test_table_exits(l1: L1, forced: bytes, name: str) -> None:
    """Descriptor-table instructions exit with their reason and length."""
    opcode, digit, reason, _ = TABLES[name]
    guest = Guest(l1, Proc2Ctl.DESCRIPTOR_TABLE_EXITING)
    for operand in OPERANDS:
        instruction = operand.encode(opcode, digit)
        seen = guest.run(PREFIX + instruction, _table_regs(l1, operand))
        expected = guest.exit(reason, len(instruction), offset=AT, qualification=ANY)
        assert seen == expected, f"{name} {operand} ({instruction.hex()})"
        assert guest.changed(seen) == {}


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.needs(Proc2Ctl.DESCRIPTOR_TABLE_EXITING)
@pytest.mark.sdm("Exit Qualification for Instructions with a Displacement")
def test_table_displacement(l1: L1, forced: bytes, name: str) -> None:
    """The exit qualification is the displacement of the operand."""
    opcode, digit, reason, _ = TABLES[name]
    guest = Guest(l1, Proc2Ctl.DESCRIPTOR_TABLE_EXITING)
    for operand in OPERANDS:
        instruction = operand.encode(opcode, digit)
        seen = guest.run(PREFIX + instruction, _table_regs(l1, operand))
        expected = operand.qualification(guest.at(AT + len(instruction)))
        assert seen == guest.exit(reason, len(instruction), offset=AT, qualification=expected), (
            f"{name} {operand} ({instruction.hex()})"
        )


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.needs(Proc2Ctl.DESCRIPTOR_TABLE_EXITING)
@pytest.mark.sdm("VM-Exit Instruction Information as Used for LIDT, LGDT, SIDT, or SGDT")
def test_table_information(l1: L1, forced: bytes, name: str) -> None:
    """The instruction information describes instruction and operand."""
    opcode, digit, reason, identity = TABLES[name]
    guest = Guest(l1, Proc2Ctl.DESCRIPTOR_TABLE_EXITING)
    for operand in OPERANDS:
        instruction = operand.encode(opcode, digit)
        seen = guest.run(PREFIX + instruction, _table_regs(l1, operand))
        assert seen == guest.exit(
            *(reason, len(instruction)), offset=AT, qualification=ANY, info=operand.info(identity)
        ), f"{name} {operand} ({instruction.hex()})"


@pytest.mark.parametrize("name", ["SLDT", "STR", "LLDT", "LTR"])
@pytest.mark.needs(Proc2Ctl.DESCRIPTOR_TABLE_EXITING)
@pytest.mark.sdm("VM-Exit Instruction Information as Used for LLDT, LTR, SLDT, and STR")
def test_table_register(l1: L1, forced: bytes, name: str) -> None:
    """With a register operand the information names it."""
    opcode, digit, reason, identity = TABLES[name]
    guest = Guest(l1, Proc2Ctl.DESCRIPTOR_TABLE_EXITING)
    for register in (RAX, RBX, RSI, 9):
        rex = b"\x41" if register > 7 else b""
        instruction = rex + opcode + bytes([0xC0 | digit << 3 | register & 7])
        seen = guest.run(PREFIX + instruction)
        assert seen == guest.exit(
            reason,
            len(instruction),
            offset=AT,
            qualification=0,
            info=register_info(register, identity),
        ), f"{name} {instruction.hex()}"


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.needs(Proc2Ctl.DESCRIPTOR_TABLE_EXITING)
@pytest.mark.sdm("Relative Priority of Faults and VM Exits")
def test_table_exit_comes_before_a_page_fault(l1: L1, forced: bytes, name: str) -> None:
    """The exit comes before the operand is accessed."""
    opcode, digit, reason, _ = TABLES[name]
    guest = Guest(l1, Proc2Ctl.DESCRIPTOR_TABLE_EXITING)
    instruction = Memory(RDI).encode(opcode, digit)
    seen = guest.run(PREFIX + instruction, {"rdi": 0x50000000})
    assert seen == guest.exit(reason, len(instruction), offset=AT, qualification=ANY)


@pytest.mark.parametrize("name", ["LGDT", "LIDT", "LLDT", "LTR"])
@pytest.mark.needs(Proc2Ctl.DESCRIPTOR_TABLE_EXITING)
@pytest.mark.sdm("Relative Priority of Faults and VM Exits")
def test_table_privilege_comes_first(l1: L1, forced: bytes, name: str) -> None:
    """At CPL 3 the loads are #GP, not an exit."""
    opcode, digit, _, _ = TABLES[name]
    guest = Guest(l1, Proc2Ctl.DESCRIPTOR_TABLE_EXITING)
    guest.set_cpl(3)
    seen = guest.run(PREFIX + Memory(RDI).encode(opcode, digit), {"rdi": l1.sym("l2_data")})
    assert seen == Fault(Vector.GP, error_code=0, rip=AT)


# --- the other instructions that can exit ---


@dataclass(frozen=True)
class Other:
    """An instruction, the controls that make it exit, and the qualification."""

    code: bytes
    reason: ExitReason
    controls: tuple[ProcCtl | Proc2Ctl, ...] = ()
    regs: dict[str, int] = field(default_factory=dict)
    qualification: int = 0


OTHERS = {
    "HLT": Other(code.HLT, ExitReason.HLT, (ProcCtl.HLT_EXITING,)),
    "PAUSE": Other(code.PAUSE, ExitReason.PAUSE, (ProcCtl.PAUSE_EXITING,)),
    "RDTSC": Other(code.RDTSC, ExitReason.RDTSC, (ProcCtl.RDTSC_EXITING,)),
    "RDTSCP": Other(
        *(code.RDTSCP, ExitReason.RDTSCP),
        controls=(ProcCtl.RDTSC_EXITING, Proc2Ctl.ENABLE_RDTSCP),
    ),
    "RDPMC": Other(code.RDPMC, ExitReason.RDPMC, (ProcCtl.RDPMC_EXITING,), {"rcx": 0}),
    "INVLPG": Other(
        *(b"\x0f\x01\x3f", ExitReason.INVLPG, (ProcCtl.INVLPG_EXITING,)),
        regs={"rdi": 0x123456789ABC},
        qualification=0x123456789ABC,
    ),
    "WBINVD": Other(code.WBINVD, ExitReason.WBINVD, (Proc2Ctl.WBINVD_EXITING,)),
    "RDRAND": Other(b"\x48\x0f\xc7\xf0", ExitReason.RDRAND, (Proc2Ctl.RDRAND_EXITING,)),
    "RDSEED": Other(b"\x48\x0f\xc7\xf8", ExitReason.RDSEED, (Proc2Ctl.RDSEED_EXITING,)),
    "MONITOR": Other(code.MONITOR, ExitReason.MONITOR, (ProcCtl.MONITOR_EXITING,)),
    "MWAIT": Other(code.MWAIT, ExitReason.MWAIT, (ProcCtl.MWAIT_EXITING,)),
    "MOV-DR": Other(
        *(code.mov_from_dr(7), ExitReason.DR_ACCESS, (ProcCtl.MOV_DR_EXITING,)),
        qualification=0x17,
    ),
    "MOV-from-CR8": Other(
        *(code.mov_from_cr(8), ExitReason.CR_ACCESS, (ProcCtl.CR8_STORE_EXITING,)),
        qualification=0x18,
    ),
    "MOV-to-CR3": Other(
        *(code.mov_to_cr(3), ExitReason.CR_ACCESS, (ProcCtl.CR3_LOAD_EXITING,)),
        qualification=0x03,
    ),
    "MOV-from-CR3": Other(
        *(code.mov_from_cr(3), ExitReason.CR_ACCESS, (ProcCtl.CR3_STORE_EXITING,)),
        qualification=0x13,
    ),
    "RDMSR": Other(code.RDMSR, ExitReason.RDMSR, (), {"rcx": int(Msr.KERNEL_GS_BASE)}),
    "WRMSR": Other(code.WRMSR, ExitReason.WRMSR, (), {"rcx": int(Msr.KERNEL_GS_BASE)}),
    "CPUID": Other(code.CPUID, ExitReason.CPUID, (), {"rax": 0, "rcx": 0}),
    "INVD": Other(code.INVD, ExitReason.INVD),
    "XSETBV": Other(code.XSETBV, ExitReason.XSETBV, (), {"rcx": 0, "rax": 1, "rdx": 0}),
    "VMCALL": Other(code.VMCALL, ExitReason.VMCALL),
}


def _others(*, unconditional: bool = True) -> list[object]:
    found: list[object] = []
    for name, other in OTHERS.items():
        needs: tuple[object, ...] = (*other.controls, *([Cr4.OSXSAVE] if name == "XSETBV" else []))
        if other.controls or unconditional:
            found.append(pytest.param(name, marks=pytest.mark.needs(*needs) if needs else ()))
    return found


@pytest.mark.parametrize("name", _others())
@pytest.mark.sdm("Instructions That Cause VM Exits")
def test_instruction_exits(l1: L1, forced: bytes, name: str) -> None:
    """An instruction that L1 intercepts exits, with all that the processor would say of it."""
    other = OTHERS[name]
    guest = Guest(l1, *other.controls)
    cr4 = guest.vmcs[Field.GUEST_CR4] | Cr4.OSXSAVE & l1.caps.cr4_fixed1
    seen = guest.run(PREFIX + other.code + code.NOP, other.regs, GUEST_CR4=cr4)
    assert seen == guest.exit(
        other.reason, len(other.code), offset=AT, qualification=other.qualification
    )
    assert guest.changed(seen) == {}


@pytest.mark.parametrize("name", _others(unconditional=False))
@pytest.mark.sdm("Instructions That Cause VM Exits")
def test_instruction_does_not_complete(l1: L1, forced: bytes, name: str) -> None:
    """Whatever becomes of an instruction that L1 intercepts, L2 does not execute it."""
    other = OTHERS[name]
    guest = Guest(l1, *other.controls)
    seen = guest.run(PREFIX + other.code + code.NOP, other.regs)
    assert not isinstance(seen, Succeed | HostExit)
    assert guest.changed(seen) == {}


@pytest.mark.needs(ProcCtl.HLT_EXITING)
@pytest.mark.sdm("Relative Priority of Faults and VM Exits")
def test_hlt_privilege_comes_first(l1: L1, forced: bytes) -> None:
    """At CPL 3 HLT is #GP, not an exit."""
    guest = Guest(l1, ProcCtl.HLT_EXITING)
    guest.set_cpl(3)
    assert guest.run(PREFIX + code.HLT) == Fault(Vector.GP, error_code=0, rip=AT)


@pytest.mark.sdm("Instructions That Cause VM Exits Conditionally")
@pytest.mark.needs(Proc2Ctl.ENABLE_RDTSCP)
def test_rdpid_needs_its_control(l1: L1, forced: bytes) -> None:
    """RDPID is #UD if "enable RDTSCP" is 0, else it reads IA32_TSC_AUX; it never exits."""
    if not _has_rdpid(l1):
        pytest.skip("needs RDPID: CPUID.07H:ECX[22] is 0")
    assert l1.wrmsr(Msr.TSC_AUX, 0x1234567) == Succeed()
    rdpid = b"\xf3\x0f\xc7\xf8"  # RDPID RAX
    guest = Guest(l1, ProcCtl.RDTSC_EXITING)
    assert guest.run(PREFIX + rdpid) == Fault(Vector.UD, error_code=0, rip=AT)
    guest.on(Proc2Ctl.ENABLE_RDTSCP)
    seen = guest.run(PREFIX + rdpid)
    assert seen == Succeed()
    assert guest.changed(seen) == {"rax": 0x1234567}


def _has_rdpid(l1: L1) -> bool:
    seen = l1.cpuid(7)
    assert isinstance(seen, Succeed)
    return bool(seen.value[2] >> 22 & 1)
