"""KVM's dirty log while L1 uses VMX: each page that L2 or KVM itself writes for L1 is in it."""

from __future__ import annotations

import pytest

from kvmnest.kvm import Cap, exits
from kvmnest.l1 import L1, code
from kvmnest.suite.support.apic import TO_APIC_0
from kvmnest.suite.support.bitmaps import set_msr_bitmap
from kvmnest.suite.support.emulation import PREFIX, forced
from kvmnest.suite.support.entries import EPT_OR_NOT
from kvmnest.suite.support.ept import (
    ENABLE_AD,
    RWX,
    WRITE_BACK,
    Access,
    Window,
    identity_entry,
    poke,
    preset_flags,
)
from kvmnest.suite.support.failures import write_msr_area
from kvmnest.suite.support.guest import Guest
from kvmnest.suite.support.shadowing import Shadowing
from kvmnest.suite.support.virtual_apic import NOTIFICATION, POSTED, PostedInterrupts
from kvmnest.vmx import EptVpidCap, Field, Msr, Proc2Ctl, ProcCtl
from kvmnest.vmx.outcome import Fault, HostExit, Succeed

pytestmark = [
    pytest.mark.series(24),
    pytest.mark.sdm("Software Use of Virtual-Machine Control Structures"),
]

__all__ = ["forced"]

OUT_80 = code.out8(0x80)
#: LOCK CMPXCHG [RDI], RCX
CMPXCHG = b"\xf0\x48\x0f\xb1\x0f"
STORE = b"\x48\x89\x07"  # MOV [RDI], RAX
_VECTOR = 0x51


@pytest.fixture(autouse=True)
def _one_vm(l1: L1) -> None:
    if l1.nested_roundtrip:
        pytest.skip("a round trip of the VM ends its dirty log")


def _start(l1: L1) -> None:
    """Switch the log on, empty."""
    l1.vm.add_memory(0, 0, l1.memory, log_dirty=True)
    l1.vm.dirty_log(0)


