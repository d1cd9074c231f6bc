"""TPR shadow and threshold, CR8, the APIC-access page and x2APIC mode as L2 sees them."""

import pytest

from kvmnest.kvm.exits import IO_OUT, IoExit
from kvmnest.l1 import L1, code
from kvmnest.suite.support.bitmaps import set_msr_bitmap
from kvmnest.suite.support.guest import NOT_VALID, PATTERN, Guest
from kvmnest.vmx import (
    ApicAccess,
    ApicAccessType,
    CrAccess,
    CrAccessType,
    ExitReason,
    Field,
    IntrType,
    Msr,
    Proc2Ctl,
    ProcCtl,
    Vector,
    VmxError,
    intr_info,
)
from kvmnest.vmx.outcome import Exit, Fault, HostExit, Outcome, Succeed, VMfailValid

pytestmark = [
    pytest.mark.series(19),
    pytest.mark.sdm("Virtualizing CR8-Based TPR Accesses"),
    pytest.mark.needs(ProcCtl.USE_TPR_SHADOW),
]

TPR = 0x80
MOV_TO_CR8 = code.mov_to_cr(8)
MOV_FROM_CR8 = code.mov_from_cr(8)
LOAD = {1: b"\x8a\x07", 2: b"\x66\x8b\x07", 4: b"\x8b\x07", 8: b"\x48\x8b\x07"}  # from [RDI]
STORE = {1: b"\x88\x07", 2: b"\x66\x89\x07", 4: b"\x89\x07", 8: b"\x48\x89\x07"}


def _shadowed(l1: L1, tpr: int = 0, *flags: ProcCtl | Proc2Ctl) -> Guest:
    guest = Guest(l1, ProcCtl.USE_TPR_SHADOW, *flags)
    l1.write(l1.sym("virtual_apic"), b"\x5a" * 4096)
    l1.write_int(l1.sym("virtual_apic") + TPR, tpr, 4)
    guest.vmcs[Field.VIRTUAL_APIC_PAGE_ADDR] = l1.sym("virtual_apic")
    guest.vmcs[Field.TPR_THRESHOLD] = 0
    return guest


def _vtpr(l1: L1) -> int:
    return l1.read_int(l1.sym("virtual_apic") + TPR, 4)


def _below(guest: Guest, offset: int) -> Exit:
    return guest.exit(ExitReason.TPR_BELOW_THRESHOLD, offset=offset)


# --- CR8 ---


def test_cr8_with_shadow(l1: L1) -> None:
    """With the TPR shadow CR8 is bits 7:4 of the virtual TPR, and L1's own TPR is not touched."""
    assert l1.write_cr(8, 9) == Succeed()
    guest = _shadowed(l1, 0x35)
    seen = guest.run(MOV_FROM_CR8)
    assert seen == Succeed()
    assert guest.changed(seen) == {"rax": 3}
    for value in range(16):
        seen = guest.run(MOV_TO_CR8 + code.mov_from_cr(8, "rcx"), {"rax": value})
        assert seen == Succeed()
        assert seen.regs["rcx"] == value
        assert _vtpr(l1) == value << 4
    assert l1.read_cr(8) == Succeed(9)
    # Nothing else of the page changed.
    page = l1.read(l1.sym("virtual_apic"), 4096)
    assert page == b"\x5a" * TPR + b"\xf0\0\0\0" + b"\x5a" * (4092 - TPR)


def test_cr8_reserved_bits(l1: L1) -> None:
    """A value above 15 is #GP(0) and leaves the virtual TPR alone."""
    guest = _shadowed(l1, 0x30)
    for value in (0x10, 1 << 32, 1 << 63):
        assert guest.run(MOV_TO_CR8, {"rax": value}) == Fault(Vector.GP, error_code=0, rip=0)
    assert _vtpr(l1) == 0x30


