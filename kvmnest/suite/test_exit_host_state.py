"""VM exits load the host state, field by field; so do failed VM entries."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kvmnest.l1 import L1, code
from kvmnest.suite.support.bitmaps import set_msr_bitmap
from kvmnest.suite.support.entries import BAD_GUEST
from kvmnest.suite.support.guest import Guest
from kvmnest.vmx import (
    Cr0,
    Cr4,
    DebugCtl,
    Dr6,
    Efer,
    EntryCtl,
    ExitCtl,
    Field,
    Msr,
    ProcCtl,
    Rflags,
)
from kvmnest.vmx.outcome import Fault, Succeed
from kvmnest.vmx.registers import PAT_RESET, STATUS_FLAGS

pytestmark = [
    pytest.mark.series(18),
    pytest.mark.sdm("Loading Host State"),
]

Leave = Callable[[Guest], None]
#: Bits of DR6 that read as 1 when nothing was reported.
DR6_ONES = Dr6.RESERVED1 | Dr6.BLD | Dr6.RTM


def _exit(guest: Guest) -> None:
    assert guest.run(code.NOP) == Succeed()


def _failed_entry(guest: Guest) -> None:
    good = guest.vmcs[Field.GUEST_CR3]
    assert guest.run(code.NOP, GUEST_CR3=1 << 63) == BAD_GUEST
    guest.vmcs[Field.GUEST_CR3] = good


#: The ways to load the host state.
WAYS = pytest.mark.parametrize(
    "leave", [pytest.param(_exit, id="exit"), pytest.param(_failed_entry, id="failed-entry")]
)


def _out(l1: L1, name: str) -> int:
    """A register as the payload found it at HOST_RIP."""
    return l1.read_int(l1.cpu.slots + l1.sym(f"OUT_{name}"))


def _copy_page(l1: L1, page: int) -> int:
    copy = l1.alloc()
    l1.write(copy, l1.read(page, 4096))
    return copy


@WAYS
@pytest.mark.sdm("Loading Host Control Registers, Debug Registers, MSRs")
def test_control_registers(l1: L1, leave: Leave) -> None:
    """CR0, CR3 and CR4 come from the host-state area, whatever L1 had before the entry."""
    guest = Guest(l1)
    vmcs = guest.vmcs
    cr0, cr3, cr4 = (vmcs[field] for field in (Field.HOST_CR0, Field.HOST_CR3, Field.HOST_CR4))
    other = _copy_page(l1, cr3)
    for bits0, bits4, table in (
        (Cr0.TS, Cr4.DE, other),
        (Cr0.AM | Cr0.EM, Cr4.PGE | Cr4.TSD, cr3),
        (0, Cr4.PSE | Cr4.PCE | Cr4.MCE, other),
        (0, 0, cr3),
    ):
        vmcs[Field.HOST_CR0] = cr0 | bits0
        vmcs[Field.HOST_CR4] = cr4 | bits4
        vmcs[Field.HOST_CR3] = table
        leave(guest)
        assert l1.read_cr(0) == Succeed(cr0 | bits0), bits0
        assert l1.read_cr(4) == Succeed(cr4 | bits4), bits4
        assert l1.read_cr(3) == Succeed(table)


@WAYS
@pytest.mark.needs(Cr4.PCIDE)
@pytest.mark.sdm("Loading Host Control Registers, Debug Registers, MSRs")
def test_process_context(l1: L1, leave: Leave) -> None:
    """CR4.PCIDE and a process context of CR3 come together; L1 can change CR4 afterwards.

    By MOV to CR4 PCIDE can only be set while bits 11:0 of CR3 are 0; that holds for a change.
    """
    guest = Guest(l1)
    vmcs = guest.vmcs
    cr3, cr4 = vmcs[Field.HOST_CR3], vmcs[Field.HOST_CR4] | Cr4.PCIDE
    vmcs[Field.HOST_CR4] = cr4
    for context in (5, 0xFFF, 0):
        vmcs[Field.HOST_CR3] = cr3 | context
        leave(guest)
        assert (l1.read_cr(3), l1.read_cr(4)) == (Succeed(cr3 | context), Succeed(cr4))
        for bits in (Cr4.MCE, Cr4.DE | Cr4.TSD, 0):
            assert l1.write_cr(4, cr4 | bits) == Succeed(), bits
            assert l1.read_cr(4) == Succeed(cr4 | bits)
            assert l1.read_cr(3) == Succeed(cr3 | context)


@WAYS
@pytest.mark.sdm("Loading Host Segment and Descriptor-Table Registers")
def test_selectors(l1: L1, leave: Leave) -> None:
    """Selectors come from the host-state area; LDTR gets the null selector."""
    guest = Guest(l1)
    data, wide, narrow = (l1.sym(f"SEL_{name}") for name in ("DATA", "CODE64", "CODE32"))
    for ds, es, fs, gs in ((data, 0, wide, narrow), (0, data, narrow, 0), (narrow, wide, 0, data)):
        guest.vmcs[Field.HOST_DS_SELECTOR] = ds
        guest.vmcs[Field.HOST_ES_SELECTOR] = es
        guest.vmcs[Field.HOST_FS_SELECTOR] = fs
        guest.vmcs[Field.HOST_GS_SELECTOR] = gs
        # LLDT
        selector = l1.sym("SEL_LDT")
        assert l1.call(b"\x0f\x00\xd0", regs={"rax": selector}) == Succeed()
        leave(guest)
        seen = l1.cpu.host_loads()
        assert (seen.ds, seen.es, seen.fs, seen.gs) == (ds, es, fs, gs)
        assert (seen.tr, seen.ldtr) == (l1.sym("SEL_TSS0"), 0)
        assert (_out(l1, "CS"), _out(l1, "SS")) == (wide, data)


@WAYS
@pytest.mark.sdm("Loading Host Segment and Descriptor-Table Registers")
def test_segment_attributes(l1: L1, leave: Leave) -> None:
    """Bases, limits and access rights are fixed, and not those of the descriptors."""
    guest = Guest(l1)
    # Selectors of descriptors with quite other contents are loaded without a look at them.
    guest.vmcs[Field.HOST_DS_SELECTOR] = l1.sym("SEL_LDT")
    guest.vmcs[Field.HOST_ES_SELECTOR] = l1.sym("SEL_CODE32")
    guest.vmcs[Field.HOST_FS_BASE] = 0x123456789000
    guest.vmcs[Field.HOST_GS_BASE] = 0xFFFF800000001234
    tss = _copy_page(l1, l1.sym("tss0") & ~0xFFF) + (l1.sym("tss0") & 0xFFF)
    guest.vmcs[Field.HOST_TR_BASE] = tss
    leave(guest)
    sregs = l1.vcpu.get_sregs()
    cs = sregs.cs
    assert (cs.base, cs.limit, cs.type, cs.s) == (0, 0xFFFFFFFF, 11, 1)
    assert (cs.dpl, cs.present, cs.l, cs.db, cs.g) == (0, 1, 1, 0, 1)
    for name, base in (
        ("ss", 0),
        ("ds", 0),
        ("es", 0),
        ("fs", 0x123456789000),
        ("gs", 0xFFFF800000001234),
    ):
        seg = getattr(sregs, name)
        assert (seg.base, seg.limit, seg.type, seg.s) == (base, 0xFFFFFFFF, 3, 1), name
        assert (seg.dpl, seg.present, seg.db, seg.g, seg.unusable) == (0, 1, 1, 1, 0), name
    tr = sregs.tr
    assert (tr.base, tr.limit, tr.type, tr.s) == (tss, 0x67, 11, 0)
    assert (tr.dpl, tr.present, tr.db, tr.g, tr.unusable) == (0, 1, 0, 0, 0)
    assert (sregs.ldt.selector, sregs.ldt.unusable) == (0, 1)
    # L1's interrupt stacks come from this task-state segment: traps still work.
    assert l1.call(code.UD2) == Fault(6, rip=0)


@WAYS
@pytest.mark.sdm("Loading Host Segment and Descriptor-Table Registers")
def test_descriptor_table_registers(l1: L1, leave: Leave) -> None:
    """GDTR and IDTR get the host-state area's bases and the limit FFFFH."""
    guest = Guest(l1)
    gdt, idt = (l1.sym(name) for name in ("l1_gdt", "l1_idt"))
    gdt_copy = _copy_page(l1, gdt & ~0xFFF) + (gdt & 0xFFF)
    idt_copy = l1.alloc(2)
    l1.write(idt_copy, l1.read(idt, 4096))
    table = l1.sym("l2_data")
    for base_gdt, base_idt in ((gdt, idt), (gdt_copy, idt_copy), (gdt, idt)):
        # LGDT and LIDT with small limits: those that L1 had do not come back.
        for opcode, base in ((b"\x0f\x01\x17", base_gdt), (b"\x0f\x01\x1f", base_idt)):
            l1.write(table, (0xFFF).to_bytes(2, "little") + base.to_bytes(8, "little"))
            assert l1.call(opcode, regs={"rdi": table}) == Succeed()
        guest.vmcs[Field.HOST_GDTR_BASE] = base_gdt
        guest.vmcs[Field.HOST_IDTR_BASE] = base_idt
        leave(guest)
        seen = l1.cpu.host_loads()
        assert (seen.gdtr_base, seen.gdtr_limit) == (base_gdt, 0xFFFF)
        assert (seen.idtr_base, seen.idtr_limit) == (base_idt, 0xFFFF)