def _dirty(l1: L1, *addresses: int) -> list[bool]:
    """Whether the log has the pages of these addresses; it is empty afterwards."""
    log = l1.vm.dirty_log(0)
    return [bool(log[page // 8] >> page % 8 & 1) for page in (a // 4096 for a in addresses)]


@pytest.mark.needs(Proc2Ctl.ENABLE_EPT)
@pytest.mark.sdm("The Extended Page Table Mechanism (EPT)")
@pytest.mark.parametrize("when", ["before", "while-L2-runs"])
def test_write_of_l2_through_ept(l1: L1, when: str) -> None:
    """A write of L2 is logged at L1's address, not at L2's; a read is not logged."""
    window = Window(Guest(l1), pages=2)
    guest, page = window.guest, window.page
    load = Access.READ.value[1]
    program = load + OUT_80 + load + OUT_80 + STORE + OUT_80
    if when == "before":
        _start(l1)
    regs = {"rdi": window.linear, "rax": 0x80}
    assert isinstance(guest.run(program, regs), HostExit)
    # KVM may log what it first maps for a read; only what is mapped already has to stay clean.
    if when == "while-L2-runs":
        _start(l1)
    else:
        l1.vm.dirty_log(0)
    assert isinstance(guest.resume(), HostExit)
    assert _dirty(l1, page, page + 4096) == [False, False]
    assert isinstance(guest.resume(), HostExit)
    assert _dirty(l1, page, page + 4096) == [True, False]
    assert guest.resume() == Succeed()
    # Once the log was read a further write is logged again.
    assert window.access(Access.WRITE, 4096) == Succeed()
    assert _dirty(l1, page, page + 4096) == [False, True]


@pytest.mark.needs(Proc2Ctl.ENABLE_EPT)
@pytest.mark.sdm("The Extended Page Table Mechanism (EPT)")
def test_address_of_l2_is_another_page(l1: L1) -> None:
    """Where EPT moves a page of RAM to another, the log has the page written, not its address."""
    guest = Guest(l1)
    named, page = l1.alloc(), l1.alloc()
    l1.write_int(identity_entry(l1, named), page | WRITE_BACK | RWX)
    _start(l1)
    assert guest.run(STORE, {"rdi": named}) == Succeed()
    assert _dirty(l1, named, page) == [False, True]
    assert guest.run(STORE, {"rdi": page}) == Succeed()
    assert _dirty(l1, named, page) == [False, True]


@EPT_OR_NOT
@pytest.mark.sdm("Address Translation in VMX Operation")
def test_two_addresses_of_one_page(l1: L1, ept: bool) -> None:
    """Two addresses of L2 for one page of L1, by EPT or by L2's tables: that page is logged."""
    guest = Guest(l1, ept=ept)
    first, second, page = l1.alloc(), l1.alloc(), l1.alloc()
    for address in (first, second):
        if ept:
            l1.write_int(identity_entry(l1, address), page | WRITE_BACK | RWX)
        else:
            l1.write_int(l1.sym("l2_pml4_pt") + 8 * (address >> 12), page | 0x67)
    load = Access.READ.value[1]
    for address in (first, second):
        assert guest.run(STORE + load, {"rdi": address}) == Succeed()
    poke(l1, page, 0)
    _start(l1)
    for number, address in enumerate((first, second, second, first)):
        assert guest.run(STORE, {"rdi": address, "rax": number}) == Succeed()
        assert _dirty(l1, first, second, page) == [False, False, True], number
        assert l1.read_int(page) == number
        for read in (first, second):
            assert guest.run(load, {"rdi": read}) == Succeed()
        assert _dirty(l1, first, second, page) == [False] * 3, number
        # L1's own write, by its own tables, to the page and to the one that has the address.
        poke(l1, page, 0)
        poke(l1, address, 0)
        written = [address == first, address == second, True]
        assert _dirty(l1, first, second, page) == written, number


@pytest.mark.needs(Proc2Ctl.ENABLE_EPT, EptVpidCap.ACCESSED_DIRTY)
@pytest.mark.sdm("Accessed and Dirty Flags for EPT")
def test_ept_flags(l1: L1) -> None:
    """An EPT paging structure whose accessed or dirty flag KVM sets is logged."""
    window = Window(Guest(l1))
    preset_flags(l1)
    window.guest.vmcs[Field.EPT_POINTER] |= ENABLE_AD
    leaf = window.entry(1)
    _start(l1)
    for kind in (Access.READ, Access.WRITE):
        assert window.access(kind) == Succeed()
        assert _dirty(l1, leaf) == [True], kind


@pytest.mark.needs(Proc2Ctl.ENABLE_PML)
@pytest.mark.sdm("Page-Modification Logging")
def test_page_modification_log(l1: L1) -> None:
    """The page-modification log, to which KVM appends for L1, is logged."""
    window = Window(Guest(l1))
    preset_flags(l1)
    vmcs, log = window.guest.vmcs, l1.alloc()
    vmcs[Field.EPT_POINTER] |= ENABLE_AD
    window.guest.on(Proc2Ctl.ENABLE_PML)
    vmcs[Field.PML_ADDRESS], vmcs[Field.GUEST_PML_INDEX] = log, 511
    _start(l1)
    assert window.access(Access.WRITE) == Succeed()
    assert l1.read_int(log + 8 * 511) == window.gpa
    assert _dirty(l1, log) == [True]


@pytest.mark.sdm("VM Exits: Saving MSRs")
def test_msr_store_area(l1: L1) -> None:
    """The VM-exit MSR-store area is logged."""
    guest, area = Guest(l1), l1.alloc()
    write_msr_area(l1, area, (Msr.KERNEL_GS_BASE, 0))
    guest.vmcs[Field.VM_EXIT_MSR_STORE_ADDR] = area
    guest.vmcs[Field.VM_EXIT_MSR_STORE_COUNT] = 1
    _start(l1)
    assert guest.run(code.NOP) == Succeed()
    assert _dirty(l1, area) == [True]


def test_vmcs_region(l1: L1) -> None:
    """A VMCS region is logged at the latest when VMCLEAR or VMPTRLD writes it back."""
    guest = Guest(l1)
    assert guest.run(code.NOP) == Succeed()
    _start(l1)
    region = guest.vmcs.address
    assert l1.vmclear(region) == Succeed()
    assert _dirty(l1, region) == [True]
    vmcs = l1.load_vmcs("vmcs_a")
    vmcs[Field.GUEST_RSP] = 0x1234
    assert vmcs.read(Field.GUEST_RSP) == (0x1234,)
    assert l1.vmwrite(Field.GUEST_RSP, 0x5678) == Succeed()
    l1.vm.dirty_log(0)
    other = l1.prepare_region(l1.sym("vmcs_b"))
    assert l1.vmptrld(other) == Succeed()
    assert _dirty(l1, region) == [True]


@pytest.mark.needs(Proc2Ctl.VMCS_SHADOWING)
@pytest.mark.sdm("VMWRITE-Write Field to Virtual-Machine Control Structure")
def test_shadow_vmcs(l1: L1) -> None:
    """A shadow VMCS that L2 writes by VMWRITE is logged at the latest when L2 exits."""
    shadowing = Shadowing(l1)
    shadowing.fill({Field.GUEST_RSP: 1})
    _start(l1)
    assert isinstance(shadowing.write(Field.GUEST_RSP, 0x1234), Succeed)
    assert _dirty(l1, shadowing.region) == [True]
    assert shadowing.content(Field.GUEST_RSP) == {Field.GUEST_RSP: 0x1234}


@pytest.mark.needs(Cap.SIGNAL_MSI, *POSTED)
@pytest.mark.sdm("Posted-Interrupt Processing")
def test_posted_interrupt_descriptor(l1: L1) -> None:
    """The descriptor, from which the processor takes vectors, and the virtual-APIC page."""
    posted = PostedInterrupts(l1)
    guest, pages = posted.guest, (posted.descriptor, posted.virtual.page)
    assert isinstance(guest.run(OUT_80 + code.NOP, GUEST_RFLAGS=0x202), HostExit)
    posted.post([_VECTOR])
    _start(l1)
    assert l1.vm.signal_msi(TO_APIC_0, NOTIFICATION) == 1
    assert guest.resume() == Fault(_VECTOR, error_code=0, rip=len(OUT_80))
    assert _dirty(l1, *pages) == [True, True]
    assert posted.left() == ([], False)


#: Store instructions of L1: machine code with the operand at [RDI], which KVM writes.
_OPERANDS = {
    "VMPTRST": b"\x0f\xc7\x3f",
    "VMREAD": b"\x0f\x78\x0f",  # VMREAD [RDI], RCX
}


@pytest.mark.parametrize("name", _OPERANDS)
def test_memory_operand(l1: L1, name: str) -> None:
    """The memory operand of a VMX instruction of L1 is logged."""
    Guest(l1)
    # A field that is not in the shadow VMCS, so that KVM carries out the VMREAD.
    regs = {"rdi": l1.alloc(), "rcx": Field.HOST_RIP}
    _start(l1)
    assert l1.call(_OPERANDS[name], regs=regs) == Succeed()
    assert _dirty(l1, regs["rdi"]) == [True]


@pytest.mark.needs(ProcCtl.USE_MSR_BITMAPS)
def test_string_input(l1: L1) -> None:
    """Memory into which KVM stores an INS of L2, or of L1, is logged."""
    guest, page = Guest(l1, ProcCtl.USE_MSR_BITMAPS), l1.alloc()
    set_msr_bitmap(l1)
    _start(l1)
    seen = guest.run(b"\x6c", {"rdi": page, "rdx": 0x3F8})  # INSB
    assert isinstance(seen, HostExit)
    assert isinstance(seen.exit, exits.IoExit)
    l1.vcpu.set_io_data(b"\x42")
    assert guest.resume() == Succeed()
    assert l1.read_int(page, 1) == 0x42
    assert _dirty(l1, page) == [True]


@pytest.mark.sdm("Discovering Support for VMX")
@pytest.mark.parametrize("level", ["L1", "L2"])
@pytest.mark.parametrize(
    ("name", "instruction"),
    [("CMPXCHG", CMPXCHG), ("MOV", STORE), ("XADD", b"\xf0\x48\x0f\xc1\x07")],
    ids=["CMPXCHG", "MOV", "XADD"],
)
def test_emulated_write(l1: L1, forced: bytes, level: str, name: str, instruction: bytes) -> None:
    """A write of memory that KVM's emulator carries out is logged, the atomic ones as others."""
    guest, page = Guest(l1), l1.alloc()
    regs = {"rdi": page, "rax": 0 if name == "CMPXCHG" else 7, "rcx": 7}
    _start(l1)
    run = guest.run if level == "L2" else lambda text, regs: l1.call(text, regs=regs)
    assert run(PREFIX + instruction, regs) == Succeed()
    assert l1.read_int(page) == 7
    assert _dirty(l1, page) == [True]