def test_cr8_without_shadow(l1: L1) -> None:
    """Without the TPR shadow CR8 is the TPR of L1's own local APIC."""
    assert l1.write_cr(8, 9) == Succeed()
    guest = Guest(l1)
    seen = guest.run(MOV_FROM_CR8 + code.mov_to_cr(8, "rcx"), {"rcx": 5})
    assert seen == Succeed()
    assert guest.changed(seen) == {"rax": 9}
    assert l1.read_cr(8) == Succeed(5)


@pytest.mark.parametrize("shadow", [False, True], ids=["no-shadow", "shadow"])
@pytest.mark.sdm("Exit Qualification for Control-Register Accesses")
def test_cr8_exiting(l1: L1, shadow: bool) -> None:
    """CR8 exiting comes before the TPR shadow, and names the general register."""
    guest = _shadowed(l1, 0x30) if shadow else Guest(l1)
    guest.on(ProcCtl.CR8_LOAD_EXITING)
    for number, name in ((0, "rax"), (4, "rsp"), (15, "r15")):
        instruction = code.mov_to_cr(8, name)
        qualification = CrAccess(8, CrAccessType.MOV_TO_CR, number).encode()
        seen = guest.run(instruction, GUEST_RSP=l1.sym("l2_stack_top"))
        assert seen == guest.exit(
            ExitReason.CR_ACCESS, len(instruction), qualification=qualification
        )
    seen = guest.run(MOV_FROM_CR8)
    assert seen == Succeed()
    guest.off(ProcCtl.CR8_LOAD_EXITING)
    guest.on(ProcCtl.CR8_STORE_EXITING)
    for number, name in ((0, "rax"), (3, "rbx"), (9, "r9")):
        instruction = code.mov_from_cr(8, name)
        qualification = CrAccess(8, CrAccessType.MOV_FROM_CR, number).encode()
        seen = guest.run(instruction)
        assert seen == guest.exit(
            ExitReason.CR_ACCESS, len(instruction), qualification=qualification
        )
        assert guest.changed(seen) == {}
    assert guest.run(MOV_TO_CR8, {"rax": 4}) == Succeed()
    if shadow:
        assert _vtpr(l1) == 0x40


# --- the threshold ---


@pytest.mark.sdm("TPR Virtualization")
def test_tpr_below_threshold(l1: L1) -> None:
    """A CR8 below the threshold exits behind the instruction, which has had its effect."""
    guest = _shadowed(l1, 0xF0)
    for threshold in (1, 5, 15):
        for value in range(16):
            l1.write_int(l1.sym("virtual_apic") + TPR, 0xF0, 4)
            seen = guest.run(MOV_TO_CR8, {"rax": value}, TPR_THRESHOLD=threshold)
            text = f"threshold {threshold} CR8 {value}"
            if value < threshold:
                assert seen == _below(guest, len(MOV_TO_CR8)), text
            else:
                assert seen == Succeed(), text
            assert guest.changed(seen) == {}
            assert _vtpr(l1) == value << 4, text
    # It is no fault: L2 goes on behind the instruction.
    l1.write_int(l1.sym("virtual_apic") + TPR, 0xF0, 4)
    assert guest.run(MOV_TO_CR8, {"rax": 0}) == _below(guest, len(MOV_TO_CR8))
    guest.vmcs[Field.TPR_THRESHOLD] = 0
    assert guest.go_on() == Succeed()


@pytest.mark.sdm("VM-Execution Control Fields")
@pytest.mark.parametrize(
    ("tpr", "threshold"), [(0x40, 5), (0x00, 1), (0xE0, 15), (0xF0, 16), (0xF0, 1 << 31)]
)
def test_entry_below_the_threshold(l1: L1, tpr: int, threshold: int) -> None:
    """Without APIC accesses virtualized, an entry with the TPR below the threshold is error 7."""
    guest = _shadowed(l1, tpr)
    guest.vmcs[Field.TPR_THRESHOLD] = threshold
    assert guest.run(code.NOP) == VMfailValid(VmxError.ENTRY_INVALID_CONTROL_FIELD)
    # L1 goes on in its own state, and a good threshold enters.
    assert l1.read_cr(3) == Succeed(l1.sym("l1_pml4"))
    assert l1.read_cr(4) == Succeed(guest.vmcs[Field.HOST_CR4])
    guest.vmcs[Field.TPR_THRESHOLD] = tpr >> 4
    assert guest.run(code.NOP) == Succeed()


