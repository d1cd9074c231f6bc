"""RDMSR and WRMSR of L2: the MSR bitmaps decide, and what L2 may do itself has its effect."""

import pytest

from kvmnest.l1 import L1, code
from kvmnest.suite.support.bitmaps import MSR_PARTS, set_msr_bitmap
from kvmnest.suite.support.guest import Guest
from kvmnest.vmx import EntryCtl, ExitCtl, ExitReason, Field, Msr, ProcCtl, Vector
from kvmnest.vmx.outcome import Exit, Fault, Outcome, Succeed
from kvmnest.vmx.registers import PAT_RESET

pytestmark = [
    pytest.mark.series(19),
    pytest.mark.sdm("MSR-Bitmap Address"),
    pytest.mark.needs(ProcCtl.USE_MSR_BITMAPS),
]

#: In each range the first MSR, some that exist, and the last; the ends do not exist here or do
#: nothing, which L2 sees as #GP or success.
LOW = (0x0, Msr.SYSENTER_CS, Msr.SYSENTER_EIP, 0x1FFF)
HIGH = (0xC0000000, Msr.STAR, Msr.KERNEL_GS_BASE, 0xC0001FFF)
OUTSIDE = (0x2000, 0x3FFF, 0x40000000, 0x7FFFFFFF, 0xBFFFFFFF, 0xC0002000, 0xFFFFFFFF)


def _access(guest: Guest, msr: int, write: bool, value: int = 0) -> Outcome:
    instruction = code.WRMSR if write else code.RDMSR
    regs = {"rcx": msr, "rax": value & 0xFFFFFFFF, "rdx": value >> 32}
    return guest.run(instruction, regs)


def _exit(guest: Guest, write: bool) -> Exit:
    return guest.exit(ExitReason.WRMSR if write else ExitReason.RDMSR, 2)


def expect_exit(guest: Guest, msr: int, write: bool) -> None:
    """The access exits to L1 without any effect."""
    seen = _access(guest, msr, write, 0x12)
    assert seen == _exit(guest, write), f"{'WRMSR' if write else 'RDMSR'} {msr:#x}"
    assert guest.changed(seen) == {}


def expect_no_exit(guest: Guest, msr: int, write: bool) -> None:
    """L2 itself gets the result, a value or #GP."""
    seen = _access(guest, msr, write, 0x12)
    name = f"{'WRMSR' if write else 'RDMSR'} {msr:#x}"
    assert isinstance(seen, Succeed | Fault), f"{name}: {seen!r}"
    if isinstance(seen, Fault):
        assert seen == Fault(Vector.GP, error_code=0, rip=0), name
    assert guest.changed(seen, *(() if write else ("rax", "rdx"))) == {}


@pytest.mark.parametrize("part", MSR_PARTS)
def test_one_bit(l1: L1, part: str) -> None:
    """A bit makes its MSR exit in its direction; no bit of another MSR or part does."""
    guest = Guest(l1, ProcCtl.USE_MSR_BITMAPS)
    write = part.startswith("write")
    for msr in LOW if part.endswith("low") else HIGH:
        set_msr_bitmap(l1, [(part, msr)])
        expect_exit(guest, msr, write)
        expect_no_exit(guest, msr, not write)
        # The other way round: every bit but this one.
        set_msr_bitmap(l1, [(part, msr)], inverted=True)
        expect_no_exit(guest, msr, write)
        expect_exit(guest, msr, not write)
        expect_exit(guest, msr ^ 0xC0000000, write)


def test_outside_the_ranges(l1: L1) -> None:
    """An MSR outside 0-1FFFH and C0000000H-C0001FFFH exits whatever the bitmaps hold."""
    guest = Guest(l1, ProcCtl.USE_MSR_BITMAPS)
    set_msr_bitmap(l1)
    for msr in OUTSIDE:
        for write in (False, True):
            expect_exit(guest, msr, write)


def test_only_ecx_counts(l1: L1) -> None:
    """The upper half of RCX does not take part."""
    guest = Guest(l1, ProcCtl.USE_MSR_BITMAPS)
    set_msr_bitmap(l1, [("read-low", Msr.SYSENTER_CS)])
    expect_exit(guest, 0xFFFFFFFF << 32 | Msr.SYSENTER_CS, False)
    expect_no_exit(guest, 0xFFFFFFFF << 32 | Msr.SYSENTER_ESP, False)


@pytest.mark.sdm("Instructions That Cause VM Exits Conditionally")
def test_without_bitmaps(l1: L1) -> None:
    """With "use MSR bitmaps" 0 every RDMSR and WRMSR exits, and the address is not looked at."""
    guest = Guest(l1)
    set_msr_bitmap(l1)
    guest.vmcs[Field.MSR_BITMAP] = 0x123
    for msr in (*LOW, *HIGH, *OUTSIDE):
        for write in (False, True):
            expect_exit(guest, msr, write)


