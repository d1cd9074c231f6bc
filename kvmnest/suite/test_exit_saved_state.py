"""VM exits save L2's state: registers, segments, MSRs and what is not a register."""

from __future__ import annotations

import pytest

from kvmnest.l1 import L1, L2Mode, code
from kvmnest.suite.support.bitmaps import set_msr_bitmap
from kvmnest.suite.support.guest import Guest
from kvmnest.vmx import (
    Cr0,
    Cr4,
    DebugCtl,
    Efer,
    EntryCtl,
    ExitCtl,
    ExitReason,
    Field,
    Kind,
    Msr,
    Proc2Ctl,
    ProcCtl,
    Rflags,
)
from kvmnest.vmx.outcome import Exit, Succeed
from kvmnest.vmx.registers import PAT_RESET, STATUS_FLAGS

pytestmark = [pytest.mark.series(18), pytest.mark.sdm("Saving Guest State")]

#: Selector of descriptors that these cases add to the table.
SPARE = 0x80
PUSH_POPFQ = b"\x50\x9d"  # PUSH RAX; POPFQ


def _open_guest(l1: L1, *flags: EntryCtl | ExitCtl) -> Guest:
    """L2 whose RDMSR and WRMSR do not exit."""
    guest = Guest(l1, ProcCtl.USE_MSR_BITMAPS, *flags)
    set_msr_bitmap(l1)
    return guest


def _wrmsr(msr: int, value: int) -> tuple[bytes, dict[str, int]]:
    regs = {"rcx": msr, "rax": value & 0xFFFFFFFF, "rdx": value >> 32}
    return code.WRMSR, regs


def _spare_descriptor(guest: Guest, *descriptors: int) -> int:
    """Give L2 a copy of the GDT with these descriptors behind it; the first one's selector."""
    l1, vmcs = guest.l1, guest.vmcs
    base = vmcs.baseline[Field.GUEST_GDTR_BASE]
    table = l1.alloc()
    l1.write(table, l1.read(base, vmcs.baseline[Field.GUEST_GDTR_LIMIT] + 1))
    for number, descriptor in enumerate(descriptors):
        l1.write_int(table + SPARE + 8 * number, descriptor)
    vmcs[Field.GUEST_GDTR_BASE] = table
    vmcs[Field.GUEST_GDTR_LIMIT] = SPARE + 8 * len(descriptors) - 1
    return SPARE


@pytest.mark.sdm("Saving Control Registers, Debug Registers, and MSRs")
def test_control_registers(l1: L1) -> None:
    """CR0, CR3 and CR4 are saved as L2 left them where the masks give the bits to L2."""
    guest = Guest(l1)
    cr0, cr3, cr4 = guest.vmcs.read(Field.GUEST_CR0, Field.GUEST_CR3, Field.GUEST_CR4)
    table = l1.alloc()
    l1.write(table, l1.read(cr3, 4096))
    program = code.mov_to_cr(0, "rax") + code.mov_to_cr(3, "rbx") + code.mov_to_cr(4, "rcx")
    for bits0, bits4, page in (
        (Cr0.AM | Cr0.TS, Cr4.DE, table),
        (Cr0.MP, Cr4.PGE | Cr4.TSD, cr3),
        (Cr0.EM | Cr0.AM, Cr4.PSE | Cr4.MCE, table),
        (0, 0, cr3),
    ):
        want0 = cr0 & ~(Cr0.MP | Cr0.AM) | bits0
        seen = guest.run(
            program,
            {"rax": want0, "rbx": page, "rcx": cr4 | bits4},
            CR0_GUEST_HOST_MASK=0,
            CR4_GUEST_HOST_MASK=0,
        )
        assert seen == Succeed()
        saved = guest.vmcs.read(Field.GUEST_CR0, Field.GUEST_CR3, Field.GUEST_CR4)
        assert saved == (want0, page, cr4 | bits4)
    # The next entry starts from the saved values.
    read = code.mov_from_cr(0, "rax") + code.mov_from_cr(3, "rbx") + code.mov_from_cr(4, "rcx")
    seen = guest.run(read)
    assert (seen.regs["rax"], seen.regs["rbx"], seen.regs["rcx"]) == (want0, page, cr4)