@pytest.mark.needs(Proc2Ctl.VIRTUALIZE_APIC_ACCESSES)
@pytest.mark.sdm("TPR Below Threshold")
def test_exit_right_after_entry(l1: L1) -> None:
    """With APIC accesses virtualized, the entry succeeds and the exit follows at once."""
    guest = _shadowed(l1, 0x40, Proc2Ctl.VIRTUALIZE_APIC_ACCESSES)
    guest.vmcs[Field.APIC_ACCESS_ADDR] = l1.sym("apic_access")
    assert guest.run(code.CPUID, TPR_THRESHOLD=5) == _below(guest, 0)
    assert guest.run(code.NOP, TPR_THRESHOLD=4) == Succeed()


@pytest.mark.series(24)
@pytest.mark.sdm("TPR Virtualization")
def test_virtual_apic_page_is_logged_dirty(l1: L1) -> None:
    """KVM's dirty log has the virtual-APIC page once L2 wrote its TPR, while L2 still runs."""
    if l1.nested_roundtrip:
        pytest.skip("a round trip of the VM ends its dirty log")
    guest = _shadowed(l1, 0x30)
    page = l1.sym("virtual_apic") // 4096
    l1.vm.add_memory(0, 0, l1.memory, log_dirty=True)
    for value in (5, 6):
        seen = guest.run(MOV_TO_CR8 + code.out8(0x80), {"rax": value})
        assert seen == HostExit(IoExit(IO_OUT, 1, 0x80, 1, bytes([value])))
        log = l1.vm.dirty_log(0)
        assert log[page // 8] >> page % 8 & 1
        assert _vtpr(l1) == value << 4
        assert guest.resume() == Succeed()


# --- the APIC-access page ---


def _access(guest: Guest, instruction: bytes, offset: int) -> Outcome:
    return guest.run(instruction, {"rdi": guest.l1.sym("apic_access") + offset})


def _apic_exit(guest: Guest, offset: int, kind: ApicAccessType) -> Exit:
    return guest.exit(ExitReason.APIC_ACCESS, qualification=ApicAccess(offset, kind).encode())


@pytest.mark.needs(Proc2Ctl.VIRTUALIZE_APIC_ACCESSES)
@pytest.mark.sdm("APIC-Access VM Exits")
@pytest.mark.parametrize("shadow", [False, True], ids=["no-shadow", "shadow"])
def test_apic_access(l1: L1, shadow: bool) -> None:
    """A linear access to the page exits with offset and kind, before it takes effect."""
    guest = _shadowed(l1, 0x30) if shadow else Guest(l1)
    guest.on(Proc2Ctl.VIRTUALIZE_APIC_ACCESSES)
    guest.vmcs[Field.APIC_ACCESS_ADDR] = l1.sym("apic_access")
    l1.write(l1.sym("apic_access"), b"\x77" * 4096)
    for offset in (0x0, 0x20, 0x90, 0x300, 0xFF0, *(() if shadow else (TPR,))):
        for size in LOAD:
            seen = _access(guest, LOAD[size], offset)
            text = f"{size} bytes at {offset:#x}"
            assert seen == _apic_exit(guest, offset, ApicAccessType.LINEAR_READ), text
            assert guest.changed(seen) == {}
            seen = _access(guest, STORE[size], offset)
            assert seen == _apic_exit(guest, offset, ApicAccessType.LINEAR_WRITE), text
    assert l1.read(l1.sym("apic_access"), 4096) == b"\x77" * 4096
    # Another page of the same kind is plain memory.
    assert guest.run(LOAD[4], {"rdi": l1.sym("l2_data")}) == Succeed()
    guest.off(Proc2Ctl.VIRTUALIZE_APIC_ACCESSES)
    seen = _access(guest, LOAD[4], 0x20)
    assert seen == Succeed()
    assert seen.regs["rax"] == 0x77777777


@pytest.mark.needs(Proc2Ctl.VIRTUALIZE_APIC_ACCESSES)
@pytest.mark.sdm("Virtualizing Reads from the APIC-Access Page")
def test_tpr_on_the_apic_access_page(l1: L1) -> None:
    """With the TPR shadow offset 80H is the virtual TPR; a wider access exits."""
    guest = _shadowed(l1, 0x30, Proc2Ctl.VIRTUALIZE_APIC_ACCESSES)
    guest.vmcs[Field.APIC_ACCESS_ADDR] = l1.sym("apic_access")
    seen = _access(guest, LOAD[4], TPR)
    assert seen == Succeed()
    assert seen.regs["rax"] == 0x30
    seen = _access(guest, LOAD[1], TPR)
    assert seen == Succeed()
    assert seen.regs["rax"] == PATTERN["rax"] & ~0xFF | 0x30
    seen = _access(guest, LOAD[8], TPR)
    assert seen == _apic_exit(guest, TPR, ApicAccessType.LINEAR_READ)
    # The low byte of RAX is written; the other bytes of the virtual TPR become 0.
    assert _access(guest, STORE[4], TPR) == Succeed()
    assert _vtpr(l1) == PATTERN["rax"] & 0xFF
    seen = guest.run(
        STORE[4] + code.NOP,
        {"rdi": l1.sym("apic_access") + TPR, "rax": 0x1F},
        TPR_THRESHOLD=0,
    )
    assert seen == Succeed()
    assert _vtpr(l1) == 0x1F


@pytest.mark.needs(Proc2Ctl.VIRTUALIZE_APIC_ACCESSES)
@pytest.mark.sdm("Exit Qualification for APIC-Access VM Exits from Linear Accesses")
def test_apic_access_of_a_delivery(l1: L1) -> None:
    """A push to the page while an event is delivered is told apart from a data access."""
    guest = Guest(l1, Proc2Ctl.VIRTUALIZE_APIC_ACCESSES)
    guest.vmcs[Field.APIC_ACCESS_ADDR] = page = l1.sym("apic_access")
    assert guest.run(code.NOP, GUEST_RSP=page + 0x800) == Succeed()
    # UD2 pushes SS first.
    seen = guest.run(code.UD2, GUEST_RSP=page + 0x800)
    assert seen == guest.exit(
        ExitReason.APIC_ACCESS,
        qualification=ApicAccess(0x7F8, ApicAccessType.LINEAR_EVENT_DELIVERY).encode(),
        idt_info=intr_info(Vector.UD, IntrType.HARDWARE_EXCEPTION),
    )


@pytest.mark.needs(Proc2Ctl.VIRTUALIZE_APIC_ACCESSES)
@pytest.mark.sdm("Exit Qualification for APIC-Access VM Exits from Linear Accesses")
def test_apic_access_of_a_fetch(l1: L1) -> None:
    """An instruction fetch from the page is told apart from a data access."""
    guest = Guest(l1, Proc2Ctl.VIRTUALIZE_APIC_ACCESSES)
    guest.vmcs[Field.APIC_ACCESS_ADDR] = page = l1.sym("apic_access")
    seen = guest.run(b"\xff\xe7", {"rdi": page + 0x40})  # JMP RDI
    assert seen == Exit(
        ExitReason.APIC_ACCESS,
        qualification=ApicAccess(0x40, ApicAccessType.LINEAR_FETCH).encode(),
        rip=page + 0x40,
        intr_info=NOT_VALID,
        idt_info=NOT_VALID,
    )


# --- x2APIC ---


@pytest.mark.needs(Proc2Ctl.VIRTUALIZE_X2APIC_MODE, ProcCtl.USE_MSR_BITMAPS)
@pytest.mark.sdm("Virtualizing MSR-Based APIC Accesses")
def test_tpr_of_a_virtual_x2apic(l1: L1) -> None:
    """With "virtualize x2APIC mode" MSR 808H of L2 is the virtual TPR, not L1's."""
    assert l1.write_cr(8, 9) == Succeed()
    guest = _shadowed(l1, 0x35, Proc2Ctl.VIRTUALIZE_X2APIC_MODE, ProcCtl.USE_MSR_BITMAPS)
    set_msr_bitmap(l1)
    l1.write_int(l1.sym("virtual_apic") + TPR + 4, 0, 4)
    seen = guest.run(code.RDMSR, {"rcx": Msr.X2APIC_TPR})
    assert seen == Succeed()
    assert (seen.regs["rdx"], seen.regs["rax"]) == (0, 0x35)
    regs = {"rcx": Msr.X2APIC_TPR, "rax": 0x62, "rdx": 0}
    assert guest.run(code.WRMSR, regs) == Succeed()
    assert _vtpr(l1) == 0x62
    assert l1.read_cr(8) == Succeed(9)
    # Bits 63:8 are reserved; the threshold holds for the MSR too.
    general = Fault(Vector.GP, error_code=0, rip=0)
    assert guest.run(code.WRMSR, regs | {"rax": 0x162}) == general
    assert guest.run(code.WRMSR, regs | {"rdx": 1}) == general
    seen = guest.run(code.WRMSR, regs | {"rax": 0x1F}, TPR_THRESHOLD=2)
    assert seen == _below(guest, 2)
    # The MSR bitmap comes first.
    set_msr_bitmap(l1, [("read-low", Msr.X2APIC_TPR), ("write-low", Msr.X2APIC_TPR)])
    guest.vmcs[Field.TPR_THRESHOLD] = 0
    for instruction, reason in ((code.RDMSR, ExitReason.RDMSR), (code.WRMSR, ExitReason.WRMSR)):
        assert guest.run(instruction, regs) == guest.exit(reason, 2)


@pytest.mark.needs(Proc2Ctl.APIC_REGISTER_VIRTUALIZATION, ProcCtl.USE_MSR_BITMAPS)
@pytest.mark.sdm("Virtualizing MSR-Based APIC Accesses")
def test_x2apic_msrs_are_l1s_own(l1: L1) -> None:
    """Without "virtualize x2APIC mode" the x2APIC MSRs of L2 are those of L1's local APIC."""
    base = l1.rdmsr(Msr.APIC_BASE).value
    guest = _shadowed(l1, 0x30, Proc2Ctl.APIC_REGISTER_VIRTUALIZATION, ProcCtl.USE_MSR_BITMAPS)
    set_msr_bitmap(l1)
    # In xAPIC mode they do not exist.
    for msr in (Msr.X2APIC_APICID, Msr.X2APIC_VERSION, Msr.X2APIC_TPR):
        seen = guest.run(code.RDMSR, {"rcx": msr})
        assert seen == Fault(Vector.GP, error_code=0, rip=0), hex(msr)
    assert l1.wrmsr(Msr.APIC_BASE, base | 1 << 10) == Succeed()
    assert l1.wrmsr(Msr.X2APIC_TPR, 0x44) == Succeed()
    for msr in (Msr.X2APIC_APICID, Msr.X2APIC_VERSION, Msr.X2APIC_TPR, Msr.X2APIC_SIVR):
        seen = guest.run(code.RDMSR, {"rcx": msr})
        assert seen == Succeed(), hex(msr)
        assert seen.regs["rdx"] << 32 | seen.regs["rax"] == l1.rdmsr(msr).value, hex(msr)
