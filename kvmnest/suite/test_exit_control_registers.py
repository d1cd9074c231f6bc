"""CR0, CR3 and CR4 of L2: masks, read shadows, CLTS, LMSW, SMSW, and CR3 exiting."""

import itertools

import pytest

from kvmnest.l1 import L1, code
from kvmnest.suite.support.guest import Guest, Masked
from kvmnest.vmx import (
    Cr0,
    Cr4,
    CrAccess,
    CrAccessType,
    ExitReason,
    Field,
    ProcCtl,
    Vector,
)
from kvmnest.vmx.outcome import Exit, Fault, Succeed

pytestmark = [
    pytest.mark.series(19),
    pytest.mark.sdm("Guest/Host Masks and Read Shadows for CR0 and CR4"),
]

GPRS = (
    *("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi"),
    *(f"r{number}" for number in range(8, 16)),
)
CR0_BITS = (Cr0.PE, Cr0.MP, Cr0.EM, Cr0.TS, Cr0.NE, Cr0.WP, Cr0.AM, Cr0.NW, Cr0.CD, Cr0.PG)
CR4_BITS = (
    *(Cr4.VME, Cr4.PVI, Cr4.TSD, Cr4.DE, Cr4.PSE, Cr4.PAE, Cr4.MCE, Cr4.PGE, Cr4.PCE),
    *(Cr4.OSFXSR, Cr4.OSXMMEXCPT, Cr4.UMIP, Cr4.VMXE, Cr4.FSGSBASE, Cr4.PCIDE, Cr4.OSXSAVE),
    *(Cr4.SMEP, Cr4.SMAP),
)
MOV_FROM_CR = CrAccessType.MOV_FROM_CR
SMSW_EAX = b"\x0f\x01\xe0"
LMSW_AX = b"\x0f\x01\xf0"
LMSW_MEMORY = b"\x0f\x01\x37"  # LMSW [RDI]
FIELDS = {
    0: (Field.GUEST_CR0, "CR0_GUEST_HOST_MASK", "CR0_READ_SHADOW"),
    4: (Field.GUEST_CR4, "CR4_GUEST_HOST_MASK", "CR4_READ_SHADOW"),
}


def _cr_exit(
    guest: Guest,
    cr: int,
    kind: CrAccessType = CrAccessType.MOV_TO_CR,
    *,
    register: int = 0,
    source: int = 0,
    length: int = 3,
    offset: int = 0,
) -> Exit:
    qualification = CrAccess(cr, kind, register, lmsw_source=source).encode()
    return guest.exit(ExitReason.CR_ACCESS, length, offset=offset, qualification=qualification)


@pytest.mark.parametrize("cr", [0, 4], ids=["CR0", "CR4"])
def test_owned_bit(l1: L1, cr: int) -> None:
    """L2 reads the shadow of each bit that L1 owns; only a write that differs from it exits."""
    guest = Guest(l1)
    field, mask, shadow = FIELDS[cr]
    real = guest.vmcs[field]
    may = l1.caps.cr0_fixed1 if cr == 0 else l1.caps.cr4_fixed1
    for bit in CR0_BITS if cr == 0 else CR4_BITS:
        if not may & bit:
            continue
        # The shadow of the bit is the opposite of the register, other shadow bits do not count.
        owned: dict[str, int] = {mask: bit, shadow: ~real & 0xFFFFFFFF, field.name: real}
        seen = guest.run(code.mov_from_cr(cr), **owned)
        assert seen == Succeed(), repr(bit)
        assert seen.regs["rax"] == real ^ bit, repr(bit)
        # What was read may be written back, which changes nothing.
        seen = guest.run(code.mov_to_cr(cr) + code.mov_from_cr(cr), {"rax": real ^ bit}, **owned)
        assert seen == Succeed(), repr(bit)
        assert seen.regs["rax"] == real ^ bit
        assert guest.vmcs.read(field) == (real,)
        # The register's own value differs from the shadow.
        seen = guest.run(code.mov_to_cr(cr), {"rax": real}, **owned)
        assert seen == _cr_exit(guest, cr), repr(bit)
        assert guest.changed(seen) == {}
        assert guest.vmcs.read(field) == (real,)