@WAYS
@pytest.mark.sdm("Loading Host Segment and Descriptor-Table Registers")
def test_segment_bases(l1: L1, leave: Leave) -> None:
    """The bases of FS and GS are the host-state area's, all 64 bits of them."""
    guest = Guest(l1, ProcCtl.USE_MSR_BITMAPS)
    set_msr_bitmap(l1)
    for fs, gs in ((0x7FFFFFFFF000, 0x1000), (0xFFFF800000000000, 0), (0, 1 << 46)):
        assert l1.wrmsr(Msr.FS_BASE, 0x1111) == Succeed()
        assert l1.wrmsr(Msr.GS_BASE, 0x2222) == Succeed()
        guest.vmcs[Field.HOST_FS_BASE] = fs
        guest.vmcs[Field.HOST_GS_BASE] = gs
        leave(guest)
        assert l1.rdmsr(Msr.FS_BASE) == Succeed(fs)
        assert l1.rdmsr(Msr.GS_BASE) == Succeed(gs)


@WAYS
@pytest.mark.sdm("Loading Host Control Registers, Debug Registers, MSRs")
def test_sysenter_msrs(l1: L1, leave: Leave) -> None:
    """The three SYSENTER MSRs are the host-state area's."""
    guest = Guest(l1)
    for number, (cs, esp, eip) in enumerate(
        ((0x10, 0x7FFFFFFFFFF8, 1 << 40), (0xFFFFFFFF, 0, 0xFFFF800000000000), (0, 5, 0))
    ):
        for msr in (Msr.SYSENTER_CS, Msr.SYSENTER_ESP, Msr.SYSENTER_EIP):
            assert l1.wrmsr(msr, 0x1000 + number) == Succeed()
        guest.vmcs[Field.HOST_IA32_SYSENTER_CS] = cs
        guest.vmcs[Field.HOST_IA32_SYSENTER_ESP] = esp
        guest.vmcs[Field.HOST_IA32_SYSENTER_EIP] = eip
        leave(guest)
        assert l1.rdmsr(Msr.SYSENTER_CS) == Succeed(cs)
        assert l1.rdmsr(Msr.SYSENTER_ESP) == Succeed(esp)
        assert l1.rdmsr(Msr.SYSENTER_EIP) == Succeed(eip)