def test_bitmap_changes_in_memory(l1: L1) -> None:
    """Bits that L1 changes in memory hold from the next entry on, in both directions."""
    guest = Guest(l1, ProcCtl.USE_MSR_BITMAPS)
    set_msr_bitmap(l1)
    guest.vmcs.flush()
    bitmap = l1.sym("msr_bitmap")
    for offset, write in ((0, False), (0x800, True)):
        byte, bit = bitmap + offset + Msr.SYSENTER_ESP // 8, 1 << Msr.SYSENTER_ESP % 8
        for _ in range(2):
            expect_no_exit(guest, Msr.SYSENTER_ESP, write)
            l1.write_int(byte, bit, 1)
            expect_exit(guest, Msr.SYSENTER_ESP, write)
            l1.write_int(byte, 0, 1)


def test_moved_bitmap(l1: L1) -> None:
    """The bitmap that counts is the one whose address the VMCS holds at the entry."""
    guest = Guest(l1, ProcCtl.USE_MSR_BITMAPS)
    set_msr_bitmap(l1)
    other = l1.alloc()
    l1.write(other, b"\xff" * 4096)
    expect_no_exit(guest, Msr.STAR, False)
    guest.vmcs[Field.MSR_BITMAP] = other
    expect_exit(guest, Msr.STAR, False)
    guest.vmcs[Field.MSR_BITMAP] = l1.sym("msr_bitmap")
    expect_no_exit(guest, Msr.STAR, False)


# --- what L2 does itself ---

SAVED = {
    Msr.SYSENTER_CS: (Field.GUEST_SYSENTER_CS, 0x1234),
    Msr.SYSENTER_ESP: (Field.GUEST_SYSENTER_ESP, 0x00007ABCDEF01234),
    Msr.SYSENTER_EIP: (Field.GUEST_SYSENTER_EIP, 0xFFFF800012345678),
    Msr.FS_BASE: (Field.GUEST_FS_BASE, 0x0000123456789ABC),
    Msr.GS_BASE: (Field.GUEST_GS_BASE, 0xFFFFABCDEF012345),
}


@pytest.mark.sdm("Saving Control Registers, Debug Registers, and MSRs")
@pytest.mark.parametrize("msr", SAVED, ids=lambda m: m.name)
def test_write_is_saved_at_the_exit(l1: L1, msr: Msr) -> None:
    """What L2 writes itself is in the guest-state area after the exit, and still there later."""
    guest = Guest(l1, ProcCtl.USE_MSR_BITMAPS)
    set_msr_bitmap(l1)
    field, value = SAVED[msr]
    host = l1.rdmsr(msr).value
    assert _access(guest, msr, True, value) == Succeed()
    assert guest.vmcs.read(field) == (value,)
    # L1 has the value of the host-state area.
    assert l1.rdmsr(msr) == Succeed(host)
    seen = _access(guest, msr, False)
    assert seen == Succeed()
    assert (seen.regs["rdx"], seen.regs["rax"]) == (value >> 32, value & 0xFFFFFFFF)
    assert guest.vmcs.read(field) == (value,)


@pytest.mark.parametrize(
    "msr", [Msr.STAR, Msr.LSTAR, Msr.FMASK, Msr.KERNEL_GS_BASE], ids=lambda m: m.name
)
def test_msr_that_vmx_does_not_switch(l1: L1, msr: Msr) -> None:
    """L1 and L2 share an MSR that the VMCS has no field for."""
    assert l1.wrmsr(msr, 0x11223344) == Succeed()
    guest = Guest(l1, ProcCtl.USE_MSR_BITMAPS)
    set_msr_bitmap(l1)
    seen = _access(guest, msr, False)
    assert seen == Succeed()
    assert (seen.regs["rdx"], seen.regs["rax"]) == (0, 0x11223344)
    assert _access(guest, msr, True, 0x55667788) == Succeed()
    assert l1.rdmsr(msr) == Succeed(0x55667788)