@pytest.mark.sdm("Exit Qualification for Control-Register Accesses")
@pytest.mark.parametrize("cr", [0, 3, 4], ids=["CR0", "CR3", "CR4"])
def test_general_register_in_the_qualification(l1: L1, cr: int) -> None:
    """The qualification names the general register of a MOV to or from a control register."""
    guest = Guest(l1, ProcCtl.CR3_LOAD_EXITING, ProcCtl.CR3_STORE_EXITING)
    fields = {FIELDS[cr][1]: 0xFFFFFFFF, FIELDS[cr][2]: 0} if cr != 3 else {}
    for number, name in enumerate(GPRS):
        instruction = code.mov_to_cr(cr, name)
        seen = guest.run(instruction, **fields)
        assert seen == _cr_exit(guest, cr, register=number, length=len(instruction)), name
        assert guest.changed(seen) == {}
        if cr == 3:
            instruction = code.mov_from_cr(3, name)
            seen = guest.run(instruction)
            assert seen == _cr_exit(
                guest, 3, MOV_FROM_CR, register=number, length=len(instruction)
            ), name
            assert guest.changed(seen) == {}


def test_reading_cr0_and_cr4_never_exits(l1: L1) -> None:
    """MOV from CR0 or CR4 and SMSW give the shadow for every bit that L1 owns, without an exit."""
    guest = Guest(l1)
    fields = {"CR0_GUEST_HOST_MASK": 0xFFFFFFFF, "CR4_GUEST_HOST_MASK": 0xFFFFFFFF}
    for pattern in (0, 0xFFFFFFFF, 0xA5A5A5A5):
        fields |= {"CR0_READ_SHADOW": pattern, "CR4_READ_SHADOW": pattern ^ 0xFF}
        seen = guest.run(
            code.mov_from_cr(0, "r9") + code.mov_from_cr(4, "r10") + SMSW_EAX, **fields
        )
        assert seen == Succeed()
        assert (seen.regs["r9"], seen.regs["r10"]) == (pattern, pattern ^ 0xFF)
        assert seen.regs["rax"] & 0xFFFF == pattern & 0xFFFF
        assert guest.changed(seen, "rax", "r9", "r10") == {}


def test_write_of_own_bits(l1: L1) -> None:
    """Bits outside the mask are L2's: a write takes effect and is saved at the exit."""
    guest = Guest(l1)
    cr0, cr4 = guest.vmcs[Field.GUEST_CR0], guest.vmcs[Field.GUEST_CR4]
    write = code.mov_to_cr(0) + code.mov_to_cr(4, "rcx")
    read = code.mov_from_cr(0, "r8") + code.mov_from_cr(4, "r9")
    changes = [
        *((bit, 0) for bit in (Cr0.MP, Cr0.EM, Cr0.TS, Cr0.WP, Cr0.AM, Cr0.CD)),
        *((0, bit) for bit in (Cr4.DE, Cr4.TSD, Cr4.PGE, Cr4.MCE, Cr4.OSXMMEXCPT)),
        (Cr0.CD | Cr0.NW, Cr4.VME | Cr4.PVI | Cr4.OSFXSR),
    ]
    for bits0, bits4 in changes:
        wanted = cr0 ^ bits0, cr4 ^ bits4
        regs = {"rax": wanted[0], "rcx": wanted[1]}
        seen = guest.run(write + read, regs, GUEST_CR0=cr0, GUEST_CR4=cr4)
        assert seen == Succeed(), f"CR0 {wanted[0]:#x} CR4 {wanted[1]:#x}"
        assert (seen.regs["r8"], seen.regs["r9"]) == wanted
        assert guest.vmcs.read(Field.GUEST_CR0, Field.GUEST_CR4) == wanted


@pytest.mark.needs(Cr4.SMEP)
def test_smep(l1: L1) -> None:
    """CR4.SMEP that L2 sets is in force at once: its own code lies in user pages."""
    guest = Guest(l1)
    cr4 = guest.vmcs[Field.GUEST_CR4] | Cr4.SMEP
    seen = guest.run(code.mov_to_cr(4) + code.NOP, {"rax": cr4}, EXCEPTION_BITMAP=1 << Vector.PF)
    assert seen == guest.exception(Vector.PF, 0x11, offset=3, qualification=guest.at(3))
    assert guest.vmcs.read(Field.GUEST_CR4) == (cr4,)