@WAYS
@pytest.mark.sdm("Loading Host Control Registers, Debug Registers, MSRs")
def test_debug_registers(l1: L1, leave: Leave) -> None:
    """DR7 becomes 400H and IA32_DEBUGCTL 0; DR0 to DR3 and DR6 are left alone."""
    guest = Guest(l1, EntryCtl.LOAD_DEBUG_CONTROLS)
    for number in range(4):
        assert l1.write_dr(number, 0x1000 * number + 5) == Succeed()
    for dr7 in (0x402, 0x400 | 0xFF, 0x455):
        assert l1.write_dr(7, dr7) == Succeed()
        assert l1.write_dr(6, DR6_ONES | Dr6.B2) == Succeed()
        assert l1.wrmsr(Msr.DEBUGCTL, DebugCtl.BTF) == Succeed()
        guest.vmcs[Field.GUEST_DR7] = 0x400 | dr7 & 0xFF
        leave(guest)
        assert l1.read_dr(7) == Succeed(0x400), hex(dr7)
        assert l1.rdmsr(Msr.DEBUGCTL) == Succeed(0)
        assert l1.read_dr(6) == Succeed(DR6_ONES | Dr6.B2)
        for number in range(4):
            assert l1.read_dr(number) == Succeed(0x1000 * number + 5)


