"""Memory and register operands of VMX instructions in L1: every addressing form finds its data."""

from __future__ import annotations

import itertools

import pytest

from kvmnest.l1 import L1
from kvmnest.suite.support.entries import not_canonical
from kvmnest.suite.support.operands import Memory
from kvmnest.vmx import Field, Msr, Vector
from kvmnest.vmx.outcome import Fault, Succeed
from kvmnest.vmx.registers import STATUS_FLAGS

SDM_READ = "VMREAD - Read Field from Virtual-Machine Control Structure"
SDM_WRITE = "VMWRITE - Write Field to Virtual-Machine Control Structure"

pytestmark = [pytest.mark.series(13), pytest.mark.sdm(SDM_WRITE)]

GPRS = (
    *("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi"),
    *(f"r{number}" for number in range(8, 16)),
)
RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI = range(8)
FS, GS = 4, 5
OPCODES = {"vmread": b"\x0f\x78", "vmwrite": b"\x0f\x79"}
#: A field that hypervisors emulate themselves, and one that they may leave to the processor.
FIELDS = (Field.HOST_IA32_SYSENTER_ESP, Field.GUEST_RSP)
VALUE = 0x1122334455667788
OLD = 0xA5A5A5A5A5A5A5A5
BOTH = pytest.mark.parametrize("name", list(OPCODES))


def check_operand(
    l1: L1, name: str, memory: Memory, address: int, regs: dict[str, int], field: Field = FIELDS[0]
) -> None:
    """Execute a VMREAD or VMWRITE whose operand is to be found at ``address``."""
    used = {memory.base, memory.index, RSP}
    register = next(n for n in (RDX, RAX, RCX, 8) if n not in used)
    text = memory.encode(OPCODES[name], register)
    what = f"{name} {memory}"
    l1.write(address - 8, b"\x5a" * 24)
    l1.write_int(address, VALUE)
    assert l1.vmwrite(field, VALUE ^ 1 if name == "vmread" else OLD) == Succeed()
    how = {key: value for key, value in regs.items() if key != "rsp"}
    how[GPRS[register]] = field
    seen = l1.call(text, regs=how, rsp=regs.get("rsp", l1.sym("snippet_stack_top")))
    assert seen == Succeed(), what
    assert seen.rflags & STATUS_FLAGS == 0, what
    if name == "vmread":
        assert l1.read_int(address) == VALUE ^ 1, what
    else:
        assert l1.vmread(field) == Succeed(VALUE), what
    assert l1.read(address - 8, 8) + l1.read(address + 8, 8) == b"\x5a" * 16, what


def test_each_base_register(l1: L1) -> None:
    """Each register as base, without displacement and with one of 8 and of 32 bits."""
    l1.launchable().flush()
    address = l1.alloc() + 0x800
    for name in OPCODES:
        for base in range(16):
            for displacement in (0, 0x18, -0x40, -0x7FFFFFF0):
                memory = Memory(base=base, displacement=displacement)
                for field in FIELDS:
                    regs = {GPRS[base]: address - displacement}
                    check_operand(l1, name, memory, address, regs, field)


def test_each_index_register(l1: L1) -> None:
    """Each register but RSP as index, with every scale; a negative index, too."""
    l1.launchable().flush()
    address = l1.alloc() + 0x800
    for name in OPCODES:
        for index in (n for n in range(16) if n != RSP):
            base = RBX if index != RBX else RBP
            scale = index % 4
            memory = Memory(base=base, index=index, scale=scale, displacement=0x10)
            for number in (3, -5):
                start = address - 0x10 - (number << scale)
                check_operand(l1, name, memory, address, {GPRS[base]: start, GPRS[index]: number})
        for scale in range(4):
            memory = Memory(index=RSI, scale=scale, displacement=0x40)
            check_operand(l1, name, memory, address, {"rsi": (address - 0x40) >> scale})


def test_no_register(l1: L1) -> None:
    """An absolute displacement, and one relative to RIP."""
    l1.launchable().flush()
    address = l1.alloc() + 0x800
    for name in OPCODES:
        check_operand(l1, name, Memory(displacement=address), address, {})
        length = len(Memory(relative=True).encode(OPCODES[name], RDX))
        relative = address - (l1.sym("snippet_code") + length)
        check_operand(l1, name, Memory(relative=True, displacement=relative), address, {})