@pytest.mark.sdm("Saving RIP, RSP, RFLAGS, and SSP")
def test_rip_rsp_rflags(l1: L1) -> None:
    """RIP is the exiting instruction's, RSP and RFLAGS are as before it."""
    guest = Guest(l1)
    rsp = l1.sym("l2_stack_top")
    for flags in (
        0x2,
        0x2 | STATUS_FLAGS,
        0x2 | Rflags.DF | Rflags.IF | Rflags.ID,
        0x3002 | Rflags.AC,
    ):
        # PUSH RAX; POPFQ; PUSH RAX
        seen = guest.run(PUSH_POPFQ + b"\x50", {"rax": flags})
        assert seen == Succeed()
        saved = guest.vmcs.read(Field.GUEST_RIP, Field.GUEST_RSP, Field.GUEST_RFLAGS)
        assert saved == (guest.at(3), rsp - 8, flags), hex(flags)


@pytest.mark.sdm("Saving RIP, RSP, RFLAGS, and SSP")
def test_resume_flag(l1: L1) -> None:
    """RF as the guest-state area gave it is gone after one instruction."""
    guest = Guest(l1)
    assert guest.run(code.NOP, GUEST_RFLAGS=0x2 | Rflags.RF) == Succeed()
    assert guest.vmcs.read(Field.GUEST_RFLAGS) == (0x2,)


@pytest.mark.sdm("Saving Control Registers, Debug Registers, and MSRs")
def test_sysenter_msrs(l1: L1) -> None:
    """The SYSENTER MSRs that L2 wrote are saved, and there at the next entry."""
    guest = _open_guest(l1)
    values = {
        Msr.SYSENTER_CS: (Field.GUEST_SYSENTER_CS, 0x1238),
        Msr.SYSENTER_ESP: (Field.GUEST_SYSENTER_ESP, 0x7FFFFFFFE000),
        Msr.SYSENTER_EIP: (Field.GUEST_SYSENTER_EIP, 0xFFFF800000123456),
    }
    for msr, (_, value) in values.items():
        assert guest.run(*_wrmsr(msr, value)) == Succeed()
    for msr, (field, value) in values.items():
        assert guest.vmcs.read(field) == (value,), msr.name
        # L1 has its own.
        assert l1.rdmsr(msr) == Succeed(0)
        seen = guest.run(code.RDMSR, {"rcx": msr})
        assert seen.regs["rdx"] << 32 | seen.regs["rax"] == value, msr.name


@pytest.mark.needs(ExitCtl.SAVE_PAT, ExitCtl.LOAD_PAT, EntryCtl.LOAD_PAT)
@pytest.mark.sdm("Saving Control Registers, Debug Registers, and MSRs")
def test_pat(l1: L1) -> None:
    """The PAT is saved when "save IA32_PAT" says so, else the field stays."""
    guest = _open_guest(l1, ExitCtl.LOAD_PAT, EntryCtl.LOAD_PAT)
    first, second = 0x0505050505050505, 0x0006050401000706
    guest.on(ExitCtl.SAVE_PAT)
    assert guest.run(*_wrmsr(Msr.PAT, second), GUEST_IA32_PAT=first) == Succeed()
    assert guest.vmcs.read(Field.GUEST_IA32_PAT) == (second,)
    guest.off(ExitCtl.SAVE_PAT)
    assert guest.run(*_wrmsr(Msr.PAT, second), GUEST_IA32_PAT=first) == Succeed()
    assert guest.vmcs.read(Field.GUEST_IA32_PAT) == (first,)


@pytest.mark.needs(ExitCtl.SAVE_PAT)
@pytest.mark.sdm("Saving Control Registers, Debug Registers, and MSRs")
def test_pat_of_l1(l1: L1) -> None:
    """Without "load IA32_PAT" L2 runs with L1's PAT, and that is saved."""
    guest = _open_guest(l1, ExitCtl.SAVE_PAT)
    guest.off(EntryCtl.LOAD_PAT, ExitCtl.LOAD_PAT)
    for pat in (PAT_RESET, 0x0006050401000706):
        assert l1.wrmsr(Msr.PAT, pat) == Succeed()
        assert guest.run(code.NOP, GUEST_IA32_PAT=0x0505050505050505) == Succeed()
        assert guest.vmcs.read(Field.GUEST_IA32_PAT) == (pat,)