@WAYS
@pytest.mark.needs(ExitCtl.LOAD_EFER)
@pytest.mark.sdm("Loading Host Control Registers, Debug Registers, MSRs")
def test_efer_loaded(l1: L1, leave: Leave) -> None:
    """With "load IA32_EFER" EFER is the host-state area's."""
    guest = Guest(l1, ExitCtl.LOAD_EFER)
    long_mode = Efer.LME | Efer.LMA
    for host in (long_mode | Efer.NXE | Efer.SCE, long_mode | Efer.NXE, long_mode | Efer.SCE):
        assert l1.wrmsr(Msr.IA32_EFER, long_mode | Efer.NXE | Efer.SCE) == Succeed()
        guest.vmcs[Field.HOST_IA32_EFER] = host
        leave(guest)
        assert l1.rdmsr(Msr.IA32_EFER) == Succeed(host), hex(host)


@pytest.mark.needs(EntryCtl.LOAD_EFER)
@pytest.mark.sdm("Loading Host Control Registers, Debug Registers, MSRs")
def test_efer_kept(l1: L1) -> None:
    """Without "load IA32_EFER" only LMA and LME are set, the other bits stay as L2 had them."""
    guest = Guest(l1, EntryCtl.LOAD_EFER)
    guest.off(ExitCtl.LOAD_EFER)
    long_mode = Efer.LME | Efer.LMA
    for rest in (Efer.NXE | Efer.SCE, Efer.NXE, Efer.SCE, Efer.NXE):
        seen = guest.run(
            code.RDMSR, {"rcx": Msr.IA32_EFER}, GUEST_IA32_EFER=long_mode | rest,
            CPU_BASED_VM_EXEC_CONTROL=_open_msrs(guest),
        )  # fmt: skip
        assert seen == Succeed()
        assert seen.regs["rax"] == long_mode | rest
        assert l1.rdmsr(Msr.IA32_EFER) == Succeed(long_mode | rest)


def _open_msrs(guest: Guest) -> int:
    set_msr_bitmap(guest.l1)
    return guest.vmcs[Field.CPU_BASED_VM_EXEC_CONTROL] | ProcCtl.USE_MSR_BITMAPS


@WAYS
@pytest.mark.needs(ExitCtl.LOAD_PAT, EntryCtl.LOAD_PAT)
@pytest.mark.sdm("Loading Host Control Registers, Debug Registers, MSRs")
def test_pat_loaded(l1: L1, leave: Leave) -> None:
    """With "load IA32_PAT" the PAT is the host-state area's."""
    guest = Guest(l1, ExitCtl.LOAD_PAT, EntryCtl.LOAD_PAT)
    for host in (PAT_RESET, 0, 0x0606060606060606, 0x0706050401000106):
        guest.vmcs[Field.GUEST_IA32_PAT] = 0x0505050505050505
        guest.vmcs[Field.HOST_IA32_PAT] = host
        leave(guest)
        assert l1.rdmsr(Msr.PAT) == Succeed(host)


@pytest.mark.needs(EntryCtl.LOAD_PAT)
@pytest.mark.sdm("Loading Host Control Registers, Debug Registers, MSRs")
def test_pat_kept(l1: L1) -> None:
    """Without "load IA32_PAT" the PAT stays as it was in L2."""
    guest = Guest(l1, EntryCtl.LOAD_PAT)
    guest.off(ExitCtl.LOAD_PAT)
    guest.vmcs[Field.HOST_IA32_PAT] = 0x0606060606060606
    for value in (0x0505050505050505, PAT_RESET):
        assert guest.run(code.NOP, GUEST_IA32_PAT=value) == Succeed()
        assert l1.rdmsr(Msr.PAT) == Succeed(value)


