"""What KVM emulates of L2 when memory or L1's bitmaps change meanwhile, or nobody can do it."""

from __future__ import annotations

import pytest

from kvmnest.kvm import exits
from kvmnest.l1 import L1, code
from kvmnest.suite.support.bitmaps import set_io_bitmaps
from kvmnest.suite.support.emulation import emulated
from kvmnest.suite.support.ept import (
    ENABLE_AD,
    Access,
    R,
    W,
    Window,
    X,
    preset_flags,
    qualification,
    with_linear_rights,
)
from kvmnest.suite.support.guest import NOT_VALID, Guest
from kvmnest.vmx import EptVpidCap, ExitReason, Field, Proc2Ctl, ProcCtl, Vector
from kvmnest.vmx.outcome import Exit, Fault, HostExit, Succeed

__all__ = ["emulated"]

pytestmark = [pytest.mark.series(19), pytest.mark.sdm("VMX Non-Root Operation")]

PORT = 0x3F8
#: A guest-physical address without memory.
NOWHERE = 0x10000000
OUTSB, INSB = b"\x6e", b"\x6c"


def _input(seen: object) -> None:
    assert isinstance(seen, HostExit)
    assert isinstance(seen.exit, exits.IoExit)
    assert not seen.exit.is_out


@pytest.mark.needs(ProcCtl.USE_IO_BITMAPS)
@pytest.mark.parametrize("instruction", [INSB, b"\xec"], ids=["INSB", "IN"])
def test_bitmap_changes_while_userspace_answers(l1: L1, instruction: bytes) -> None:
    """I/O that L1 did not intercept when it began ends without exit; the next one exits."""
    guest = Guest(l1, ProcCtl.USE_IO_BITMAPS)
    set_io_bitmaps(l1, ())
    data = l1.sym("l2_data")
    regs = {"rdx": PORT, "rdi": data, "rax": 0}
    seen = guest.run(instruction + code.NOP + instruction, regs)
    _input(seen)
    l1.write_int(l1.sym("io_bitmap_a") + PORT // 8, 1 << PORT % 8, 1)
    l1.vcpu.set_io_data(b"\x42")
    seen = guest.resume()
    assert seen == Exit(ExitReason.IO_INSTRUCTION, rip=guest.at(len(instruction) + 1))
    if instruction == b"\xec":
        assert seen.regs["rax"] & 0xFF == 0x42
    else:
        assert l1.read_int(data, 1) == 0x42
        assert seen.regs["rdi"] == data + 1


@pytest.mark.needs(Proc2Ctl.ENABLE_EPT)
@pytest.mark.sdm("Exit Qualification for EPT Violations")
@pytest.mark.parametrize("allowed", [0, X], ids=["none", "X"])
def test_output_of_a_page_that_violates_ept(l1: L1, allowed: int) -> None:
    """OUTSB whose memory violates EPT exits with that access, its address and the rights."""
    window = Window(Guest(l1))
    window.allow(1, allowed)
    window.invalidate()
    guest = window.guest
    seen = guest.run(OUTSB, {"rdx": PORT, "rsi": window.linear})
    assert seen == Exit(
        ExitReason.EPT_VIOLATION,
        qualification=qualification(R, allowed),
        rip=guest.at(),
        idt_info=NOT_VALID,
        linear=window.linear,
        physical=window.gpa,
    )


@pytest.mark.needs(Proc2Ctl.ENABLE_EPT)
@pytest.mark.sdm("Exit Qualification for EPT Violations")
def test_output_through_a_table_that_violates_ept(l1: L1) -> None:
    """OUTSB whose page walk violates EPT: bit 8 is clear, since no page was translated yet."""
    window = Window(Guest(l1))
    table = window.guest_page_table()
    entry = l1.sym("ept_pml4_pt") + 8 * (table >> 12)
    l1.write_int(entry, 0)
    window.invalidate()
    guest = window.guest
    seen = guest.run(OUTSB, {"rdx": PORT, "rsi": window.linear})
    assert isinstance(seen, Exit)
    assert seen.reason == ExitReason.EPT_VIOLATION
    assert seen.physical == table
    assert seen.qualification & 0x181 == 0x81


@pytest.mark.needs(Proc2Ctl.ENABLE_EPT)
@pytest.mark.sdm("Exit Qualification for EPT Violations")
def test_input_to_a_page_that_became_read_only(l1: L1) -> None:
    """INSB whose page L1's EPT protects while userspace answers: a write violation, no store."""
    window = Window(Guest(l1))
    assert window.access(Access.WRITE) == Succeed()
    before = l1.read(window.page, 8)
    guest = window.guest
    window.allow(1, R)
    window.invalidate()
    seen = guest.run(INSB, {"rdx": PORT, "rdi": window.linear})
    if isinstance(seen, HostExit):
        l1.vcpu.set_io_data(b"\x42")
        seen = guest.resume()
    assert seen == Exit(
        ExitReason.EPT_VIOLATION,
        qualification=qualification(W, R),
        rip=guest.at(),
        idt_info=NOT_VALID,
        linear=window.linear,
        physical=window.gpa,
    )
    assert l1.read(window.page, 8) == before


@pytest.mark.needs(Proc2Ctl.ENABLE_EPT, EptVpidCap.ADVANCED_EXIT_INFO)
@pytest.mark.sdm("Exit Qualification for EPT Violations")
@pytest.mark.parametrize("instruction", [OUTSB, INSB], ids=["OUTSB", "INSB"])
def test_advanced_information(l1: L1, instruction: bytes) -> None:
    """Bits 11:9, where L1 is offered them, tell what L2's own tables allow at the address."""
    window = Window(Guest(l1))
    window.allow(1, 0)
    window.invalidate()
    regs = {"rdx": PORT, "rsi": window.linear, "rdi": window.linear}
    seen = window.guest.run(instruction, regs)
    if isinstance(seen, HostExit):
        l1.vcpu.set_io_data(b"\x42")
        seen = window.guest.resume()
    access = qualification(R if instruction == OUTSB else W, 0)
    assert isinstance(seen, Exit)
    assert seen.qualification == with_linear_rights(l1, access)


_CANNOT = {
    "FNSAVE": b"\xdd\x37",  # FNSAVE [RDI]
    "FBSTP": b"\xdf\x37",  # FBSTP [RDI]
    "MASKMOVQ": b"\x0f\xf7\xc1",  # MASKMOVQ MM0, MM1
    "PADDB": b"\x66\x0f\xfc\x07",  # PADDB XMM0, [RDI]
}


@pytest.mark.needs(Proc2Ctl.ENABLE_EPT)
@pytest.mark.sdm("VMX Non-Root Operation")
@pytest.mark.parametrize("intercepted", [False, True], ids=["", "intercepted"])
@pytest.mark.parametrize("cpl", [0, 3])
@pytest.mark.parametrize("name", _CANNOT)
def test_what_kvm_cannot_emulate(
    l1: L1, emulated: None, name: str, cpl: int, intercepted: bool
) -> None:
    """An access of L2 to MMIO by an instruction that KVM cannot emulate is #UD in L2 alone."""
    instruction = _CANNOT[name]
    guest = Guest(l1)
    guest.set_cpl(cpl)
    bitmap = 1 << Vector.UD if intercepted else 0
    seen = guest.run(instruction, {"rdi": NOWHERE}, EXCEPTION_BITMAP=bitmap)
    if intercepted:
        assert seen == guest.exception(Vector.UD)
    else:
        assert seen == Fault(Vector.UD, rip=0)
    guest.set_cpl(0)
    assert guest.run(code.NOP, EXCEPTION_BITMAP=0) == Succeed()


@pytest.mark.needs(Proc2Ctl.ENABLE_PML)
@pytest.mark.sdm("Page-Modification Logging")
def test_input_when_the_log_is_full(l1: L1) -> None:
    """INSB whose page would be logged exits with "page-modification log full", and stores nothing.

    KVM carries out INSB itself, so that no EPT violation of hardware precedes this exit.
    """
    window = Window(Guest(l1))
    preset_flags(l1)
    guest = window.guest
    guest.vmcs[Field.EPT_POINTER] |= ENABLE_AD
    guest.on(Proc2Ctl.ENABLE_PML)
    guest.vmcs[Field.PML_ADDRESS], guest.vmcs[Field.GUEST_PML_INDEX] = l1.alloc(), 0xFFFF
    before = l1.read(window.page, 8)
    seen = guest.run(INSB, {"rdx": PORT, "rdi": window.linear})
    if isinstance(seen, HostExit):
        l1.vcpu.set_io_data(b"\x42")
        seen = guest.resume()
    assert seen == Exit(ExitReason.PML_FULL, rip=guest.at(), idt_info=NOT_VALID)
    assert l1.read(window.page, 8) == before
    guest.vmcs[Field.GUEST_PML_INDEX] = 7
    seen = guest.go_on()
    if isinstance(seen, HostExit):
        l1.vcpu.set_io_data(b"\x42")
        seen = guest.resume()
    assert seen == Succeed()
    assert l1.read_int(window.page, 1) == 0x42