@pytest.mark.needs(ExitCtl.SAVE_EFER, ExitCtl.LOAD_EFER, EntryCtl.LOAD_EFER)
@pytest.mark.sdm("Saving Control Registers, Debug Registers, and MSRs")
def test_efer(l1: L1) -> None:
    """EFER is saved when "save IA32_EFER" says so, else the field stays."""
    guest = _open_guest(l1, ExitCtl.LOAD_EFER, EntryCtl.LOAD_EFER)
    first = Efer.LME | Efer.LMA | Efer.NXE
    guest.on(ExitCtl.SAVE_EFER)
    write = _wrmsr(Msr.IA32_EFER, first | Efer.SCE)
    assert guest.run(*write, GUEST_IA32_EFER=first) == Succeed()
    assert guest.vmcs.read(Field.GUEST_IA32_EFER) == (first | Efer.SCE,)
    guest.off(ExitCtl.SAVE_EFER)
    assert guest.run(*write, GUEST_IA32_EFER=first) == Succeed()
    assert guest.vmcs.read(Field.GUEST_IA32_EFER) == (first,)


@pytest.mark.sdm("Saving Control Registers, Debug Registers, and MSRs")
def test_debug_controls(l1: L1) -> None:
    """DR7 and IA32_DEBUGCTL are saved when "save debug controls" says so."""
    guest = _open_guest(l1, EntryCtl.LOAD_DEBUG_CONTROLS, ExitCtl.SAVE_DEBUG_CONTROLS)
    # KVM takes a write of the bits that it cannot offer and keeps 0.
    assert l1.wrmsr(Msr.DEBUGCTL, DebugCtl.BTF) == Succeed()
    kept = l1.rdmsr(Msr.DEBUGCTL)
    program = code.mov_to_dr(7, "rbx") + code.WRMSR
    regs = {"rbx": 0x455, "rcx": Msr.DEBUGCTL, "rax": DebugCtl.BTF, "rdx": 0}
    assert guest.run(program, regs, GUEST_DR7=0x401) == Succeed()
    saved = guest.vmcs.read(Field.GUEST_DR7, Field.GUEST_IA32_DEBUGCTL)
    assert saved == (0x455, kept.value)
    if l1.caps.supports(ExitCtl.SAVE_DEBUG_CONTROLS) and _may_be_clear(l1):
        guest.off(ExitCtl.SAVE_DEBUG_CONTROLS)
        assert guest.run(program, regs, GUEST_DR7=0x401, GUEST_IA32_DEBUGCTL=0) == Succeed()
        assert guest.vmcs.read(Field.GUEST_DR7, Field.GUEST_IA32_DEBUGCTL) == (0x401, 0)


@pytest.mark.needs(ExitCtl.SAVE_DEBUG_CONTROLS)
@pytest.mark.sdm("Saving Control Registers, Debug Registers, and MSRs")
def test_debugctl_of_l1(l1: L1) -> None:
    """Without "load debug controls" L2 has L1's DR7 and IA32_DEBUGCTL, and these are saved."""
    if l1.caps.clamp(EntryCtl(0)) & EntryCtl.LOAD_DEBUG_CONTROLS:
        pytest.skip("needs EntryCtl.LOAD_DEBUG_CONTROLS that can be 0")
    guest = _open_guest(l1, ExitCtl.SAVE_DEBUG_CONTROLS)
    guest.off(EntryCtl.LOAD_DEBUG_CONTROLS)
    for wrong in (DebugCtl.LBR, DebugCtl.BTF):
        assert l1.write_dr(7, 0x401) == Succeed()
        assert guest.run(code.NOP, GUEST_DR7=0x455, GUEST_IA32_DEBUGCTL=wrong) == Succeed()
        assert guest.vmcs.read(Field.GUEST_DR7, Field.GUEST_IA32_DEBUGCTL) == (0x401, 0)