@BOTH
def test_segment_base(l1: L1, name: str) -> None:
    """FS and GS add their base, up to 64 bits of it; the other prefixes add nothing."""
    l1.launchable().flush()
    address = l1.alloc() + 0x800
    bases = (0x1000, 0x123456, (1 << 64) - 0x2000, 0x7FFFFFFFF000)
    for segment, base in itertools.product((FS, GS), bases):
        msr = Msr.FS_BASE if segment == FS else Msr.GS_BASE
        assert l1.wrmsr(msr, base) == Succeed()
        for memory in (
            Memory(base=RDI, segment=segment),
            Memory(base=11, displacement=-0x20, segment=segment),
        ):
            offset = address - base - memory.displacement
            check_operand(l1, name, memory, address, {GPRS[memory.base or 0]: offset})
        for other in (None, 0, 1, 2, 3, FS + GS - segment):
            check_operand(l1, name, Memory(base=RSI, segment=other), address, {"rsi": address})
        assert l1.wrmsr(msr, 0) == Succeed()


@BOTH
def test_32_bit_addresses(l1: L1, name: str) -> None:
    """With 32-bit address size the effective address loses its upper half, then FS is added."""
    l1.launchable().flush()
    address = l1.alloc() + 0x800
    garbage = 0xABCD123400000000
    check_operand(l1, name, Memory(base=RDI, address_size=32), address, {"rdi": garbage | address})
    wrapping = Memory(base=9, displacement=0x1000, address_size=32)
    check_operand(l1, name, wrapping, address, {"r9": garbage | (address - 0x1000) & 0xFFFFFFFF})
    negative = Memory(base=RBX, displacement=-0x10, address_size=32)
    check_operand(l1, name, negative, address, {"rbx": garbage | address + 0x10})
    scaled = Memory(base=RBX, index=RCX, scale=3, displacement=-8, address_size=32)
    check_operand(l1, name, scaled, address, {"rbx": address + 0x10, "rcx": 0x1FFFFFFF})
    base = (1 << 64) - 0x1000
    assert l1.wrmsr(Msr.FS_BASE, base) == Succeed()
    memory = Memory(base=RDI, displacement=0x10, segment=FS, address_size=32)
    check_operand(l1, name, memory, address, {"rdi": garbage | address + 0x1000 - 0x10})
    assert l1.wrmsr(Msr.FS_BASE, 0) == Succeed()


@BOTH
def test_not_canonical(l1: L1, name: str) -> None:
    """The sum of all parts must be canonical: #GP(0), or #SS(0) where SS is the segment."""
    l1.launchable().flush()
    for address in not_canonical(l1):
        for memory, vector in (
            (Memory(base=RDI), Vector.GP),
            (Memory(base=RDI, displacement=0x10), Vector.GP),
            (Memory(base=RBP, displacement=0x10), Vector.SS),
            (Memory(base=RDI, segment=2), Vector.GP),
            (Memory(base=12), Vector.GP),
        ):
            text = memory.encode(OPCODES[name], RDX)
            assert memory.base is not None
            start = address - memory.displacement
            regs = {GPRS[memory.base]: start, "rdx": int(Field.HOST_RSP)}
            # In 64-bit mode a prefix for ES, CS, SS or DS is ignored, also for the fault.
            seen = l1.call(text, regs=regs)
            assert seen == Fault(vector, error_code=0, rip=0), f"{memory} at {start:#x}"


@BOTH
def test_base_makes_it_not_canonical(l1: L1, name: str) -> None:
    """An offset that is canonical and a base that is, with a sum that is not: #GP(0)."""
    l1.launchable().flush()
    assert l1.wrmsr(Msr.FS_BASE, 0x7FFFFFFFF000) == Succeed()
    text = Memory(base=RDI, segment=FS).encode(OPCODES[name], RDX)
    regs = {"rdi": 0x1000, "rdx": int(Field.HOST_RSP)}
    assert l1.call(text, regs=regs) == Fault(Vector.GP, error_code=0, rip=0)
    assert l1.wrmsr(Msr.FS_BASE, 0) == Succeed()