@pytest.mark.needs(ExitCtl.LOAD_PERF_GLOBAL_CTRL, EntryCtl.LOAD_PERF_GLOBAL_CTRL)
@pytest.mark.sdm("Loading Host Control Registers, Debug Registers, MSRs")
def test_perf_global_ctrl(l1: L1) -> None:
    """With "load IA32_PERF_GLOBAL_CTRL" it is the host-state area's; 0 where it is no MSR."""
    guest = Guest(l1, ExitCtl.LOAD_PERF_GLOBAL_CTRL, EntryCtl.LOAD_PERF_GLOBAL_CTRL)
    exists = l1.rdmsr(Msr.PERF_GLOBAL_CTRL) == Succeed()
    for host, inside in ((1, 0), (0, 1), (0, 0)):
        guest.vmcs[Field.HOST_IA32_PERF_GLOBAL_CTRL] = host if exists else 0
        guest.vmcs[Field.GUEST_IA32_PERF_GLOBAL_CTRL] = inside if exists else 0
        assert guest.run(code.NOP) == Succeed()
        assert not exists or l1.rdmsr(Msr.PERF_GLOBAL_CTRL) == Succeed(host)


@WAYS
@pytest.mark.sdm("Loading Host RIP, RSP, SSP, and RFLAGS")
def test_rflags_rip_rsp(l1: L1, leave: Leave) -> None:
    """RFLAGS is 2, whatever L1 and L2 had in it; RIP and RSP are the host-state area's."""
    guest = Guest(l1)
    everything = 0x2 | STATUS_FLAGS | Rflags.DF | Rflags.IF | Rflags.IOPL | Rflags.AC | Rflags.ID
    leave(guest)
    assert _out(l1, "RFLAGS") == 0x2
    assert _out(l1, "RSP") == guest.vmcs[Field.HOST_RSP]
    seen = guest.run(code.STI + code.NOP * 2, GUEST_RFLAGS=everything)
    assert seen == Succeed()
    assert _out(l1, "RFLAGS") == 0x2


@pytest.mark.sdm("Updating Non-Register State")
def test_no_blocking_after_an_exit(l1: L1) -> None:
    """After an exit nothing is blocked by STI or MOV SS, though L2 left in such a shadow."""
    guest = Guest(l1)
    # STI; VMCALL and MOV SS, EAX; VMCALL
    for shadow, bit in ((code.STI, 1), (b"\x8e\xd0", 2)):
        seen = guest.run(shadow, {"rax": l1.sym("SEL_DATA")})
        assert seen == Succeed()
        assert guest.vmcs.read(Field.GUEST_INTERRUPTIBILITY_INFO) == (bit,)
        assert l1.vcpu.get_vcpu_events().interrupt.shadow == 0


@pytest.mark.sdm("Loading Host Control Registers, Debug Registers, MSRs")
@pytest.mark.parametrize("bits", [Cr0.CD, Cr0.CD | Cr0.NW], ids=["CD", "CD-NW"])
def test_cache_bits_are_not_loaded(l1: L1, bits: Cr0) -> None:
    """A VM exit never modifies CR0.CD and CR0.NW."""
    guest = Guest(l1)
    before = l1.read_cr(0)
    guest.vmcs.set_bits(Field.HOST_CR0, bits)
    assert guest.run(code.NOP) == Succeed()
    assert l1.read_cr(0) == before


@pytest.mark.sdm("Loading Host Segment and Descriptor-Table Registers")
@pytest.mark.parametrize("name", ["ds", "es", "ss", "fs", "gs"])
def test_null_selectors(l1: L1, name: str) -> None:
    """A segment is unusable if its selector is loaded with zero; the others are not."""
    guest = Guest(l1)
    guest.vmcs[Field[f"HOST_{name.upper()}_SELECTOR"]] = 0
    assert guest.run(code.NOP) == Succeed()
    sregs = l1.vcpu.get_sregs()
    unusable = {each for each in ("ds", "es", "ss", "fs", "gs") if getattr(sregs, each).unusable}
    assert unusable == {name}