def _may_be_clear(l1: L1) -> bool:
    return not l1.caps.allowed0(ExitCtl) & ExitCtl.SAVE_DEBUG_CONTROLS


@pytest.mark.sdm("Saving Segment Registers and Descriptor-Table Registers")
def test_data_segments(l1: L1) -> None:
    """Selector, base, limit and rights of DS, ES, FS and GS that L2 loaded are saved."""
    guest = Guest(l1)
    # Base 12345678H, limit 0x9abcd bytes; expand-up read-only, accessed bit clear; DPL 0, AVL.
    plain = (0x12 << 56) | (0x1 << 52) | (0x9 << 48) | (0x90 << 40) | (0x345678 << 16) | 0xABCD
    # 4 KiB granularity, writable, DPL 3, 32-bit.
    big = (0x00 << 56) | (0xC << 52) | (0xF << 48) | (0xF2 << 40) | 0x1234
    selector = _spare_descriptor(guest, plain, big)
    loads = {
        "DS": b"\x8e\xd8",
        "ES": b"\x8e\xc0",
        "FS": b"\x8e\xe0",
        "GS": b"\x8e\xe8",
    }
    for name, load in loads.items():
        fields = [
            Field[f"GUEST_{name}_{part}"] for part in ("SELECTOR", "BASE", "LIMIT", "ACCESS_RIGHTS")
        ]
        assert guest.run(load, {"rax": selector}) == Succeed()
        # The load sets the descriptor's accessed bit.
        assert guest.vmcs.read(*fields) == (selector, 0x12345678, 0x9ABCD, 0x1091), name
        assert guest.run(load, {"rax": selector + 8 | 3}) == Succeed()
        assert guest.vmcs.read(*fields) == (selector + 8 | 3, 0, 0xF1234FFF, 0xC0F3), name
        # A null selector leaves an unusable register.
        assert guest.run(load, {"rax": 0}) == Succeed()
        saved, _, _, rights = guest.vmcs.read(*fields)
        assert (saved, rights >> 16 & 1) == (0, 1), name


@pytest.mark.sdm("Saving Segment Registers and Descriptor-Table Registers")
def test_code_and_stack_segments(l1: L1) -> None:
    """CS and SS after a far return to CPL 3 and one to compatibility mode are saved."""
    guest = Guest(l1)
    for name, rights_cs in (("SEL_USER_CODE64", 0xA0FB), ("SEL_USER_CODE32", 0xC0FB)):
        stack = l1.sym("l2_stack_top") - 64
        target = l1.sym("l2_code") + 0x800
        l1.write(target, code.VMCALL)
        frame = (target, l1.sym(name), 0x2, stack, l1.sym("SEL_USER_DATA"))
        l1.write(stack, b"".join(word.to_bytes(8, "little") for word in frame))
        seen = guest.run(b"\x48\xcf", GUEST_RSP=stack)  # IRETQ
        assert seen == Exit(ExitReason.VMCALL, rip=target, length=3)
        saved = guest.vmcs.read(
            *(Field.GUEST_CS_SELECTOR, Field.GUEST_CS_BASE, Field.GUEST_CS_LIMIT),
            *(Field.GUEST_CS_ACCESS_RIGHTS, Field.GUEST_SS_SELECTOR),
            *(Field.GUEST_SS_ACCESS_RIGHTS, Field.GUEST_RSP),
        )
        data = l1.sym("SEL_USER_DATA")
        assert saved == (l1.sym(name), 0, 0xFFFFFFFF, rights_cs, data, 0xC0F3, stack)
        guest.set_cpl(0)