@pytest.mark.needs(ExitCtl.SAVE_PAT, ExitCtl.LOAD_PAT, EntryCtl.LOAD_PAT)
@pytest.mark.sdm("Saving Control Registers, Debug Registers, and MSRs")
def test_pat(l1: L1) -> None:
    """IA32_PAT is saved and loaded by its controls, and shared without them."""
    guest = Guest(l1, ProcCtl.USE_MSR_BITMAPS)
    set_msr_bitmap(l1)
    old, new = PAT_RESET, 0x0006060606060606
    guest.on(ExitCtl.SAVE_PAT, ExitCtl.LOAD_PAT, EntryCtl.LOAD_PAT)
    assert _access(guest, Msr.PAT, True, new) == Succeed()
    assert guest.vmcs.read(Field.GUEST_IA32_PAT) == (new,)
    assert l1.rdmsr(Msr.PAT) == Succeed(old)
    guest.vmcs[Field.GUEST_IA32_PAT] = old
    guest.off(ExitCtl.SAVE_PAT)
    assert _access(guest, Msr.PAT, True, new) == Succeed()
    assert guest.vmcs.read(Field.GUEST_IA32_PAT) == (old,)
    assert l1.rdmsr(Msr.PAT) == Succeed(old)
    guest.off(ExitCtl.LOAD_PAT, EntryCtl.LOAD_PAT)
    assert _access(guest, Msr.PAT, True, new) == Succeed()
    assert l1.rdmsr(Msr.PAT) == Succeed(new)
    seen = _access(guest, Msr.PAT, False)
    assert seen == Succeed()
    assert seen.regs["rdx"] << 32 | seen.regs["rax"] == new


@pytest.mark.needs(ExitCtl.SAVE_DEBUG_CONTROLS, EntryCtl.LOAD_DEBUG_CONTROLS)
@pytest.mark.sdm("Saving Control Registers, Debug Registers, and MSRs")
def test_debugctl(l1: L1) -> None:
    """IA32_DEBUGCTL is saved with "save debug controls"; L1 has 0 after every exit."""
    guest = Guest(l1, ProcCtl.USE_MSR_BITMAPS)
    set_msr_bitmap(l1)
    guest.on(ExitCtl.SAVE_DEBUG_CONTROLS, EntryCtl.LOAD_DEBUG_CONTROLS)
    field, btf = Field.GUEST_IA32_DEBUGCTL, 2
    for save in (True, False):
        if not save:
            guest.off(ExitCtl.SAVE_DEBUG_CONTROLS)
        guest.vmcs[field] = btf
        assert _access(guest, Msr.DEBUGCTL, True, 0) == Succeed()
        assert guest.vmcs.read(field) == (0 if save else btf,)
        assert l1.rdmsr(Msr.DEBUGCTL) == Succeed(0)


@pytest.mark.sdm("Single-Stepping on Branches")
def test_debugctl_btf(l1: L1) -> None:
    """IA32_DEBUGCTL.BTF is loaded for L2, which can also set it itself."""
    guest = Guest(l1, ProcCtl.USE_MSR_BITMAPS)
    set_msr_bitmap(l1)
    guest.on(ExitCtl.SAVE_DEBUG_CONTROLS, EntryCtl.LOAD_DEBUG_CONTROLS)
    guest.vmcs[Field.GUEST_IA32_DEBUGCTL] = 2
    seen = _access(guest, Msr.DEBUGCTL, False)
    assert seen == Succeed()
    assert seen.regs["rax"] == 2
    guest.vmcs[Field.GUEST_IA32_DEBUGCTL] = 0
    assert _access(guest, Msr.DEBUGCTL, True, 2) == Succeed()
    assert guest.vmcs.read(Field.GUEST_IA32_DEBUGCTL) == (2,)
    seen = _access(guest, Msr.DEBUGCTL, False)
    assert seen == Succeed()
    assert seen.regs["rax"] == 2


@pytest.mark.needs(ExitCtl.SAVE_EFER, ExitCtl.LOAD_EFER, EntryCtl.LOAD_EFER)
@pytest.mark.sdm("Saving Control Registers, Debug Registers, and MSRs")
def test_efer(l1: L1) -> None:
    """IA32_EFER that L2 changes is saved with its control; L1's comes from the host state."""
    guest = Guest(l1, ProcCtl.USE_MSR_BITMAPS)
    set_msr_bitmap(l1)
    guest.on(ExitCtl.SAVE_EFER, ExitCtl.LOAD_EFER, EntryCtl.LOAD_EFER)
    host = guest.vmcs[Field.HOST_IA32_EFER]
    new = guest.vmcs[Field.GUEST_IA32_EFER] ^ 1
    assert _access(guest, Msr.IA32_EFER, True, new) == Succeed()
    assert guest.vmcs.read(Field.GUEST_IA32_EFER) == (new,)
    assert l1.rdmsr(Msr.IA32_EFER) == Succeed(host)
    seen = _access(guest, Msr.IA32_EFER, False)
    assert seen.regs["rax"] == new
    # L1's own may differ in the same bit.
    guest.vmcs[Field.HOST_IA32_EFER] = host | 1
    guest.vmcs[Field.GUEST_IA32_EFER] = new & ~1
    seen = _access(guest, Msr.IA32_EFER, False)
    assert seen.regs["rax"] == new & ~1
    assert l1.rdmsr(Msr.IA32_EFER) == Succeed(host | 1)