@BOTH
def test_register_operands(l1: L1, name: str) -> None:
    """Every pair of registers: r8 to r15, RSP, and both the same."""
    l1.launchable().flush()
    field = FIELDS[0]
    pairs = [(n, (n * 7 + 3) % 16) for n in range(16)] + [(RSP, RAX), (15, RSP)]
    for operand, number in pairs:
        rex = 0x40 | (number >> 3) << 2 | operand >> 3
        modrm = 0xC0 | (number & 7) << 3 | operand & 7
        text = bytes([rex]) + OPCODES[name] + bytes([modrm])
        assert l1.vmwrite(field, VALUE) == Succeed()
        regs = {GPRS[operand]: 0x7000, GPRS[number]: int(field)}
        rsp = regs.pop("rsp", l1.sym("snippet_stack_top"))
        # The stack pointer is free here: the snippet does not use it.
        seen = l1.call(text, regs=regs, rsp=rsp)
        assert seen == Succeed(), f"operand {operand}, field {number}"
        assert seen.rflags & STATUS_FLAGS == 0
        if name == "vmwrite":
            assert l1.vmread(field) == Succeed(0x7000), f"operand {operand}, field {number}"
        elif operand != RSP:
            assert seen.regs[GPRS[operand]] == VALUE, f"operand {operand}, field {number}"


@pytest.mark.sdm(SDM_WRITE)
def test_vmwrite_of_its_own_field_number(l1: L1) -> None:
    """VMWRITE RAX, RAX writes the encoding; VMREAD RAX, RAX overwrites it."""
    l1.launchable().flush()
    field = FIELDS[0]
    assert l1.call(b"\x0f\x79\xc0", regs={"rax": int(field)}) == Succeed()
    seen = l1.call(b"\x0f\x78\xc0", regs={"rax": int(field)})
    assert seen == Succeed()
    assert seen.regs["rax"] == field


@pytest.mark.sdm(SDM_READ)
@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
def test_fault_comes_before_any_effect(l1: L1, field: Field) -> None:
    """A VMREAD to an unmapped address faults at its own RIP with its flags as they were."""
    l1.launchable().flush()
    text = Memory(base=RDI, displacement=8).encode(OPCODES["vmread"], RDX)
    for rflags in (2, 2 | STATUS_FLAGS):
        regs = {"rdi": 0x40000118, "rdx": int(field)}
        seen = l1.call(b"\x90" + text, regs=regs, rflags=rflags)
        assert seen == Fault(Vector.PF, error_code=2, cr2=0x40000120, rip=1)
        assert seen.rflags & STATUS_FLAGS == rflags & STATUS_FLAGS


@pytest.mark.sdm("VMPTRST - Store Pointer to Virtual-Machine Control Structure")
def test_vmcs_pointer_operands(l1: L1) -> None:
    """VMCLEAR, VMPTRLD and VMPTRST with a scaled index, FS base, RIP and RSP."""
    vmcs = l1.launchable()
    vmcs.flush()
    address = l1.alloc() + 0x800
    other = l1.prepare_region(l1.sym("vmcs_b"))
    assert l1.wrmsr(Msr.FS_BASE, 0x2000) == Succeed()
    forms: list[tuple[Memory, dict[str, int]]] = [
        (Memory(base=13, index=10, scale=3, displacement=-8), {"r13": address, "r10": 1}),
        (Memory(base=RDI, segment=FS), {"rdi": address - 0x2000}),
        (Memory(displacement=address), {}),
        (Memory(base=RDX, address_size=32), {"rdx": 0xFFFFFFFF00000000 | address}),
        (Memory(base=RSP, displacement=0x10), {"rsp": address - 0x10}),
    ]
    for memory, given in forms:
        regs = dict(given)
        rsp = regs.pop("rsp", l1.sym("snippet_stack_top"))
        for prefix, number in ((b"\x66", 6), (b"", 6)):
            l1.write_int(address, other)
            text = memory.encode(b"\x0f\xc7", number, prefix=prefix)
            assert l1.call(text, regs=regs, rsp=rsp) == Succeed(), str(memory)
        l1.write_int(address, 0)
        text = memory.encode(b"\x0f\xc7", 7)
        seen = l1.call(text, regs=regs, rsp=rsp)
        assert seen == Succeed(), str(memory)
        assert seen.rflags & STATUS_FLAGS == 0
        assert l1.read_int(address) == other, str(memory)
        assert l1.vmptrld(vmcs.address) == Succeed()
    assert l1.wrmsr(Msr.FS_BASE, 0) == Succeed()