@pytest.mark.sdm("Saving Segment Registers and Descriptor-Table Registers")
def test_system_segments_and_tables(l1: L1) -> None:
    """LDTR, TR, GDTR and IDTR that L2 loaded are saved."""
    guest = Guest(l1)
    # The first half of an available 64-bit TSS descriptor; the second is base bits 63:32.
    tss = (0x00 << 56) | (0x89 << 40) | (0x345678 << 16) | 0x0123
    selector = _spare_descriptor(guest, tss, 0x7FFF)
    data = l1.sym("l2_data")
    l1.write(data, (0x1FF).to_bytes(2, "little") + (0xFFFF800000001000).to_bytes(8, "little"))
    # LTR AX; LLDT BX; LIDT [RDI]; LGDT [RDI]
    program = b"\x0f\x00\xd8\x0f\x00\xd3\x0f\x01\x1f\x0f\x01\x17"
    regs = {"rax": selector, "rbx": l1.sym("SEL_LDT"), "rdi": data}
    assert guest.run(program, regs) == Succeed()
    parts = ("SELECTOR", "BASE", "LIMIT", "ACCESS_RIGHTS")
    saved = guest.vmcs.read(*(Field[f"GUEST_TR_{part}"] for part in parts))
    assert saved == (selector, 0x7FFF_0034_5678, 0x123, 0x8B)
    saved = guest.vmcs.read(*(Field[f"GUEST_LDTR_{part}"] for part in parts))
    assert saved == (l1.sym("SEL_LDT"), l1.sym("l1_gdt"), 7, 0x82)
    saved = guest.vmcs.read(
        *(Field.GUEST_GDTR_BASE, Field.GUEST_GDTR_LIMIT),
        *(Field.GUEST_IDTR_BASE, Field.GUEST_IDTR_LIMIT),
    )
    assert saved == (0xFFFF800000001000, 0x1FF) * 2


@pytest.mark.sdm("Saving Segment Registers and Descriptor-Table Registers")
def test_fs_and_gs_bases(l1: L1) -> None:
    """FS and GS bases that L2 set by WRMSR or SWAPGS are saved with all 64 bits."""
    guest = _open_guest(l1)
    high, low = 0xFFFF8000DEADB000, 0x7FFF_1234_5678
    assert guest.run(*_wrmsr(Msr.FS_BASE, high)) == Succeed()
    assert guest.run(*_wrmsr(Msr.GS_BASE, low)) == Succeed()
    assert guest.vmcs.read(Field.GUEST_FS_BASE, Field.GUEST_GS_BASE) == (high, low)
    assert guest.run(*_wrmsr(Msr.KERNEL_GS_BASE, high)) == Succeed()
    assert guest.run(b"\x0f\x01\xf8") == Succeed()  # SWAPGS
    assert guest.vmcs.read(Field.GUEST_GS_BASE) == (high,)
    # IA32_KERNEL_GS_BASE is nobody's field: L1 finds what L2 left.
    assert l1.rdmsr(Msr.KERNEL_GS_BASE) == Succeed(low)


@pytest.mark.sdm("Saving Non-Register State")
def test_interruptibility(l1: L1) -> None:
    """Blocking by STI and by MOV SS that is in force at the exit is saved, else 0."""
    guest = Guest(l1)
    data = {"rax": l1.sym("SEL_DATA")}
    mov_ss, pop_fs = b"\x8e\xd0", b"\x0f\xa1"
    for program, flags, expected in (
        (code.STI, 0x2, 1),
        # STI with interrupts enabled already, or an instruction after it: nothing is blocked.
        (code.STI, 0x202, 0),
        (code.STI + code.NOP, 0x2, 0),
        (mov_ss, 0x2, 2),
        (mov_ss, 0x202, 2),
        (mov_ss + code.NOP, 0x2, 0),
        (b"\x50" + pop_fs, 0x2, 0),
        (code.NOP, 0x202, 0),
    ):
        assert guest.run(program, data, GUEST_RFLAGS=flags) == Succeed()
        saved = guest.vmcs.read(
            Field.GUEST_INTERRUPTIBILITY_INFO,
            Field.GUEST_ACTIVITY_STATE,
            Field.GUEST_PENDING_DBG_EXCEPTIONS,
        )
        assert saved == (expected, 0, 0), program.hex()