def test_owned_bits_survive_a_write_of_others(l1: L1) -> None:
    """A write that changes L2's bits leaves L1's as they are, and their shadow readable."""
    guest = Guest(l1)
    cr0, cr4 = guest.vmcs[Field.GUEST_CR0], guest.vmcs[Field.GUEST_CR4]
    # TS is 0 and reads as 1: FNINIT behind the write must not be #NM.
    owned: dict[str, int] = {"CR0_GUEST_HOST_MASK": Cr0.TS, "CR0_READ_SHADOW": Cr0.TS}
    for bit in (Cr0.AM, Cr0.MP, Cr0.WP, Cr0.CD):
        seen = guest.run(
            code.mov_to_cr(0) + b"\xdb\xe3" + code.mov_from_cr(0, "rcx"),
            {"rax": cr0 ^ bit | Cr0.TS},
            GUEST_CR0=cr0,
            **owned,
        )
        assert seen == Succeed(), repr(bit)
        assert seen.regs["rcx"] == cr0 ^ bit | Cr0.TS
        assert guest.vmcs.read(Field.GUEST_CR0) == (cr0 ^ bit,)
    guest.vmcs[Field.GUEST_CR0] = cr0
    owned = {"CR4_GUEST_HOST_MASK": Cr4.DE, "CR4_READ_SHADOW": Cr4.DE}
    for bit4 in (Cr4.MCE, Cr4.VME, Cr4.PGE, Cr4.OSFXSR):
        seen = guest.run(
            code.mov_to_cr(4) + code.mov_from_cr(4, "rcx"),
            {"rax": cr4 ^ bit4 | Cr4.DE},
            GUEST_CR4=cr4,
            **owned,
        )
        assert seen == Succeed(), repr(bit4)
        assert seen.regs["rcx"] == cr4 ^ bit4 | Cr4.DE
        assert guest.vmcs.read(Field.GUEST_CR4) == (cr4 ^ bit4,)


@pytest.mark.sdm("Instructions That Cause VM Exits Conditionally")
def test_clts(l1: L1) -> None:
    """CLTS exits only when L1 owns TS and its shadow is 1; a TS that L1 owns is never cleared."""
    guest = Guest(l1)
    cr0 = guest.vmcs[Field.GUEST_CR0] & ~Cr0.TS
    for mask, shadow, real in itertools.product((0, Cr0.TS), repeat=3):
        seen = guest.run(
            code.CLTS,
            {},
            GUEST_CR0=cr0 | real,
            CR0_GUEST_HOST_MASK=mask,
            CR0_READ_SHADOW=shadow,
        )
        text = f"mask {mask:#x} shadow {shadow:#x} CR0.TS {real:#x}"
        if mask and shadow:
            assert seen == _cr_exit(guest, 0, CrAccessType.CLTS, length=2), text
        else:
            assert seen == Succeed(), text
        assert guest.vmcs.read(Field.GUEST_CR0) == (cr0 | (real if mask else 0),), text


@pytest.mark.sdm("Instructions That Cause VM Exits Conditionally")
def test_lmsw(l1: L1) -> None:
    """LMSW exits if it would set an owned PE, or write an owned MP, EM or TS unlike its shadow."""
    guest = Guest(l1)
    cr0 = guest.vmcs[Field.GUEST_CR0] & ~(Cr0.TS | Cr0.EM | Cr0.MP)
    sample = [(1 << bit, s << bit, v << bit)
              for bit in range(4) for s, v in itertools.product((0, 1), repeat=2)]  # fmt: skip
    sample += [(0, 0xF, 0), (0, 0, 0xE), (0xF, 0, 0xFFF0), (0xE, 0xA, 0xB), (0xF, 0xA, 0xB)]
    sample += [(0xF, 0xF, 0xE), (0x6, 0x9, 0x8), (0xC, 0x4, 0x5), (0xC, 0x4, 0x9)]
    for mask, shadow, value in sample:
        text = f"mask {mask:#x} shadow {shadow:#x} source {value:#x}"
        seen = guest.run(
            LMSW_AX,
            {"rax": value},
            GUEST_CR0=cr0,
            CR0_GUEST_HOST_MASK=mask,
            CR0_READ_SHADOW=shadow,
        )
        differs = mask & (value ^ shadow) & 0xE
        if differs or mask & value & ~shadow & 1:
            expected = _cr_exit(guest, 0, CrAccessType.LMSW, source=value)
            assert seen == expected, text
            after = cr0
        else:
            assert seen == Succeed(), text
            after = cr0 | value & 0xE & ~mask
        assert guest.changed(seen) == {}
        assert guest.vmcs.read(Field.GUEST_CR0) == (after,), text