@pytest.mark.needs(Proc2Ctl.UNRESTRICTED_GUEST, ExitCtl.SAVE_EFER, EntryCtl.LOAD_EFER)
@pytest.mark.sdm("Saving Control Registers, Debug Registers, and MSRs")
def test_ia32e_mode_guest(l1: L1) -> None:
    """ "IA-32e mode guest" in the VM-entry controls follows EFER.LMA when L2 switches modes."""
    guest = Guest(l1, ProcCtl.USE_MSR_BITMAPS, ExitCtl.SAVE_EFER, ExitCtl.LOAD_EFER,
                  EntryCtl.LOAD_EFER, mode=L2Mode.UNPAGED)  # fmt: skip
    set_msr_bitmap(l1)
    vmcs = guest.vmcs
    vmcs[Field.GUEST_CR3] = l1.sym("l2_pml4")
    vmcs.set_bits(Field.GUEST_CR4, Cr4.PAE)
    cr0 = vmcs[Field.GUEST_CR0]
    controls = vmcs[Field.VM_ENTRY_CONTROLS]
    # WRMSR; MOV CR0, EBX: paging with LME set turns on LMA. L2 is then in compatibility mode.
    program = code.WRMSR + b"\x0f\x22\xc3"
    regs: dict[str, int] = {"rcx": Msr.IA32_EFER, "rax": Efer.LME, "rdx": 0, "rbx": cr0 | Cr0.PG}
    seen = guest.run(program, regs)
    assert seen == Succeed()
    ia32e = EntryCtl.IA32E_MODE_GUEST
    saved = vmcs.read(Field.VM_ENTRY_CONTROLS, Field.GUEST_IA32_EFER, Field.GUEST_CR0)
    assert saved == (controls | ia32e, Efer.LME | Efer.LMA, cr0 | Cr0.PG)
    # L2 can be entered like that, and leaves IA-32e mode when it turns paging off.
    seen = guest.run(b"\x0f\x22\xc3", {"rbx": cr0})
    assert seen == Succeed()
    saved = vmcs.read(Field.VM_ENTRY_CONTROLS, Field.GUEST_IA32_EFER, Field.GUEST_CR0)
    assert saved == (controls, Efer.LME, cr0)


@pytest.mark.sdm("VM Exits")
def test_controls_and_host_fields_stay(l1: L1) -> None:
    """An exit writes guest-state and exit-information fields; no control, no host field."""
    guest = Guest(l1)
    assert guest.run(code.NOP) == Succeed()
    before = _controls_and_host(l1)
    # test_smm_fields_exist is about the field left out.
    others = set(_CONTROLS_AND_HOST) - {Field.EXECUTIVE_VMCS_POINTER}
    assert {field.name for field in others - before.keys() if l1.caps.field_exists(field)} == set()
    for program in (code.NOP, code.STI, code.mov("rbx", 5) * 3):
        assert guest.run(program) == Succeed()
    after = _controls_and_host(l1)
    assert {Field(f).name: v for f, v in after.items() if before[f] != v} == {}


_CONTROLS_AND_HOST = [field for field in Field if field.kind in (Kind.CONTROL, Kind.HOST)]


def _controls_and_host(l1: L1) -> dict[int, int]:
    """All control and host-state fields that VMREAD knows."""
    fields = _CONTROLS_AND_HOST
    values: dict[int, int] = {}
    for start in range(0, len(fields), 64):
        seen = l1.vmread_list(l1.cpu, tuple(fields[start : start + 64]))
        values |= {field: value for field, value, rflags in seen if not rflags & 0x41}
    return values


@pytest.mark.sdm("Information for VM Exits Due to Instruction Execution")
def test_instruction_length(l1: L1) -> None:
    """The instruction length counts prefixes, up to the longest instruction of 15 bytes."""
    guest = Guest(l1)
    for prefixes in (0, 1, 2, 5, 8, 13):
        for prefix in (b"\x66", b"\x3e", b"\xf2"):
            seen = guest.run(prefix * prefixes + code.CPUID)
            length = prefixes + 2
            assert seen == guest.exit(ExitReason.CPUID, length), (prefix, prefixes)
            assert guest.go_on(skip=length) == Succeed()