@pytest.mark.sdm("Exit Qualification for Control-Register Accesses")
def test_lmsw_from_memory(l1: L1) -> None:
    """LMSW from memory sets bit 6 of the qualification and gives the linear address."""
    guest = Guest(l1)
    data = l1.sym("l2_data")
    l1.write_int(data, 0xABC8, 2)
    fields: dict[str, int] = {"CR0_GUEST_HOST_MASK": Cr0.TS, "CR0_READ_SHADOW": 0}
    qualification = CrAccess(0, CrAccessType.LMSW, lmsw_memory=True, lmsw_source=0xABC8).encode()
    seen = guest.run(LMSW_MEMORY, {"rdi": data}, **fields)
    assert seen == guest.exit(ExitReason.CR_ACCESS, 3, qualification=qualification, linear=data)
    seen = guest.run(b"\x64" + LMSW_MEMORY, {"rdi": data - 0x500}, GUEST_FS_BASE=0x500, **fields)
    assert seen == guest.exit(ExitReason.CR_ACCESS, 4, qualification=qualification, linear=data)
    assert guest.changed(seen) == {}
    # The operand is read first: a page fault on it wins.
    seen = guest.run(LMSW_MEMORY, {"rdi": 0x50000000}, **fields)
    assert seen == Fault(Vector.PF, error_code=0, rip=0)


# --- CR3 ---


@pytest.mark.sdm("Instructions That Cause VM Exits Conditionally")
@pytest.mark.parametrize("ept", [None, False], ids=["default-paging", "shadow-paging"])
def test_cr3_exiting(l1: L1, ept: bool | None) -> None:
    """MOV to and from CR3 exit by their controls, and else act on L2's own CR3."""
    guest = Guest(l1, ept=ept)
    old = guest.vmcs[Field.GUEST_CR3]
    new = l1.alloc()
    l1.write(new, l1.read(old, 4096))
    both = code.mov_from_cr(3, "rbx") + code.mov_to_cr(3, "rcx") + code.mov_from_cr(3, "rdx")
    guest.off(ProcCtl.CR3_LOAD_EXITING, ProcCtl.CR3_STORE_EXITING)
    if not guest.vmcs[Field.CPU_BASED_VM_EXEC_CONTROL] & ProcCtl.CR3_LOAD_EXITING:
        seen = guest.run(both, {"rcx": new})
        assert seen == Succeed()
        assert guest.changed(seen) == {"rbx": old, "rdx": new}
        assert guest.vmcs.read(Field.GUEST_CR3) == (new,)
    guest.on(ProcCtl.CR3_LOAD_EXITING)
    seen = guest.run(both, {"rcx": new}, GUEST_CR3=old)
    assert seen == _cr_exit(guest, 3, register=1, offset=3)
    assert guest.changed(seen) == {"rbx": old}
    assert guest.vmcs.read(Field.GUEST_CR3) == (old,)
    # Not even a load of the same value goes without an exit.
    assert guest.run(both, {"rcx": old}) == _cr_exit(guest, 3, register=1, offset=3)
    guest.on(ProcCtl.CR3_STORE_EXITING)
    guest.off(ProcCtl.CR3_LOAD_EXITING)
    seen = guest.run(both, {"rcx": new})
    assert seen == _cr_exit(guest, 3, MOV_FROM_CR, register=3)
    assert guest.changed(seen) == {}
    # L1 skips the store; the load then happens.
    seen = guest.go_on(skip=3)
    assert seen == _cr_exit(guest, 3, MOV_FROM_CR, register=2, offset=6)
    assert guest.vmcs.read(Field.GUEST_CR3) == (new,)


@pytest.mark.needs(Field.CR3_TARGET_VALUE0)
@pytest.mark.sdm("CR3-Target Controls")
def test_cr3_target(l1: L1) -> None:
    """A load of a CR3-target value does not exit; one beyond the count does not help."""
    guest = Guest(l1, ProcCtl.CR3_LOAD_EXITING)
    old = guest.vmcs[Field.GUEST_CR3]
    new = l1.alloc()
    l1.write(new, l1.read(old, 4096))
    load = code.mov_to_cr(3)
    guest.vmcs[Field.CR3_TARGET_VALUE0] = new
    assert guest.run(load, {"rax": new}, CR3_TARGET_COUNT=1) == Succeed()
    assert guest.vmcs.read(Field.GUEST_CR3) == (new,)
    assert guest.run(load, {"rax": old}) == _cr_exit(guest, 3)
    assert guest.run(load, {"rax": new}, CR3_TARGET_COUNT=0) == _cr_exit(guest, 3)


@pytest.mark.sdm("Changes to Instruction Behavior in VMX Non-Root Operation")
def test_fixed_and_reserved_bits(l1: L1) -> None:
    """A value that VMX operation does not support is #GP(0) for L2 and changes nothing."""
    guest = Guest(l1)
    cr0, cr4 = guest.vmcs[Field.GUEST_CR0], guest.vmcs[Field.GUEST_CR4]
    general = Fault(Vector.GP, error_code=0, rip=0)
    for value in (cr0 & ~Cr0.NE, cr0 & ~Cr0.PE, cr0 ^ Cr0.NW, cr0 | 1 << 32):
        assert guest.run(code.mov_to_cr(0), {"rax": value}) == general, f"CR0 {value:#x}"
    for value in (cr4 & ~Cr4.VMXE, cr4 & ~Cr4.PAE, cr4 | 1 << 15, cr4 | 1 << 40):
        assert guest.run(code.mov_to_cr(4), {"rax": value}) == general, f"CR4 {value:#x}"
    assert guest.vmcs.read(Field.GUEST_CR0, Field.GUEST_CR4) == (cr0, cr4)
    # Where L1 owns a bit that is written unlike its shadow, L1 gets the exit first.
    seen = guest.run(
        code.mov_to_cr(0),
        {"rax": cr0 & ~Cr0.NE},
        CR0_GUEST_HOST_MASK=Cr0.NE,
        CR0_READ_SHADOW=cr0,
    )
    assert seen == _cr_exit(guest, 0)
    seen = guest.run(
        code.mov_to_cr(4),
        {"rax": cr4 & ~Cr4.VMXE},
        CR4_GUEST_HOST_MASK=Cr4.VMXE,
        CR4_READ_SHADOW=cr4,
    )
    assert seen == _cr_exit(guest, 4)
    # And with the shadow's value there is no fault: the register keeps the bit.
    seen = guest.run(code.mov_to_cr(4), {"rax": cr4 & ~Cr4.VMXE}, CR4_READ_SHADOW=0)
    assert seen == Succeed()
    assert guest.vmcs.read(Field.GUEST_CR4) == (cr4,)


def test_upper_half_of_a_mask(l1: L1) -> None:
    """Masks and shadows are 64 bits wide: an owned bit 32 to 63 compares as the others do."""
    guest = Guest(l1)
    cr4 = guest.vmcs[Field.GUEST_CR4]
    seen = guest.run(
        code.mov_to_cr(4),
        {"rax": cr4 | 1 << 40},
        CR4_GUEST_HOST_MASK=1 << 40,
        CR4_READ_SHADOW=0,
    )
    assert seen == _cr_exit(guest, 4)
    seen = guest.run(code.mov_from_cr(4), CR4_READ_SHADOW=1 << 40)
    assert seen == Succeed()
    assert seen.regs["rax"] == Masked(cr4 | 1 << 40, ~0)
